"""What is known of a causal language model: head and backbone, attention masks, sharding, routers, loading."""
