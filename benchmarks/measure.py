"""How things are measured: checked against float64, at their own best number of threads, in turns; on CPU and GPU alike."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Clock, Prepared

OURS = "case_fast"
LAUNCHED = "case_fast, launched one by one"  # ours on a GPU beside a peer that cannot be captured in a CUDA graph
MODES = ("forward", "forward+backward")
BACKWARD = "backward"  # alone, again and again after one forward pass; on a GPU
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

    @property
    def least(self) -> tuple[tuple[float, float], ...]:
        """(operations, bytes) that forward, and backward alone, cannot do without: products without any that is made again, each
        input read and each result written once. () where nobody has counted."""
        return ()

    def needs(self, mode: str) -> dict[str, float]:
        """The least of a mode: {"flop", "bytes"}, or {}."""
        parts = dict(zip((MODES[0], BACKWARD), self.least, strict=False))
        counted = [parts[part] for part in mode.split("+") if part in parts]
        return dict(zip(("flop", "bytes"), map(sum, zip(*counted, strict=True)), strict=True)) if counted else {}


@dataclass
class Work:
    """A peer made ready for one case.

    function(*leaves) -> out, or a tuple of them; leaves and grad_out, one for each out, in the peer's own layout, which
    ``pack`` turns into the case's, given (out,) or (out, a gradient for each leaf). ``part`` is a piece of the function's work
    that is worth naming. ``switch`` chooses among our kernels: it is on whenever the work is checked or timed.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    grad_out: Tensor | tuple[Tensor, ...]
    pack: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda results: results
    trains: bool = True
    part: Callable[[], object] | None = None
    part_name: str = ""
    note: str = ""
    switch: Callable[[], AbstractContextManager] = nullcontext

    def __post_init__(self) -> None:
        self.leaves = tuple(x.detach().requires_grad_(self.trains) for x in self.leaves)

    def call(self, mode: str) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed; it gives (out,), or (out, a gradient for each leaf), or a tuple of outputs as it is."""

        def outputs() -> tuple[Tensor, ...]:
            out = self.function(*self.leaves)
            return out if isinstance(out, tuple) else (out,)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return outputs()

        def gradients(out: tuple[Tensor, ...], again: bool) -> tuple[Tensor, ...]:
            found = torch.autograd.grad(out, self.leaves, self.grad_out, retain_graph=again)
            return *[x.detach() for x in out], *found

        if mode == BACKWARD:
            once = outputs()
            return lambda: gradients(once, True)

        def both() -> tuple[Tensor, ...]:
            return gradients(outputs(), False)

        return {MODES[0]: forward, MODES[1]: both}[mode]

    def run(self, mode: str) -> tuple[Tensor, ...]:
        return self.call(mode)()

    def check(self, mode: str, truth: Truth) -> float:
        """The largest error over its limit. Raises WrongResult where it is above 1."""
        return truth.check(self.pack(self.run(mode)))


@dataclass
class Yardstick:
    """Work of the same size that computes nothing to be checked, such as bare matrix products: timed in turns, no rival."""

    calls: dict[str, Callable[[], object]]  # by mode
    switch = nullcontext

    def call(self, mode: str) -> Callable[[], object]:
        return self.calls[mode]

    def run(self, mode: str) -> tuple[Tensor, ...]:
        self.calls[mode]()
        return ()

    def check(self, mode: str, truth: Truth) -> float:
        self.run(mode)
        return 0.0


def prepared(prepare: Callable[[Any], Work | Yardstick], case: Case, mode: str) -> Work | Yardstick:
    """A peer made ready for this mode of a case.

    Raises:
        Unfit: it cannot do the case, or not in this mode.
    """
    work = prepare(case)
    if isinstance(work, Yardstick):
        if mode not in work.calls:
            raise Unfit(f"has no {mode} alone")
    elif mode != MODES[0] and not work.trains:
        raise Unfit(work.note)
    return work


def is_ours(peer: str) -> bool:
    """OURS, or another way to run our kernels: "case_fast, plan rows"."""
    return peer.split(",")[0] == OURS


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
    """A peer that is ready to take turns, and its seconds a call; one sample a round."""

    prepared: Prepared
    threads: int
    error: float  # the largest error over its limit, at most 1
    taken: float  # seconds a call, the best of a few
    switch: Callable[[], AbstractContextManager] = nullcontext
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def tune(work: Work | Yardstick, mode: str, truth: Truth, clock: Clock, counts: Iterable[int]) -> Timing:
    """Check the results at each number of threads, then find the fastest; a Timing without samples.

    Raises:
        WrongResult: before anything was timed at that number of threads.
    """
    best: Timing | None = None
    with work.switch():
        for threads in counts:
            torch.set_num_threads(threads)
            error = work.check(mode, truth)  # torch.compile compiles here, for this number of threads
            ready = clock.prepare(lambda: work.call(mode))
            taken, deadline = clock.seconds(ready.run), time.perf_counter() + 2
            for _ in range(8):
                if time.perf_counter() > deadline:
                    break
                taken = min(taken, clock.seconds(ready.run))
            if best is None or taken < best.taken:
                best = Timing(ready, threads, error, taken, work.switch)
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


def take_turns(timings: dict[str, Timing], clock: Clock, rounds: int, budget: float,
               tell: Callable[[int, int], None] = lambda done, total: None) -> float | None:
    """Fill the timings: in each round each in turn, calls for about 10 ms to warm up (below 0.2 s), then as many timed.

    Interleaved, so that what else the machine does hits all alike. Fewer rounds (at least 5) where they would take more than
    ``budget`` seconds.

    Returns:
        How many cores others kept busy meanwhile; a run to publish has nearly none.
    """
    calls = {name: max(1, min(50, round(0.01 / timing.taken))) for name, timing in timings.items()}
    round_takes = sum(timing.taken * calls[name] * (1 + (timing.taken < 0.2)) for name, timing in timings.items())
    rounds = min(rounds, max(5, int(budget / round_takes))) if timings else 0
    before, started = busy(), time.perf_counter()
    with _no_collection():
        for done in range(rounds):
            for name, timing in timings.items():
                torch.set_num_threads(timing.threads)
                with timing.switch():
                    if timing.taken < 0.2:
                        clock.seconds(timing.prepared.run, calls[name])
                    timing.samples.append(clock.seconds(timing.prepared.run, calls[name]))
            tell(done + 1, rounds)
    after = busy()
    return None if before is None or after is None else max(0.0, (after - before) / (time.perf_counter() - started))


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
