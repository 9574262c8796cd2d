"""TDPO for users of TRL: `TDPOTrainer` takes the place of its DPOTrainer."""

from .trainer import TDPOTrainer as TDPOTrainer
