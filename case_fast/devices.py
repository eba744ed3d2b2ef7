"""Where computations run: the device that a setting names, checked once for training, evaluation, chat and knowledge."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from case_fast.errors import ConfigError

DEVICES = "auto, cpu, cuda or cuda:N"  # what a setting "device" may be, for help texts


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device of a setting, one of `DEVICES`: "auto" is the GPU if torch sees one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if str(name) == "auto":
        return torch.device("cuda" if seen else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]{0,2}))?", str(name))
    if found is None or (found[0] != "cpu" and int(found[1] or 0) >= seen):
        said = "no CUDA device" if seen == 0 else f"{seen} CUDA device{'s' * (seen > 1)}, counted from 0"
        raise ConfigError(f"device {str(name)!r} cannot be used here: give {DEVICES}; torch sees {said}")
    return torch.device(found[0])


def device_in_words(device: torch.device) -> str:
    """The device with its name and the number of CPU threads: results are equal bit for bit only where all three are."""
    return f"{device} ({device_name(device)}), {torch.get_num_threads()} CPU threads"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
