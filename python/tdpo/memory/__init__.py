"""What a training will need, from the configurations of its models and the planner of the loss: `tdpo memory`."""
