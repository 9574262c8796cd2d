"""Preference data: reading files, checking rows, tokenizing, and the batches that a step takes."""

from ..extras import require_extra

require_extra("train")
