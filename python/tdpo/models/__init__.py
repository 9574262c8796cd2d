"""What is known of a causal language model: backbone and head, masks, probes, sharding, routers, loading."""

from ..extras import require_extra

require_extra("train")
