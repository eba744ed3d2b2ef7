"""One form of the model on one case, in a process of its own: checked numbers first, then steps timed, then what memory it took.

`python -m benchmarks.step.worker` reads a request (JSON) and prints its answer, the last line. Every form starts from the same
weights on the same batches. What is timed is forward, backward, Adam and clearing the gradients; batches are made before.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step.batches import Choice, examples_of, indices_of
from benchmarks.step.plain_case import LENGTHS, collate, plain_of
from case_fast.data import Store, open_store
from case_fast.data.pack import make_batch
from case_fast.memory import keep_freed_memory
from case_fast.models import CASE, CASEConfig

OURS, PLAIN, COMPILED = "case_fast", "plain, eager", "plain, torch.compile"
LEAST = 5  # samples of a step, two where a step takes more than a second
MOST = 60

Losses = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


def model_of(choice: Choice, phase: str, dropout: bool) -> CASE:
    """The paper's model from seed 0, in training."""
    torch.manual_seed(0)
    usual = CASEConfig(vocab_size=choice.words, **CASEConfig.printed)
    model = CASE(usual if dropout else replace(usual, graph_dropout=0.0)).train()
    model.set_phase(phase)
    return model


def form_of(form: str, model: CASE) -> tuple[nn.Module, Losses]:
    """The module whose parameters are trained, and what gives the losses of a batch."""
    if form == OURS:
        def losses(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            output = model(batch)
            return output.loss, output.losses

        return model, losses
    plain = plain_of(model)
    return plain, torch.compile(plain, dynamic=False) if form == COMPILED else plain


def batches_of(form: str, store: Store, choice: Choice) -> list[Any]:
    """Packed for ours; padded for the plain form, under torch.compile to one shape, so that it compiles once."""
    made, texts = examples_of(store, choice)
    if form == OURS:
        return [make_batch(examples, texts, CASE.needs, seed) for seed, examples in enumerate(made)]
    batches = [collate(examples, texts) for examples in made]
    if form == COMPILED:
        most = {name: max(batch.lengths[name] for batch in batches) for name in LENGTHS}
        batches = [collate(examples, texts, most) for examples in made]
    return batches


def fingerprint(module: nn.Module, losses_of: Losses, batch: Any) -> dict[str, Any]:
    """Losses of a batch, and of each parameter's gradient its norm and its product with random numbers."""
    loss, losses = losses_of(batch)
    loss.backward()
    gradients = {}
    for name, parameter in sorted(module.named_parameters()):
        if parameter.grad is not None:
            at_random = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            gradients[name] = [float(parameter.grad.norm()), float((parameter.grad * at_random).sum())]
    module.zero_grad()
    values = {"loss": loss, **losses}
    return {"losses": {name: float(value.detach()) for name, value in values.items()}, "gradients": gradients}


class Steps:
    """Training steps of one form, each on the next batch."""

    def __init__(self, module: nn.Module, losses_of: Losses, batches: Sequence[Any], fused: bool = True):
        self.losses_of, self.batches, self.place = losses_of, batches, 0
        parameters = [p for p in module.parameters() if p.requires_grad]
        # As training has it; the learning rate is that of a step in the middle of the warm-up.
        self.optimizer = torch.optim.Adam(parameters, lr=2e-4, betas=(0.9, 0.98), eps=1e-9, fused=fused, foreach=not fused)

    def __call__(self) -> list[float]:
        """Seconds of forward, backward, Adam."""
        batch = self.batches[self.place % len(self.batches)]
        self.place += 1
        moments = [time.perf_counter()]
        loss, _ = self.losses_of(batch)
        moments.append(time.perf_counter())
        loss.backward()
        moments.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        moments.append(time.perf_counter())
        return [after - before for before, after in zip(moments, moments[1:], strict=False)]


def timed(steps: Steps, seconds: float, least: int = LEAST) -> list[list[float]]:
    """Samples for so many seconds, at least ``least`` (2 where a step takes more than a second)."""
    samples: list[list[float]] = []
    until = time.perf_counter() + seconds
    while len(samples) < MOST:
        samples.append(steps())
        slow = sum(samples[0]) > 1
        if time.perf_counter() > until and len(samples) >= (min(least, 2) if slow else least):
            break
    return samples


def best_threads(steps: Steps, counts: Sequence[int], seconds: float) -> int:
    """The fastest number; of steps that take more than a second one sample decides."""
    found = {}
    for threads in counts:
        torch.set_num_threads(threads)
        once = sum(steps())
        found[threads] = once if once > 1 else statistics.median(map(sum, timed(steps, seconds, 3)))
    return min(found, key=found.__getitem__)


def best_optimizer(module: nn.Module, losses_of: Losses, batches: Sequence[Any]) -> tuple[Steps, str]:
    """The faster of Adam's fused and foreach forms for the plain form."""
    losses_of(batches[0])[0].backward()
    found = {}
    for name in ("fused", "foreach"):
        steps, taken = Steps(module, losses_of, batches, name == "fused"), []
        for _ in range(4):
            started = time.perf_counter()
            steps.optimizer.step()
            taken.append(time.perf_counter() - started)
        found[name] = min(taken), steps
    module.zero_grad()
    name = min(found, key=lambda name: found[name][0])
    return found[name][1], name


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a request measures: {"form", "phase", "store", "choice", "seconds", "threads"}."""
    keep_freed_memory()  # every form has it, as `case-fast train` does
    form, phase, seconds, choice = request["form"], request["phase"], request["seconds"], Choice(**request["choice"])
    store = open_store(request["store"])
    counts = request["threads"]
    torch.set_num_threads(counts[-1])
    batches = batches_of(form, store, choice)
    found: dict[str, Any] = {"form": form}

    module, losses_of = form_of(form, model_of(choice, phase, dropout=False))
    started = time.perf_counter()
    found |= fingerprint(module, losses_of, batches[0])
    if form == COMPILED:  # what is timed is what was checked, without dropout; compiled once, for all threads
        found["compile_s"], counts = time.perf_counter() - started, counts[-1:]
    else:
        del module, losses_of
        module, losses_of = form_of(form, model_of(choice, phase, dropout=True))
    if form == OURS:
        steps, found["adam"] = Steps(module, losses_of, batches), "fused"
    else:
        steps, found["adam"] = best_optimizer(module, losses_of, batches)
    steps()
    found["threads"] = best_threads(steps, counts, seconds / 4) if len(counts) > 1 else counts[0]
    torch.set_num_threads(found["threads"])
    steps()
    samples = timed(steps, seconds)
    found["samples_ms"] = [1e3 * sum(sample) for sample in samples]
    found |= {name: 1e3 * statistics.median(part) for name, part in
              zip(("forward_ms", "backward_ms", "adam_ms"), zip(*samples, strict=True), strict=True)}
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if request.get("assembly"):
        found["assembly_ms"] = assembly(form, store, choice)
    if form != OURS:
        found["lengths"] = {name: statistics.mean(batch.lengths[name] for batch in batches) for name in LENGTHS}
    else:
        # of contexts and replies, as training counts them
        found["words"] = statistics.mean(b.context.numel() - b.size + b.target.numel() for b in batches)
    return found


def assembly(form: str, store: Store, choice: Choice) -> float:
    """Milliseconds to make a batch, the median: ours from the store; the plain form's from examples that lie in memory."""
    taken = []
    for batch in indices_of(store, choice):
        examples = [store.example("train", i) for i in batch]
        started = time.perf_counter()
        if form == OURS:
            store.batch("train", batch, CASE.needs, seed=0)
        else:
            collate(examples, store.texts)
        taken.append(time.perf_counter() - started)
    return 1e3 * statistics.median(taken)


def main() -> None:
    request = json.load(sys.stdin)
    found = parts(request) if request.get("parts") else answer(request)
    print(json.dumps(found | {"pid": os.getpid()}), flush=True)


def parts(request: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.step.parts import measure

    keep_freed_memory()
    choice = Choice(**request["choice"])
    torch.set_num_threads(request["threads"][-1])
    store = open_store(request["store"])
    model = model_of(choice, request["phase"], dropout=True)
    module, losses_of = form_of(OURS, model)
    return measure(model, Steps(module, losses_of, batches_of(OURS, store, choice)), request["seconds"])


if __name__ == "__main__":
    main()
