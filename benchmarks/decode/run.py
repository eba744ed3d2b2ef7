"""Times the replies to real dialogues: this package, and the same model's decoder as such code is usually written.

Every form starts from the same `Reading`, so that what is timed is decoding alone; its replies are compared with ours, word for
word, before it is timed. Batches are of dialogues of like length, as `generate_all` makes them, spread over the test set. What
takes long is timed once, and the table shows that it has no quartiles.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.clock import CpuClock
from benchmarks.decode import plain
from benchmarks.decode import report as tables
from benchmarks.measure import OURS, Timing, WrongResult, take_turns
from case_fast import generation
from case_fast.data import open_store
from case_fast.data.store import Store
from case_fast.errors import CaseFastError, ConfigError
from case_fast.generation import Generated, GenerationConfig
from case_fast.models import DialogueModel
from case_fast.models.base import Reading, evaluating
from case_fast.runs import load_model

STRATEGIES = {"greedy": GenerationConfig(), "beam 5": GenerationConfig("beam", beams=5)}
COMPILED = "padded, cached, torch.compile"
BATCHES = 1  # of each size
SLOW = 2.0  # seconds a call from which it is timed once, on all cores
NEAR = 1e-4  # two replies whose ranks lie so near may stand for each other

Call = Callable[[], list[Generated]]


def forms(model: DialogueModel, readings: Sequence[tuple[Any, Reading]], config: GenerationConfig, quick: bool
          ) -> dict[str, Call]:
    """What is compared: each gives the replies to all batches."""

    def by(form: Callable[..., Any]) -> Call:
        return lambda: [reply for _, reading in readings for reply in plain.generate(model, reading, config, form)]

    replayed = generation.Replayed(model, config) if readings[0][1].device.type == "cuda" else None
    ours = functools.partial(generation.generate, model, config=config) if replayed is None else replayed.generate
    found = {OURS: lambda: [reply for batch, reading in readings for reply in ours(batch, reading=reading)],
             "padded, cached, eager": by(plain.Cached), "padded, no cache, eager": by(plain.Uncached)}
    if not quick:
        step = torch.compile(plain.cached_step, dynamic=True)
        found[COMPILED] = by(functools.partial(plain.Cached, step=step))
    return found


def rank(reply: Generated, config: GenerationConfig) -> float:
    length = len(reply.words) + (reply.ended_by == "eos")
    return reply.score / length ** (config.length_penalty if config.strategy == "beam" else 0)


def compare(found: Sequence[Generated], ours: Sequence[Generated], config: GenerationConfig) -> int:
    """How many replies differ; WrongResult where the ranks of two of them do not lie near."""
    different = 0
    for one, other in zip(found, ours, strict=True):
        if not abs(rank(one, config) - rank(other, config)) < NEAR * max(1, abs(rank(other, config))):
            raise WrongResult(f"a reply of rank {rank(one, config):.6g} stands where ours has {rank(other, config):.6g}")
        different += one.words != other.words
    return different


def batches_of(model: DialogueModel, store: Store, size: int, device: torch.device) -> list[tuple[Any, Reading]]:
    """Batches of ``size`` dialogues, spread over the test set in order of length, and what the model understands of them."""
    order = sorted(range(store.size("test")), key=lambda index: -len(store.example("test", index).context))
    starts = [(2 * place + 1) * max(0, len(order) - size) // (2 * BATCHES) for place in range(BATCHES)]
    with evaluating(model):
        batches = [store.batch("test", order[start : start + size], model.needs, seed=0).to(device) for start in starts]
        return [(batch, model.read(batch)) for batch in batches]


def tuned(call: Call, clock: CpuClock, counts: Sequence[int]) -> Timing:
    """Ready to take turns, at its best number of threads."""
    found = []
    for threads in counts:
        torch.set_num_threads(threads)
        found.append(Timing(clock.prepare(lambda: call), threads, 0.0, clock.seconds(call)))
    return min(found, key=lambda timing: timing.taken)


def measure(model: DialogueModel, store: Store, size: int, quick: bool, budget: float, tell: Callable[[str, int, int], None]
            ) -> dict[str, Any]:
    """One batch size: rows of every form and strategy."""
    clock, rows, busy = CpuClock(), [], {}  # replies are on the host when a call is over: wall time, on a GPU as well
    device = next(model.parameters()).device
    readings = batches_of(model, store, size, device)
    dialogues = sum(batch.size for batch, _ in readings)
    for strategy, config in STRATEGIES.items():
        torch.compiler.reset()
        torch.set_num_threads(clock.thread_counts()[-1])
        ours: list[Generated] = []
        ready: dict[str, Timing] = {}
        of_form = forms(model, readings, config, quick)
        for place, (name, call) in enumerate(of_form.items()):
            tell(f"batches of {size}, {strategy}: {name}", place, len(of_form))
            row = {"form": name, "strategy": strategy}
            rows.append(row)
            try:
                started = time.perf_counter()
                found = call()
                row["first_call_s"] = time.perf_counter() - started  # compiling is in it
                ours = ours or found
                row["different"] = compare(found, ours, config)
                counts = clock.thread_counts()
                one_count = quick or device.type != "cpu" or row["first_call_s"] > SLOW and name != COMPILED
                ready[name] = tuned(call, clock, counts[-1:] if one_count else counts)
            except WrongResult as why:
                row["refused"] = str(why)
            except Exception as why:  # a compiler may fail in any way; the others are still measured
                if name == OURS:
                    raise
                row["failed"] = f"{type(why).__name__}: {str(why).split(chr(10), 1)[0][:200]}"
        in_turns = {name: timing for name, timing in ready.items() if quick or timing.taken <= SLOW}
        busy[strategy] = take_turns(in_turns, clock, 3 if quick else 20, budget)
        for timing in ready.values():
            timing.samples = timing.samples or [timing.taken]
        words = sum(len(reply.words) for reply in ours)
        for row in rows:
            if row["strategy"] == strategy and row["form"] in ready:
                timing = ready[row["form"]]
                row |= {"threads": timing.threads, "seconds": timing.median, "quartiles_s": list(timing.quartiles),
                        "rounds": len(timing.samples), "replies_a_second": dialogues / timing.median,
                        "words_a_second": (words + dialogues) / timing.median}
        for row in rows:
            if row["strategy"] == strategy:
                row |= {"mean_words": words / dialogues, "distinct": len({reply.words for reply in ours})}
    return {"batch_size": size, "dialogues": dialogues, "rows": rows, "cores_busy_with_others": busy}


def bench(store: str | None, run: str | None, sizes: Sequence[str], quick: bool, out: Path, tell: Callable[[str, int, int], None],
          budget: float = 30.0, device: str = "cpu") -> tuple[list[str], list[Path]]:
    """Measure decoding with the best weights of ``run`` on the test set of ``store``; ``sizes``: of batches, default 32.

    Returns:
        A line for each batch size and strategy, and the files written.

    Raises:
        ConfigError: no store or run, or a size that is no number. CaseFastError: our own replies were wrong.
    """
    if not store or not run:
        raise ConfigError("bench decode measures a trained model on real dialogues: give --store STORE and --run RUN")
    if wrong := [size for size in sizes if not size.isdigit() or not int(size)]:
        raise ConfigError(f"the sizes of bench decode are numbers of dialogues, such as 16,32; {wrong[0]!r} is none")
    model, _ = load_model(run, device)
    opened, threads = open_store(store), torch.get_num_threads()
    found = {"benchmark": "decode", "quick": quick, "environment": report.environment("cross_attention", device),
             "model": {"parameters": sum(p.numel() for p in model.parameters()), "config": model.config.as_dict()}, "cases": []}
    paths: list[Path] = []
    try:
        for size in map(int, sizes or ["4" if quick else "32"]):
            found["cases"].append(measure(model, opened, size, quick, budget, tell))
            paths = tables.write(found, out)
    except WrongResult as error:
        raise CaseFastError(f"our own replies are wrong, the benchmark stops: {error}") from error
    finally:
        torch.set_num_threads(threads)
    return tables.lines(found), paths
