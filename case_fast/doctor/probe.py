"""How fast this machine is at the next step: as many steps of training, or replies, as a moment holds, and one at least."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from case_fast.data import Store
    from case_fast.models import DialogueModel
    from case_fast.training import TrainConfig

_BATCH = 16  # half of what `case-fast evaluate` takes at once, so that a look is enough for it


def training_steps(store: Store, config: TrainConfig, seconds: float) -> dict[str, float]:
    """Seconds of a step of each phase, on the batches that training begins with; nothing is written.

    The phases share ``seconds``, though each has a step. The first step, which makes the optimizer's state, counts only where
    there is no time for another. Steps are launched op by op, also where training would replay them from a CUDA graph.
    """
    from case_fast.devices import resolve_device
    from case_fast.models import model_class
    from case_fast.training.process import matmul_precision, reproducible
    from case_fast.training.sampler import Sampler, step_seed
    from case_fast.training.step import make_step

    device = resolve_device(config.device)
    config = replace(config.resolved(len(store.featurizer.vocabulary)), step="eager")
    sampler = Sampler(store.size("train"), config.batch_size, config.seed)
    found: dict[str, float] = {}
    with reproducible(config.seed, config.deterministic, device), matmul_precision(config.matmul_precision):
        model = model_class(config.model.kind)(config.model).to(device).train()
        form = make_step(store, sampler, model, config, device)
        for phase in model.phases:
            model.set_phase(phase)
            times = []
            for step in _until(seconds / len(model.phases)):
                started = time.perf_counter()
                model.set_turn(step)
                batch = store.batch("train", sampler.indices(step), model.needs, step_seed(config.seed, step))
                form.take(form.prepared(batch), 1e-4)
                form.collect()
                times.append(time.perf_counter() - started)
            times = times[1:] or times
            found[phase] = sum(times) / len(times)
    return found


def evaluation_seconds(model: DialogueModel, store: Store, split: str, seconds: float) -> float:
    """Seconds that evaluating a split takes on the CPU, by batches from all over it: references, and a greedy reply to each."""
    from case_fast.generation import generate_all
    from case_fast.references import read_references

    size, started, done = store.size(split), time.perf_counter(), 0
    for number in _until(seconds):
        first = number * 7919 % max(1, size - _BATCH)  # a prime, so that they do not lie side by side
        indices = range(first, min(first + _BATCH, size))
        read_references(model, [store.batch(split, indices, model.needs, 0)])
        generate_all(model, store, split, indices)
        done += len(indices)
    return (time.perf_counter() - started) * size / max(1, done)


def _until(seconds: float) -> Iterator[int]:
    """0, 1, ... until another one, if it takes as long as the last, would end after so many; 0 always."""
    now = time.perf_counter()
    until, number, last = now + seconds, 0, 0.0
    while number == 0 or now + last < until:
        yield number
        number, before, now = number + 1, now, time.perf_counter()
        last = now - before


def in_words(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:,.0f} {unit}"
    return f"{max(1, round(seconds))} s"
