"""What a run writes and resumes from: checkpoints, its record, logs, samples and the model card."""

from ..extras import require_extra

require_extra("train")
