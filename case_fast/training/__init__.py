"""Training in phases, with checkpoints that survive anything, early stopping and a log."""

from case_fast.training.config import TrainConfig, config_class, preset, preset_values
from case_fast.training.loop import NotFinite, TrainResult, train

__all__ = ["NotFinite", "TrainConfig", "TrainResult", "config_class", "preset", "preset_values", "train"]
