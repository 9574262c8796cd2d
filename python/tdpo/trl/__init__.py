"""TDPO for users of TRL: `TDPOTrainer` takes the place of its DPOTrainer."""

from ..extras import require_extra

require_extra("trl")

from .trainer import TDPOTrainer as TDPOTrainer  # noqa: E402
