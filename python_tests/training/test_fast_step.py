"""The fast step and the plain one: training on the kernels gives what training in plain torch gives, by any number of threads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from helpers import ALL_SETTINGS, PRINTED, as_double, random_batch, seeded, tiny_config, tiny_model
from op_checks import by_threads
from torch import nn
from training_helpers import PHASE_1, PHASE_2, MemoryStore, records, run, tiny_run

from case_fast.models import CASE, CASEConfig
from case_fast.training.step import total_norm

T = TypeVar("T")


def on(backend: str, function: Callable[[], T]) -> T:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASE_FAST_BACKEND", backend)
        return function()


def curve(dropout: float, steps: int, changes: dict) -> dict[str, list[float]]:
    """Every loss of some steps of each phase, in float64: there, two equal computations stay together for long."""
    drop = {"encoder_dropout": dropout, "decoder_dropout": dropout, "graph_dropout": dropout}
    model = tiny_model(num_negatives=2, **drop, **changes).double().train()
    found: dict[str, list[float]] = {}
    for phase in CASE.phases:
        model.set_phase(phase)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for step in range(steps):
            output = model(seeded(as_double(random_batch(5, step % 7)), step))
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, loss in output.losses.items():
                found.setdefault(f"{phase} {name}", []).append(loss.item())
    return found


@pytest.mark.parametrize("dropout, steps, changes", [(0.0, 50, PRINTED), (0.2, 10, PRINTED), (0.2, 10, ALL_SETTINGS)])
def test_the_kernels_learn_as_plain_torch_does(dropout, steps, changes):
    """With dropout too: what is dropped is a function of the step's seed and the place, on every backend."""
    fast, plain = (on(backend, lambda: curve(dropout, steps, changes)) for backend in ("native", "reference"))
    assert fast.keys() == plain.keys() and len(fast) == 8
    for name in fast:
        assert fast[name] == pytest.approx(plain[name], rel=1e-7), name
        assert len(fast[name]) == steps
    if steps == 50:
        assert sum(fast["all generation"][-5:]) < sum(fast["all generation"][:5])


def test_a_run_begun_in_plain_torch_goes_on_with_the_kernels(tmp_path):
    """Nothing of a backend is in a checkpoint, and no random state: float32 for a dozen steps, of which the last were resumed. As
    printed: scores standardized over four dialogues magnify what two backends round otherwise."""
    model = tiny_config(graph_dropout=0.2, encoder_dropout=0.1, decoder_dropout=0.1, num_negatives=2, **PRINTED)
    store, config = MemoryStore(), tiny_run(model=model, log_every=1)
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    on("native", lambda: run(store, whole, config))
    on("reference", lambda: run(store, changed, replace(config, max_steps=3)))
    on("native", lambda: run(store, changed, config, resume=True))
    losses = [[record["loss"] for record in records(out, "step")] for out in (whole, changed)]
    assert len(losses[0]) == PHASE_1 + PHASE_2 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("phase, changes", [*((phase, PRINTED) for phase in CASE.phases), ("all", ALL_SETTINGS)])
def test_gradients_have_the_same_bits_for_any_number_of_threads(phase, changes):
    """At the paper's sizes and twice its batch, at which torch would share out its own loops."""
    torch.manual_seed(0)
    model = CASE(CASEConfig(vocab_size=3000, encoder_dropout=0.1, decoder_dropout=0.1, **changes))
    batch = random_batch(32)
    model.set_phase(phase)

    def digest() -> str:
        model.zero_grad()
        model(batch).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        bits = hashlib.sha256(total_norm(gradients).numpy().tobytes())
        for gradient in gradients:
            bits.update(gradient.numpy().tobytes())
        return bits.hexdigest()

    assert len(set(by_threads(digest))) == 1


def test_the_norm_of_the_gradients_is_torchs():
    gradients = [torch.randn(700, 300), torch.randn(300), torch.randn(()), torch.zeros(0, 5)]
    assert total_norm(gradients).item() == pytest.approx(nn.utils.get_total_norm(gradients).item(), rel=1e-6)
