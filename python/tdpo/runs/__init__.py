"""What a run writes and resumes from: checkpoints, its record, logs, samples and the model card."""
