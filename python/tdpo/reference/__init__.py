"""The frozen reference: what the loss reads of it, its forms, one a file, and which of them a training has."""

from ..extras import require_extra

require_extra("train")
