"""The process around a run: its random numbers, its signals, its memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

import torch


class StopRequest:
    """Notices Ctrl-C and SIGTERM: the first one asks (``signal`` is its name), the second raises KeyboardInterrupt.

    Args:
        saying: what is told to happen then; None: nothing is told.
        echo: seconds in which a further signal is the same request: a terminal or a scheduler and the launcher both send it.
    """

    def __init__(self, saying: str | None = "finishing this step and saving", echo: float = 0.0) -> None:
        self.saying, self.echo = saying, echo
        self.signal: str | None = None
        self._asked = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._asked < self.echo:
                return
            raise KeyboardInterrupt
        self.signal, self._asked = signal.Signals(number).name, time.monotonic()
        # not through the display: this runs between any two instructions, one of the display's own included
        if self.saying is not None:
            with suppress(OSError):  # nobody reads it any more
                os.write(2, f"\n{self.signal}: {self.saying}; once more aborts at once\n".encode())


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Products of float32 as `torch.set_float32_matmul_precision` names it inside, the caller's own outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def reproducible(seed: int, deterministic: bool, device: torch.device) -> Iterator[None]:
    """Seeded random numbers and deterministic algorithms inside, the caller's own ones outside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            if deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
                # Each `torch.empty` would be filled with NaN first. Nothing here reads what was not written: the scorecard fills
                # the ops' buffers so (row 6).
                torch.utils.deterministic.fill_uninitialized_memory = False
            torch.manual_seed(seed)
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of the process, and of the GPU, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    found = {"max_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if device.type == "cuda":
        found["max_gpu_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return found
