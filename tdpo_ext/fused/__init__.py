"""The fused losses: inputs, rows, plan, the two execution plans and the gradients that they accumulate."""
