"""How things are measured: checked against float64, at their own best number of threads, in turns."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

OURS = "case_fast"
MODES = ("forward", "forward+backward")
SLACK = 4  # a peer adds in another order than plain torch; a wrong formula is off by far more than this many times its error


class Unfit(Exception):
    """This peer cannot do this case; says why."""


class WrongResult(Exception):
    """This peer's output or gradients are not what the equation gives; it is not timed."""


@dataclass(frozen=True)
class Case:
    """One input of a family; each family adds its tensors."""

    name: str
    what: str

    @property
    def shape(self) -> dict[str, int]:
        """The numbers that say how large it is, by their letters."""
        raise NotImplementedError

    @property
    def size(self) -> int | None:
        """Its place in the picture; None where it has none."""
        return None

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES


@dataclass
class Work:
    """A peer made ready for one case.

    function(*leaves) -> out, or a tuple of them where nothing is trained; leaves and grad_out in the peer's own layout, which
    ``pack`` turns into the case's, given (out,) or (out, a gradient for each leaf). ``part`` is a piece of the function's work
    that is worth naming.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    grad_out: Tensor
    pack: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda results: results
    trains: bool = True
    part: Callable[[], object] | None = None
    part_name: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        self.leaves = tuple(x.detach().requires_grad_(self.trains) for x in self.leaves)

    def run(self, mode: str) -> tuple[Tensor, ...]:
        """(out,), or (out, a gradient for each leaf); a tuple of outputs as it is."""
        if mode == MODES[0]:
            with torch.no_grad():
                out = self.function(*self.leaves)
            return out if isinstance(out, tuple) else (out,)
        out = self.function(*self.leaves)
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.grad_out)

    def check(self, mode: str, truth: Truth) -> float:
        """The largest error over its limit. Raises WrongResult where it is above 1."""
        return truth.check(self.pack(self.run(mode)))


@dataclass
class Yardstick:
    """Work of the same size that computes nothing to be checked, such as bare matrix products: timed in turns, no rival."""

    calls: dict[str, Callable[[], object]]  # by mode

    def run(self, mode: str) -> tuple[Tensor, ...]:
        self.calls[mode]()
        return ()

    def check(self, mode: str, truth: Truth) -> float:
        self.run(mode)
        return 0.0


@dataclass
class Truth:
    """What a case gives in float64, and how far plain torch is off in the dtype of the inputs: ``limits`` of the error."""

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    limits: tuple[float, ...]

    @classmethod
    def of(cls, names: Iterable[str], exact: Iterable[Tensor], plain: Iterable[Tensor]) -> Truth:
        values = tuple(exact)
        own = [_distance(p, e) for p, e in zip(plain, values, strict=True)]
        sizes = [float(e.abs().max()) if e.numel() else 0.0 for e in values]
        return cls(tuple(names), values, tuple(SLACK * o + 1e-5 * max(1.0, s) for o, s in zip(own, sizes, strict=True)))

    def check(self, results: tuple[Tensor, ...]) -> float:
        """The largest error over its limit. Raises WrongResult where it is above 1."""
        worst = 0.0
        for name, actual, expected, limit in zip(self.names, results, self.values, self.limits, strict=False):
            if actual.shape != expected.shape:
                raise WrongResult(f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
            error = _distance(actual, expected)
            if not error <= limit:  # a NaN is wrong too
                raise WrongResult(f"{name} is off by {error:.2g}, more than {limit:.2g}")
            worst = max(worst, error / limit)
        return worst


def _distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected).abs().max()) if expected.numel() else 0.0


@dataclass
class Timing:
    """Seconds a call; one sample a round."""

    threads: int
    error: float  # the largest error over its limit, at most 1
    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({*(2**i for i in range(int(math.log2(cores)) + 1)), cores})


def seconds(call: Callable[[], object], calls: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def tune(work: Work | Yardstick, mode: str, truth: Truth, counts: Iterable[int]) -> tuple[Timing, float]:
    """Check the results at each number of threads, then find the fastest; (an empty Timing, seconds a call).

    Raises:
        WrongResult: before anything was timed at that number of threads.
    """
    best: tuple[Timing, float] | None = None
    for threads in counts:
        torch.set_num_threads(threads)
        error = work.check(mode, truth)  # torch.compile compiles here, for this number of threads
        taken, deadline = seconds(lambda: work.run(mode)), time.perf_counter() + 2
        for _ in range(8):
            if time.perf_counter() > deadline:
                break
            taken = min(taken, seconds(lambda: work.run(mode)))
        if best is None or taken < best[1]:
            best = Timing(threads, error, []), taken
    assert best is not None
    return best


def busy() -> float | None:
    """Seconds that all cores together have worked for anyone but this process, since some moment; None where Linux is not."""
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    except OSError:
        return None
    own = os.times()
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def take_turns(ready: dict[str, tuple[Work | Yardstick, Timing, float]], mode: str, rounds: int, budget: float,
               tell: Callable[[int, int], None] = lambda done, total: None) -> float | None:
    """Fill the timings: in each round each in turn, calls for about 10 ms to warm up (below 0.2 s), then as many timed.

    Interleaved, so that what else the machine does hits all alike. Fewer rounds (at least 5) where they would take more than
    ``budget`` seconds.

    Returns:
        How many cores others kept busy meanwhile; a run to publish has nearly none.
    """
    calls = {name: max(1, min(50, round(0.01 / taken))) for name, (_, _, taken) in ready.items()}
    round_takes = sum(taken * calls[name] * (1 + (taken < 0.2)) for name, (_, _, taken) in ready.items())
    rounds = min(rounds, max(5, int(budget / round_takes))) if ready else 0
    gc.collect()
    gc.disable()
    before, started = busy(), time.perf_counter()
    try:
        for done in range(rounds):
            for name, (work, timing, taken) in ready.items():
                torch.set_num_threads(timing.threads)
                for _ in range(calls[name] if taken < 0.2 else 0):
                    work.run(mode)
                timing.samples.append(seconds(lambda run=work.run: run(mode), calls[name]))
            tell(done + 1, rounds)
    finally:
        gc.enable()
    after = busy()
    return None if before is None or after is None else max(0.0, (after - before) / (time.perf_counter() - started))
