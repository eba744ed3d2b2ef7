"""Training in two phases, with checkpoints that survive anything, early stopping and a log."""

from case_fast.training.config import PRESETS, TrainConfig, preset
from case_fast.training.loop import NotFinite, TrainResult, train

__all__ = ["PRESETS", "NotFinite", "TrainConfig", "TrainResult", "preset", "train"]
