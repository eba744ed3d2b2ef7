"""Training in phases, with checkpoints that survive anything, early stopping and a log."""

from case_fast.training.config import TrainConfig, config_class, preset, preset_values
from case_fast.training.loop import NotFinite, TrainResult, train
from case_fast.training.process import default_device

__all__ = ["NotFinite", "TrainConfig", "TrainResult", "config_class", "default_device", "preset", "preset_values", "train"]
