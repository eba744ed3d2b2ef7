"""`case-fast debug`: a step that was not finite is found again, with the op, the word, the dialogue and what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from training_helpers import PHASE_1, MemoryStore, run, tiny_run

from case_fast import cli, equations, ops
from case_fast.errors import CheckpointError, DataError
from case_fast.training import NotFinite, loop
from case_fast.training.debug import _Debugger as debugger
from case_fast.training.debug import debug
from case_fast.training.debugged import Debugged
from case_fast.training.trace import Trace

STEP = 9  # of the dump: the checkpoint before it is of step 6


def poisoned(change) -> object:
    """A training step before which the model is changed, where it makes `STEP`."""
    real = loop.Trainer.train_step

    def train_step(self) -> None:
        if self.step == STEP - 1:
            with torch.no_grad():
                change(self)
        real(self)

    return train_step


def fail(out: Path, change, store: MemoryStore | None = None) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", poisoned(change))
        with pytest.raises(NotFinite, match=f"step {STEP}: .* case-fast debug "):
            run(store or MemoryStore(), out)
    return out / "failure" / f"step-{STEP:08d}.json"


@pytest.fixture(scope="module")
def word(tmp_path_factory) -> Path:
    """A run that failed since the embedding of a word became NaN; read only."""

    def change(trainer) -> None:
        trainer.model.embedding.weight[said_first(trainer.store, trainer.sampler.indices(STEP - 1)), 3] = torch.nan

    return fail(tmp_path_factory.mktemp("word") / "run", change)


@pytest.fixture(scope="module")
def found(word) -> Debugged:
    return debug(word, MemoryStore())


def said_first(store: MemoryStore, indices: list[int]) -> int:
    """The first word of the reply of the first of these examples."""
    return int(store.batch("train", indices).target[0])


def with_word(store: MemoryStore, indices: list[int], word: int) -> list[int]:
    """Which of these examples have the word in their context, reply, concepts or texts."""
    found = []
    for index in indices:
        batch = store.batch("train", [index])
        parts = (batch.context, batch.target, batch.decoder_input, batch.concept.word, batch.case.text, batch.case.reaction)
        found += [index] if any((part == word).any() for part in parts) else []
    return found


def test_a_bad_weight_is_found_with_its_word_its_dialogues_and_a_sound_checkpoint(word, found):
    store, facts = MemoryStore(), json.loads(word.read_text())
    bad = said_first(store, facts["indices"])
    assert (found.step, found.split, found.indices, found.exact) == (STEP, "train", facts["indices"], True)
    assert [(each.name, each.bad, each.rows) for each in found.bad_weights] == [("embedding.weight", 1, (bad,))]
    assert found.words == [store.featurizer.vocabulary.words[bad]] and not found.bad_inputs
    assert [each.variant.said for each in found.replays] == [
        "kernels float32", "kernels float64", "reference float32", "reference float64"]
    for each in found.replays:
        assert "loss" in each.bad_losses and "embedding.weight" in each.bad_gradients
        (given,) = [x for x in each.origin.inputs if x.name == "embedding.weight"]
        assert given.rows == (bad,) and given.least < 0 < given.greatest and not each.origin.backward
        assert ".py:" in each.origin.line and each.origin.output.bad > 0
    assert {name for name, value in facts["losses"].items() if value == "nan"} == set(found.replays[0].bad_losses)
    assert found.alone and set(with_word(store, found.indices, bad)) <= set(found.alone) <= set(found.indices)
    assert found.checkpoint == 6 and not found.bad_in_checkpoint
    assert "those of the checkpoint of step 6 are" in found.verdict and found.remedy.endswith("--resume")


def test_the_replay_is_the_step_bit_for_bit(tmp_path):
    """Losses that are finite, as a gradient alone is bad, are those of training to the last digit; it does not happen again."""

    def change(trainer) -> None:
        trainer.model.fusion.weight.register_hook(lambda gradient: gradient * torch.inf)

    dump = fail(tmp_path / "run", change)
    then = json.loads(dump.read_text())["losses"]
    found = debug(dump, MemoryStore())
    assert found.replays[0].losses == then and found.again is None and not found.alone
    for each in found.replays[1:]:
        assert each.losses == pytest.approx(then, rel=1e-4)
    assert found.verdict.startswith("it does not happen again: ") and found.remedy.endswith("--resume")


def test_without_the_weights_of_the_dump_they_are_trained_again_bit_for_bit(word, tmp_path):
    out = shutil.copytree(word.parent.parent, tmp_path / "run")
    dump = out / "failure" / word.name
    (sound, _, _), found = weights_of(dump), {}
    dump.with_suffix(".safetensors").unlink()
    found["near"] = weights_of(dump)
    assert found["near"][1:] == (f"trained again for 2 steps from the checkpoint of step 6 ({unreadable(dump)})", True)
    far, said, exact = weights_of(dump, forward=1)
    assert not exact and said.startswith("the checkpoint of step 6, 2 steps before the one that failed (") and "--forward" in said
    assert far["output.weight"].isfinite().all() and not torch.equal(far["output.weight"], sound["output.weight"])
    shutil.rmtree(out / "checkpoints")
    found["start"] = weights_of(dump)
    assert found["start"][1].startswith("trained again for 8 steps from the start of the run") and found["start"][2]
    for weights, _, _ in found.values():  # all but the number that a fault of the machine, say, had put in
        differ = {name: int((x != weights[name]).sum()) for name, x in sound.items() if not torch.equal(x, weights[name])}
        assert differ == {"embedding.weight": 1}
    with pytest.raises(CheckpointError, match="no weights to replay it with: .* no checkpoint before it is sound"):
        weights_of(dump, forward=3)


def weights_of(dump: Path, forward: int = 500) -> tuple[dict, str, bool]:
    return debugger(dump, MemoryStore(), "cpu", forward)._weights()


def unreadable(dump: Path) -> str:
    return f"{dump.with_suffix('.safetensors').name} cannot be read (No such file or directory)"


def test_a_bad_input_is_found_with_its_word_and_dialogue(tmp_path):
    """In the last step of phase 1, which has another loss."""
    store, seen, step = MemoryStore(), [], PHASE_1

    def poison(split, indices, batch):
        if split == "train":
            seen.append(indices)
            bad = seen[step - 1][1] if len(seen) >= step else None
            if bad in indices:
                place = int(batch.concept.graph.cu_vertices[indices.index(bad)])
                batch.concept.intensity[place] = torch.nan
        return batch

    store.on_batch = poison
    with pytest.raises(NotFinite):
        run(store, tmp_path / "run")
    found = debug(tmp_path / "run" / "failure" / f"step-{step:08d}.json", store)
    assert found.indices == seen[step - 1] and found.alone == [found.indices[1]]
    assert [(each.name, each.bad) for each in found.bad_inputs] == [("concept.intensity", 1)] and not found.bad_weights
    assert len(found.words) == 1 and f"dialogue {found.indices[1]})" in found.words[0]
    assert found.remedy == "case-fast doctor memory.store" and found.phase == "bow"


def test_what_is_too_large_for_float32_alone_is_said(tmp_path):
    def change(trainer) -> None:
        trainer.model.output.weight.mul_(1e25)
        trainer.model.output.bias.fill_(1e20)
        trainer.model.embedding.weight.mul_(1e25)

    found = debug(fail(tmp_path / "run", change), MemoryStore())
    finite = {each.variant.said: each.finite for each in found.replays}
    assert not finite["kernels float32"] and not finite["reference float32"] and finite["reference float64"]
    assert "float32 is too narrow" in found.verdict and "--lr_scale 0.5" in found.remedy
    assert found.largest_weight.greatest > 1e20 and not found.bad_weights
    origin = found.again.origin
    assert all(not each.bad for each in origin.inputs) and max(each.greatest for each in origin.inputs) > 1e15


def test_what_the_kernels_alone_do_is_a_fault_of_ours(tmp_path, monkeypatch):
    """A kernel that gives NaN: the loss over words is wrong, the same in plain torch is not."""
    real = ops.linear_cross_entropy

    def wrong(*arguments, **named):
        found = real(*arguments, **named)
        return found if os.environ.get("CASE_FAST_BACKEND") == "reference" else (found[0] * torch.nan, *found[1:])

    monkeypatch.setattr(ops, "linear_cross_entropy", wrong)
    store = MemoryStore()
    with pytest.raises(NotFinite):
        run(store, tmp_path / "run", tiny_run(phase1_steps=0))
    found = debug(tmp_path / "run" / "failure" / "step-00000001.json", store)
    assert [each.finite for each in found.replays] == [False, False, True, True]
    assert "generation" in found.again.bad_losses and found.again.origin.op == "aten::mul"
    assert "kernels alone" in found.verdict and found.remedy.startswith("CASE_FAST_BACKEND=reference case-fast train ")
    assert found.checkpoint is None


def test_a_validation_is_replayed_without_gradients(tmp_path):
    store = MemoryStore()

    def poison(split, indices, batch):
        if split == "valid" and 3 in indices:
            place = int(batch.concept.graph.cu_vertices[indices.index(3)])
            batch.concept.intensity[place] = torch.nan
        return batch

    store.on_batch = poison
    with pytest.raises(NotFinite, match="case-fast debug"):
        run(store, tmp_path / "run")
    found = debug(tmp_path / "run" / "failure" / "step-00000007.json", store)
    assert found.split == "valid" and found.exact and found.alone == [3] and "generation" in found.again.bad_losses


def test_a_mask_of_minus_infinity_is_no_origin():
    model, x = torch.nn.Linear(3, 3), torch.ones(2, 3)

    with Trace(model, {"x": x}) as trace:
        score = model(x).masked_fill(torch.eye(3)[:2] > 0, -torch.inf).softmax(-1)
        loss = (score.sum() - 2).abs().sqrt().sum() / 0
        loss = loss - loss
    assert trace.origin([loss]).op == "aten::div" and trace.origin([score]) is None


def test_a_gradient_that_is_bad_behind_a_finite_loss_has_its_line():
    """sqrt at 0: the loss is finite, its gradient is not."""
    x = torch.zeros(3, requires_grad=True)
    with Trace(torch.nn.Identity(), {"x": x}) as trace:
        equations.full_precision(x).sqrt().sum().backward()
    origin = trace.origin([x.grad])
    assert origin.backward and origin.op == "aten::div" and origin.output.bad == 3


# ---- the command


def test_the_command_says_it_all_in_lines_or_json(word, found, capsys, monkeypatch):
    monkeypatch.setattr("case_fast.training.debug.open_store", lambda path: MemoryStore())
    assert cli.main(["debug", str(word), "--json", "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["exact"] is True and said["replays"][0]["origin"]["inputs"] and said["replays"][0]["losses"]["loss"] == "nan"
    assert said["verdict"] == found.verdict and said["alone"] == found.alone
    monkeypatch.setattr("case_fast.training.debug.debug", lambda *_: found)
    assert cli.main(["debug", str(word)]) == 0
    said = capsys.readouterr().out
    for part in (f"step {STEP}", "the dump holds them", "not finite: embedding.weight", "kernels float32    again: losses",
                 "reference float64", "first in", "make it alone", "next               case-fast train --config "):
        assert part in said, part


@pytest.mark.parametrize(("content", "said"), [
    (None, "dump not found"), ("{", "damaged|no JSON|not"), ("[]", "no dump of a step"), ('{"step": 3}', "no dump of a step"),
    ('{"step": 3, "split": "train", "phase": 1}', "is not its run: there are no settings"),
])
def test_what_is_no_dump_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "run" / "failure" / "step-00000003.json"
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=said):
        debug(path, MemoryStore())


def test_another_store_and_weights_that_are_damaged_are_named(word, tmp_path):
    with pytest.raises(DataError, match="the run was trained on another store, .* Give that one with --data"):
        debug(word, MemoryStore(seed=1))
    copy = shutil.copytree(word.parent.parent, tmp_path / "run")
    weights = copy / "failure" / word.with_suffix(".safetensors").name
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "is damaged" in weights_of(copy / "failure" / word.name)[1]
