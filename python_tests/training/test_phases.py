"""Phases of a model's own lengths, whose steps take turns: EmpDG with its discriminators, from its first step to its last."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_vocabulary
from safetensors.torch import load_file
from torch import Tensor
from training_helpers import MemoryStore, interrupt_at, outcome, records, run, tiny_run

from case_fast.models import build
from case_fast.training import TrainConfig
from case_fast.training.checkpoint import Checkpoints

GENERATOR, DISCRIMINATORS, ROUNDS = 6, 4, 3  # steps, steps, rounds of a step of L_D and two of L_G
LAST = GENERATOR + DISCRIMINATORS + 3 * ROUNDS


def config(kind: str = "empdg-d", **changes: object) -> TrainConfig:
    settings = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12, "attention_width": 8, "encoder_dropout": 0.1}
    if kind == "empdg-d":
        settings |= {"discriminator_steps": DISCRIMINATORS, "rounds": ROUNDS, "validate_rounds": 1, "generator_steps": 2}
    values = {"model": build(kind, **settings).config, "max_steps": GENERATOR, "checkpoint_every": 1, "keep_checkpoints": 99}
    return tiny_run(**values | changes)


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def whole(store: MemoryStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, with a checkpoint of every step."""
    out = tmp_path_factory.mktemp("phases") / "run"
    result = run(store, out, config())
    assert (result.steps, result.phase_1_steps, result.stopped) == (LAST, GENERATOR + DISCRIMINATORS, "max_steps")
    assert result.best_step > GENERATOR + DISCRIMINATORS
    return out


def weights(out: Path, step: int) -> dict[str, Tensor]:
    return Checkpoints(out / "checkpoints").read(step).tensors["model"]


def changed(out: Path, first: int, then: int) -> set[str]:
    """Which halves of the model differ between two steps."""
    before, after = weights(out, first), weights(out, then)
    return {"discriminators" if "critic" in name else "generator" for name, x in after.items() if not x.equal(before[name])}


def test_each_phase_and_turn_trains_its_half_of_the_model(whole):
    for first, then, half in ((1, GENERATOR - 1, "generator"), (GENERATOR, GENERATOR + DISCRIMINATORS, "discriminators")):
        assert changed(whole, first, then) == {half}
    for step in range(GENERATOR + DISCRIMINATORS, LAST):
        turn = "generator" if (step - GENERATOR - DISCRIMINATORS) % 3 else "discriminators"
        assert changed(whole, step, step + 1) == {turn}, step
    before, after = weights(whole, GENERATOR), weights(whole, GENERATOR + 1)
    moved = [(after[name] - x).abs().max().item() for name, x in before.items() if "critic" in name]
    assert max(moved) == pytest.approx(1e-4, rel=1e-3)  # the first step of Adam is as large as its rate, not as Noam's


def test_the_log_names_phases_and_losses(whole):
    assert [(record["phase"], record["step"], record["name"]) for record in records(whole, "phase")] == [
        (1, 0, "generator"), (2, GENERATOR, "discriminators"), (3, GENERATOR + DISCRIMINATORS, "interactive")]
    assert [(record["phase"], record["step"]) for record in records(whole, "validation")] == [
        (1, 3), (1, 6), *((3, GENERATOR + DISCRIMINATORS + 3 * place) for place in (1, 2, 3))]
    names = {record["step"]: set(record["losses"]) for record in records(whole, "step")}
    of_generator, of_critics = {"generation", "smoothed", "emotion"}, {"critic", "penalty"}
    assert names[2] == of_generator and names[8] == names[10] == of_critics
    assert names[12] == of_critics | of_generator | {"adversarial"} and names[16] == of_generator | {"adversarial"}
    assert records(whole, "validation")[-1]["losses"].keys() == {"generation", "emotion", "adversarial"}


def test_the_first_phase_is_empdgs_and_the_second_begins_with_its_best_weights(store, whole, tmp_path):
    run(store, tmp_path / "run", config("empdg"))
    plain, found = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run" / "best", whole / "best-generator"))
    assert all(found[name].equal(x) for name, x in plain.items())
    after = weights(whole, GENERATOR)
    assert after.keys() == found.keys() and all(after[name].equal(x) for name, x in found.items())


def test_best_is_that_of_the_last_phase_alone(whole):
    found = {record["step"]: record["ppl"] for record in records(whole, "validation") if record["phase"] == 3}
    end = records(whole, "end")[0]
    assert end["best"]["ppl"] == min(found.values()) == found[end["best_step"]]
    best = load_file(whole / "best" / "model.safetensors")
    assert all(best[name].equal(x) for name, x in weights(whole, end["best_step"]).items())


@pytest.mark.parametrize("stop", [4, GENERATOR, 8, GENERATOR + DISCRIMINATORS, 11, 12, 15, LAST])
def test_a_run_that_is_stopped_in_any_phase_resumes_bit_for_bit(store, whole, tmp_path, stop):
    """Within a phase, at its end, and between the turns of a round."""
    if stop == LAST:
        run(store, tmp_path / "run", config())
    else:
        interrupt_at(store, tmp_path / "run", stop, config(checkpoint_every=3))
    run(store, tmp_path / "run", config(checkpoint_every=3), resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)
    found, expected = ([[record[name] for name in ("phase", "step", "ppl", "losses", "best", "failures")]
                        for record in records(out, "validation")] for out in (tmp_path / "run", whole))
    assert found == expected


@pytest.mark.parametrize("step", [2, GENERATOR - 1, GENERATOR, GENERATOR + 1, LAST - 2])
def test_an_older_checkpoint_leads_to_the_same_end(store, whole, tmp_path, step):
    """The newer ones are lost, after best weights of later phases were written."""
    shutil.copytree(whole, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    for newer in checkpoints.steps():
        if newer > step:
            shutil.rmtree(checkpoints.path(newer))
    run(store, tmp_path / "run", config(), resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_the_padded_form_takes_turns_too(store, tmp_path):
    settings = config(step="padded", log_every=4)
    run(store, tmp_path / "whole", settings)
    interrupt_at(store, tmp_path / "run", 12, settings)
    run(store, tmp_path / "run", settings, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    still = replace(settings.model, encoder_dropout=0.0)  # whose draws follow a row's place, which filling up changes
    for form in ("padded", "eager"):
        run(store, tmp_path / form, config(step=form, model=still, warmup=400))
    eager = weights(tmp_path / "eager", LAST)
    for name, x in weights(tmp_path / "padded", LAST).items():
        torch.testing.assert_close(x, eager[name], rtol=1e-4, atol=1e-5)
