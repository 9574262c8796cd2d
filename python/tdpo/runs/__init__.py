"""What a run leaves behind and goes on from: checkpoints, its record, logs, samples and the model card."""
