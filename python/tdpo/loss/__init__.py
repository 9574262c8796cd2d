"""From a batch's hidden states to the preference loss and its metrics."""

from ..extras import require_extra

require_extra("train")
