"""What is known of a causal language model: backbone and head, masks, probes, sharding, routers, loading."""
