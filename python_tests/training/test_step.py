"""The forms of a training step: eager, and padded, which is what a CUDA graph captures, launched op by op on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ALL_SETTINGS, PRINTED, tiny_config, tiny_model
from training_helpers import PHASE_1, MemoryStore, interrupt_at, outcome, records, run, tiny_run

from case_fast.errors import ConfigError
from case_fast.training import NotFinite
from case_fast.training import step as forms
from case_fast.training.checkpoint import Checkpoints

STILL = tiny_config(num_negatives=2)  # no dropout: its draws follow a row's place, which filling up changes


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


def curve(store: MemoryStore, out: Path, **changes: object) -> list[dict[str, float]]:
    """The numbers of the log, each a mean over 5 steps."""
    run(store, out, tiny_run(**{"log_every": 5, "phase1_steps": 25, "max_steps": 25, "warmup": 400, "checkpoint_every": 99,
                                "validate_every": 25} | changes))
    return [record["losses"] | record["diagnostics"] | {"loss": record["loss"], "norm": record["grad_norm"]}
            for record in records(out, "step")]


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return Checkpoints(out / "checkpoints").read(step).tensors["model"]


@pytest.mark.parametrize("changes", [PRINTED, ALL_SETTINGS], ids=["printed", "all settings"])
def test_losses_of_fifty_steps_are_those_of_the_eager_step(store, tmp_path, changes):
    model = replace(STILL, **changes)
    eager, padded = (curve(store, tmp_path / form, model=model, step=form) for form in ("eager", "padded"))
    assert len(eager) == len(padded) == 10
    for one, other in zip(eager, padded, strict=True):
        # gradients through scores that are standardized over four dialogues magnify rounding: 3e-4 of the norm after 50 steps
        assert one.pop("norm") == pytest.approx(other.pop("norm"), rel=2e-3)
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    ends = [weights(tmp_path / name, 50) for name in ("eager", "padded")]
    assert torch.equal(ends[0]["word_counts"], ends[1]["word_counts"])


def test_with_dropout_their_means_over_seeds_agree(store, tmp_path):
    """A seed's last loss is off by some 5 % of it: of 20 seeds the means were apart by 0.15 %, of these six by 2 %."""
    ends = {form: [curve(store, tmp_path / f"{form}{seed}", step=form, seed=seed, warmup=50)[-1]["loss"] for seed in range(6)]
            for form in ("eager", "padded")}
    means = [sum(values) / len(values) for values in ends.values()]
    assert means[0] == pytest.approx(means[1], rel=0.03) and ends["eager"] != ends["padded"]


def test_auto_is_eager_on_the_cpu_and_captured_is_refused_there(store, tmp_path):
    run(store, tmp_path / "auto", tiny_run())
    run(store, tmp_path / "eager", tiny_run(step="eager"))
    assert outcome(tmp_path / "auto") == outcome(tmp_path / "eager")
    with pytest.raises(ConfigError, match="step captured: CUDA graphs need a GPU, and this run is on cpu. Set step to eager or"):
        run(store, tmp_path / "captured", tiny_run(step="captured"))
    with pytest.raises(ConfigError, match="step must be one of auto, eager, captured, padded, not 'graph'"):
        tiny_run(step="graph")


def test_a_gpu_on_which_ops_run_in_plain_torch_is_named(monkeypatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")
    assert "packed_attention and cross_attention" in forms._obstacle(tiny_model(), torch.device("cuda"))


@pytest.mark.parametrize("stop", [2, 4, 6, 9])
def test_a_padded_run_resumes_bit_for_bit(store, tmp_path, stop):
    """Stopped within an interval of the log, at the end of a phase, and at a checkpoint."""
    config = tiny_run(step="padded", log_every=4)
    run(store, tmp_path / "whole", config)
    interrupt_at(store, tmp_path / "run", stop, config)
    run(store, tmp_path / "run", config, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_run_may_go_on_in_another_form(store, tmp_path):
    """The state is exactly that of the checkpoint; what follows is the other form's."""
    run(store, tmp_path / "eager", tiny_run(model=STILL, step="eager", warmup=400))
    for first, then in (("eager", "padded"), ("padded", "eager")):
        out = tmp_path / first
        interrupt_at(store, out / "run", 6, tiny_run(model=STILL, step=first, warmup=400))
        (out / "run" / "log.jsonl").rename(out / "before.jsonl")
        run(store, out / "run", tiny_run(model=STILL, step=then, warmup=400), resume=True)
        for name, x in weights(out / "run", 13).items():
            torch.testing.assert_close(x, weights(tmp_path / "eager", 13)[name], rtol=1e-4, atol=1e-5)


def test_the_log_is_that_of_every_step(store, tmp_path):
    run(store, tmp_path / "run", tiny_run(step="padded"))
    assert [(record["step"], record["phase"]) for record in records(tmp_path / "run", "step")] == [
        (2, 1), (4, 1), (6, 2), (8, 2), (10, 2), (12, 2)]
    assert all(record["examples_per_second"] > 0 for record in records(tmp_path / "run", "step"))


@pytest.mark.parametrize("step", [2, PHASE_1 + 1, 11])
@pytest.mark.parametrize("lasting", [True, False])
def test_a_step_that_is_not_finite_is_named_within_an_interval_and_changes_nothing(tmp_path, monkeypatch, step, lasting):
    """Whether the batch is bad when it is examined, or was bad once."""
    store, sampler = MemoryStore(), forms.Sampler(22, 4, 0)
    met = []

    def poison(split, indices, batch):
        if split == "train" and indices == sampler.indices(step - 1) and int(batch.seed) == forms.step_seed(0, step - 1):
            met.append(indices)
            made = len(met) - (step <= sampler.steps_per_epoch)  # those of the first epoch are measured before
            if made == 1 or (made > 1 and lasting):
                batch.concept.intensity[0] = float("nan")
        return batch

    before = []
    real = forms.PaddedStep.take

    def take(self, prepared, lr):
        if len(before) < step:
            before.append({name: x.clone() for name, x in self.model.state_dict().items()})
        real(self, prepared, lr)

    monkeypatch.setattr(forms.PaddedStep, "take", take)
    ended = []
    monkeypatch.setattr(forms.PaddedStep, "examine", lambda self, make, examine=forms.PaddedStep.examine: (
        ended.append({name: x.clone() for name, x in self.model.state_dict().items()}), examine(self, make)))
    store.on_batch = poison
    with pytest.raises(NotFinite, match=rf"step {step}: loss nan; nothing was changed by this step. .*step-{step:08d}.json"):
        run(store, tmp_path / "run", tiny_run(step="padded", log_every=4, checkpoint_every=100, validate_every=100))
    assert all(torch.equal(x, before[step - 1][name]) for name, x in ended[0].items())
    dump = json.loads((tmp_path / "run" / "failure" / f"step-{step:08d}.json").read_text())
    assert dump["indices"] == sampler.indices(step - 1) and dump["losses"]["bow"] == "nan" and dump["step"] == step
    assert dump["phase"] == (1 if step <= PHASE_1 else 2)
    assert bool(dump["parameters_with_bad_gradients"]) == lasting


def test_no_checkpoint_and_no_validation_is_of_a_step_that_was_not_finite(tmp_path):
    store, sampler = MemoryStore(), forms.Sampler(22, 4, 0)

    def poison(split, indices, batch):
        if split == "train" and indices == sampler.indices(5) and int(batch.seed) == forms.step_seed(0, 5):
            batch.concept.intensity[:] = float("nan")
        return batch

    store.on_batch = poison
    with pytest.raises(NotFinite, match="step 6: loss nan"):
        run(store, tmp_path / "run", tiny_run(step="padded", log_every=50, checkpoint_every=3))
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3]
    assert not records(tmp_path / "run", "validation")


def test_a_batch_beyond_every_capacity_is_taken_as_it_is(store, tmp_path, monkeypatch):
    small = []

    def capacities(batches, longest):
        found = forms_capacities(batches, longest)
        small.append([replace(size, target=32) for size in found[:1]])
        return small[-1]

    forms_capacities = forms.capacities
    monkeypatch.setattr(forms, "capacities", capacities)
    places = []
    real = forms.PaddedStep.take

    def take(self, prepared, lr):
        places.append(prepared.place)
        real(self, prepared, lr)

    monkeypatch.setattr(forms.PaddedStep, "take", take)
    run(store, tmp_path / "mixed", tiny_run(step="padded", model=STILL, warmup=400))
    assert {-1, 0} == set(places)
    run(store, tmp_path / "eager", tiny_run(step="eager", model=STILL, warmup=400))
    for name, x in weights(tmp_path / "mixed", 13).items():
        torch.testing.assert_close(x, weights(tmp_path / "eager", 13)[name], rtol=1e-4, atol=1e-5)


def test_clipping_is_the_same(store, tmp_path):
    ends = []
    for form in ("eager", "padded"):
        run(store, tmp_path / form, tiny_run(step=form, model=STILL, warmup=400, clip_norm=0.5))
        ends.append(weights(tmp_path / form, 13))
    assert all(torch.allclose(x, ends[1][name], rtol=1e-4, atol=1e-5) for name, x in ends[0].items())

