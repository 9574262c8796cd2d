"""How a fused loss cuts its work: the sizes that decide, the cost model, and the plan that is chosen."""
