"""The fast step and the plain one: training on the kernels gives what training in plain torch gives, by any number of threads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from helpers import random_batch, tiny_model
from torch import nn
from training_helpers import MemoryStore, records, run, tiny_run

from case_fast.models import CASE, CASEConfig
from case_fast.training.step import total_norm

STEPS = 50  # of each phase


def curve(store: MemoryStore, out: Path, backend: str, dropout: float = 0.0, resume: bool = False, steps: int = STEPS
          ) -> list[dict[str, float]]:
    """The losses of every step of a run on one backend."""
    model = tiny_model(encoder_dropout=dropout, decoder_dropout=dropout, graph_dropout=dropout).config
    config = tiny_run(model=model, phase1_steps=STEPS, max_steps=steps, min_steps=steps, log_every=1, validate_every=STEPS,
                      checkpoint_every=STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASE_FAST_BACKEND", backend)
        run(store, out, config, resume)
    return [{"loss": record["loss"], **record["losses"]} for record in records(out, "step")]


def assert_equal_curves(fast: list[dict[str, float]], plain: list[dict[str, float]]) -> None:
    """Up to what float32 sums in another order make of 100 steps: 2^-23 a sum, some hundred sums deep."""
    assert len(fast) == len(plain)
    for step, (ours, theirs) in enumerate(zip(fast, plain, strict=True)):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5), f"step {step + 1}"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_kernels_learn_as_plain_torch_does(tmp_path, dropout):
    """With dropout too: what is dropped is a function of the step's seed and the place, on every backend."""
    store = MemoryStore()
    fast, plain = (curve(store, tmp_path / backend, backend, dropout) for backend in ("native", "reference"))
    assert len(fast) == 2 * STEPS
    assert_equal_curves(fast, plain)


def test_a_run_begun_in_plain_torch_goes_on_with_the_kernels(tmp_path):
    """Nothing of a backend is in a checkpoint."""
    store = MemoryStore()
    whole = curve(store, tmp_path / "whole", "native", dropout=0.2)
    curve(store, tmp_path / "changed", "reference", dropout=0.2, steps=STEPS // 2)
    assert_equal_curves(curve(store, tmp_path / "changed", "native", dropout=0.2, resume=True), whole)


@pytest.mark.parametrize("phase", CASE.phases)
def test_gradients_have_the_same_bits_for_any_number_of_threads(phase):
    """At the paper's sizes, at which torch would share out its own loops."""
    torch.manual_seed(0)
    model, batch = CASE(CASEConfig(vocab_size=3000, encoder_dropout=0.1, decoder_dropout=0.1)), random_batch(64)
    model.set_phase(phase)
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            model.zero_grad()
            model(batch).loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            bits = hashlib.sha256(total_norm(gradients).numpy().tobytes())
            for gradient in gradients:
                bits.update(gradient.numpy().tobytes())
            found.add(bits.hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_the_norm_of_the_gradients_is_torchs():
    gradients = [torch.randn(700, 300), torch.randn(300), torch.randn(()), torch.zeros(0, 5)]
    assert total_norm(gradients).item() == pytest.approx(nn.utils.get_total_norm(gradients).item(), rel=1e-6)
