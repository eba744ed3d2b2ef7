"""How long a call takes: by wall time on a CPU, by events around replays of a CUDA graph on a GPU."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Prepared:
    """What is timed, and ``how`` where that has to be said; ``keeps`` is the memory that it works in. ``launched``: call by call,
    on a GPU, where others are replayed."""

    run: Callable[[], object]
    how: str = ""
    keeps: object = None
    launched: bool = False


class CpuClock:
    """Calls as they are."""

    def thread_counts(self) -> list[int]:
        """1, 2, 4, ... and all the cores that this process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return sorted({*(2**i for i in range(int(math.log2(cores)) + 1)), cores})

    def prepare(self, make: Callable[[], Callable[[], object]]) -> Prepared:
        return Prepared(make())

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        """Of one call, the mean of so many."""
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls


class CudaClock:
    """Replays of a CUDA graph, so without gaps between launches, as in a captured training step. What cannot be captured is
    timed as it is launched, and says so; ours is then timed as launched besides. Inputs stay where they are between replays: the
    paper's batch lives in L2, as it does in a model."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def thread_counts(self) -> list[int]:
        """As torch has it: threads do no work here."""
        return [torch.get_num_threads()]

    def prepare(self, make: Callable[[], Callable[[], object]], capture: bool = True) -> Prepared:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            call = make()  # on this stream: a backward pass runs where its forward pass ran
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        if not capture:
            return Prepared(call, "launched one by one", launched=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize()
            why = str(error).splitlines()[0][:120]
            return Prepared(call, f"launched one by one, since it cannot be captured: {why}", launched=True)
        return Prepared(graph.replay, "CUDA graph", call)

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        with torch.cuda.stream(self._stream):
            self._begin.record()
            for _ in range(calls):
                run()
            self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3 / calls


Clock = CpuClock | CudaClock


def clock_of(device: str) -> Clock:
    """Of "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else CpuClock()
