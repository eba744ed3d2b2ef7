"""The captured step on a GPU: the numbers of the padded step bit for bit, those of the eager step within rounding."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import gpu
import pytest
import torch
from helpers import tiny_config
from training_helpers import MemoryStore, interrupt_at, records, run, tiny_run

from case_fast.training import NotFinite, TrainConfig
from case_fast.training import step as forms
from case_fast.training.checkpoint import Checkpoints

pytestmark = [gpu.NEEDS["native"], gpu.NEEDS["triton"]]
STILL = tiny_config(num_negatives=2)  # no dropout
STEPS = 12  # of each phase: of every capacity some are launched, one is captured, others are replayed
LAST = 2 * STEPS


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


def config(form: str, **changes: object) -> TrainConfig:
    settings = {"step": form, "device": gpu.DEVICE, "model": STILL, "warmup": 400, "log_every": 3, "phase1_steps": STEPS,
                "max_steps": STEPS}
    return tiny_run(**settings | changes)


def ended(out: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(out / "checkpoints").read(LAST)
    return {f"{part}/{name}": x for part in ("model", "optimizer") for name, x in found.tensors[part].items()}


def losses(out: Path) -> list[dict[str, float]]:
    return [record["losses"] | record["diagnostics"] | {"norm": record["grad_norm"]} for record in records(out, "step")]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phase of each graph that is captured."""
    found: list[str] = []
    real = forms.CapturedStep._captured

    def captured(self, batch):
        graph = real(self, batch)
        found.append(self.model.phase)
        return graph

    monkeypatch.setattr(forms.CapturedStep, "_captured", captured)
    return found


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_captured_padded_and_eager_runs_agree(store, tmp_path, graphs, precision):
    for form in ("captured", "padded", "eager"):
        run(store, tmp_path / form, config(form, precision=precision))
    assert {"bow", "all"} <= set(graphs)
    captured, padded, eager = (ended(tmp_path / form) for form in ("captured", "padded", "eager"))
    assert all(torch.equal(x, padded[name]) for name, x in captured.items())
    assert losses(tmp_path / "captured") == losses(tmp_path / "padded")
    tolerance = 1e-3 if precision == "float32" else 5e-2
    for one, other in zip(losses(tmp_path / "captured"), losses(tmp_path / "eager"), strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)
    for name, x in captured.items():
        torch.testing.assert_close(x.double(), eager[name].double(), rtol=tolerance, atol=tolerance, msg=name)


def test_dropout_draws_anew_in_every_replay(store, tmp_path, graphs):
    """With the same dialogues, in another order, and the same weights."""
    dropping = tiny_config(graph_dropout=0.3, encoder_dropout=0.3, decoder_dropout=0.3)
    run(store, tmp_path / "run", config("captured", model=dropping, lr_scale=1e-12, batch_size=22, log_every=1))
    seen = [record["losses"]["bow"] for record in records(tmp_path / "run", "step")]
    assert graphs and all(abs(one - other) > 1e-5 for one, other in pairwise(seen))  # order alone changes less


@pytest.mark.parametrize("stop", [9, 17])
def test_a_captured_run_resumes_bit_for_bit(store, tmp_path, graphs, stop):
    run(store, tmp_path / "whole", config("captured"))
    interrupt_at(store, tmp_path / "run", stop, config("captured"))
    run(store, tmp_path / "run", config("captured"), resume=True)
    assert graphs
    whole, resumed = ended(tmp_path / "whole"), ended(tmp_path / "run")
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())


def test_a_step_that_is_not_finite_is_named(tmp_path):
    store, sampler = MemoryStore(), forms.Sampler(22, 4, 0)

    def poison(split, indices, batch):
        if split == "train" and indices == sampler.indices(10) and int(batch.seed) == forms.step_seed(0, 10):
            batch.concept.intensity[:] = float("nan")
        return batch

    store.on_batch = poison
    with pytest.raises(NotFinite, match="step 11: loss nan; nothing was changed"):
        run(store, tmp_path / "run", config("captured", log_every=4, checkpoint_every=3))
    assert all(x.isfinite().all() for x in Checkpoints(tmp_path / "run" / "checkpoints").newest().tensors["model"].values())


def test_a_step_between_two_collections_waits_for_nothing(store, tmp_path, monkeypatch):
    """torch's own check of what synchronises is on around every replay."""
    real = forms.CapturedStep.take

    def take(self, prepared, lr):
        replayed = self._graphs.get((prepared.place, self.model.phase)) is not None
        torch.cuda.set_sync_debug_mode("error" if replayed else "default")
        try:
            real(self, prepared, lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(forms.CapturedStep, "take", take)
    run(store, tmp_path / "run", config("captured"))
