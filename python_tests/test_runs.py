"""The run folder: its layout, who may train in it, what is opened for use, and what is read of it for a report."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from copy import deepcopy as copy_of
from pathlib import Path

import pytest
import torch
from training_helpers import PHASE_1, PHASE_2, MemoryStore
from training_helpers import run as train_tiny

from case_fast.errors import CheckpointError, ConfigError
from case_fast.models import CASE, CASEConfig, load
from case_fast.runs import Record, Run, load_features, load_model, lookup
from case_fast.training.checkpoint import Checkpoints

STEPS = PHASE_1 + PHASE_2


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> Path:
    """A whole run; read only."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train_tiny(store, out)
    return out


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


# ---- the layout


def test_every_version_writes_the_same_files(trained):
    """Runs that were written before are opened by these names: a name that changes here needs a reader for the old one."""
    found = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    steps = {f"checkpoints/{step:08d}/{name}" for step in (STEPS - 1, STEPS)
             for name in ("manifest.json", "model.safetensors", "optimizer.safetensors")}
    assert found - {"best/README.md"} == {
        ".lock", "config.json", "manifest.json", "log.jsonl", "best/config.json", "best/model.safetensors",
        "best/checksums.json", "checkpoints/latest",
        "features/vocabulary.json", "features/features.json", "features/knowledge.json", *steps,
    }
    manifest = json.loads((trained / "manifest.json").read_text())
    assert set(manifest) == {"started", "command", "device", "system", "versions", "seed", "store", "config", "finished",
                             "parameters", "result"}
    assert set(manifest["store"]) == {"path", "fingerprint", "bundled"}


def test_the_parts_that_others_fill_have_their_places():
    run = Run("r")
    places = run.evaluation("test"), run.evaluation("test", "beam"), run.report, run.cache, run.failures, run.tensorboard
    assert [str(path) for path in places] == [
        "r/evaluation/test", "r/evaluation/test-beam", "r/report.html", "r/knowledge.sqlite", "r/failure", "r/tensorboard"
    ]
    assert not run.path.exists()


# ---- training in it


@pytest.mark.parametrize("part", ["config.json", "manifest.json", "log.jsonl", "features", "best", "checkpoints"])
def test_any_part_of_a_run_keeps_a_new_one_out(tmp_path, part):
    (tmp_path / part).mkdir()
    said = rf"already holds a run \({part}\)\. Resume it \(--resume\), or choose another folder"
    with pytest.raises(CheckpointError, match=said), Run(tmp_path).held(resume=False):
        pass
    with Run(tmp_path).held(resume=True) as run:
        assert run.path == tmp_path


def test_a_folder_with_other_files_takes_a_new_run_and_keeps_them(tmp_path):
    for name in ("notes.txt", ".config.json.mine", "report.html"):
        (tmp_path / name).write_text("mine")
    with Run(tmp_path).held(resume=False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config.json.mine", ".lock", "notes.txt", "report.html"]


def test_another_process_is_kept_out_as_long_as_one_trains(tmp_path):
    code = "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def other(then: str) -> subprocess.Popen:
        """A process that takes the lock, and what it does while it has it."""
        command = [sys.executable, "-c", f"{code}; print('held', flush=True); {then}", str(tmp_path / ".lock")]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with Run(tmp_path).held(resume=False):
        assert "BlockingIOError" in other("pass").communicate(timeout=60)[1]
    holder = other("sys.stdin.read()")
    assert holder.stdout.readline() == "held\n"
    said = f"another process is training in {tmp_path}. Wait for it, or choose another folder"
    with pytest.raises(CheckpointError, match=said), Run(tmp_path).held(resume=False):
        pass
    holder.communicate(timeout=60)
    with pytest.raises(ZeroDivisionError), Run(tmp_path).held(resume=False):
        raise ZeroDivisionError
    assert other("pass").communicate(timeout=60) == ("held\n", "")


def test_what_a_killed_process_left_goes_when_the_run_is_taken_up(copy):
    for name in (".best.x", ".features.y"):
        (copy / name).mkdir()
    (copy / ".manifest.json.z").write_text("{")
    (copy / ".mine").write_text("")
    with Run(copy).held(resume=True):
        assert {path.name for path in copy.glob(".*")} == {".lock", ".mine"}


def test_settings_that_are_missing_are_empty_and_damaged_ones_are_named(copy):
    assert Run(copy).read_config()["batch_size"] == 4 and Run(copy).read_manifest()["seed"] == 0
    (copy / "config.json").unlink()
    assert Run(copy).read_config() == {}
    for content in (b"{", b"[]", b"\xff", b"[" * 100_000):
        (copy / "manifest.json").write_bytes(content)
        with pytest.raises(CheckpointError, match="manifest.json: damaged .* Remove this file; resuming writes it anew"):
            Run(copy).read_manifest()


# ---- opening it for use


def without_checksums(run: Path) -> Path:
    """Make RUN/best one of an earlier version, which wrote no checksums; its settings."""
    (run / "best" / "checksums.json").unlink()
    return run / "best" / "config.json"


def test_the_best_weights_are_opened_unless_a_step_is_asked_for(trained):
    best, device = load_model(trained)
    assert not best.training and device.type == next(best.parameters()).device.type
    again, _ = load_model(str(trained), "cpu", "best")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), best.cpu().state_dict().values(), strict=True))
    stored = Checkpoints(Run(trained).checkpoints).read(STEPS - 1).tensors["model"]
    for name in (str(STEPS - 1), f"{STEPS - 1:08d}"):
        model, _ = load_model(trained, "cpu", name)
        assert not model.training and all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["7", "../best", "", "00000013/", "-13", "0", "9" * 5000, "latest"])
def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(trained, name):
    with pytest.raises(ConfigError, match=r"checkpoint '.*' is not in .*; give one of best, 00000012, 00000013$"):
        load_model(trained, "cpu", name)


def test_a_step_is_opened_where_the_best_weights_are_damaged(copy):
    (copy / "best" / "model.safetensors").write_bytes(b"")
    said = r"best: damaged, or not of this model \(.*its checksum does not match the manifest's\)\)\. " \
           "Put a copy of it back, or train again: case-fast train"
    with pytest.raises(CheckpointError, match=said):
        load_model(copy, "cpu")
    load_model(copy, "cpu", str(STEPS))
    (copy / "checkpoints" / f"{STEPS:08d}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{STEPS:08d}: damaged, or not of this model"):
        load_model(copy, "cpu", str(STEPS))


def test_a_model_of_a_later_version_is_named(copy):
    path = without_checksums(copy)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "seer"}))
    with pytest.raises(CheckpointError, match="there is no model 'seer'; one of case, "):
        load_model(copy, "cpu")


def test_a_run_of_the_first_version_holds_case(copy):
    """Before there was a second model its config.json had no "model"."""
    path = without_checksums(copy)
    settings = json.loads(path.read_text())
    assert settings.pop("model") == "case"
    path.write_text(json.dumps(settings))
    assert type(load_model(copy, "cpu")[0]).__name__ == "CASE"


def test_a_run_from_before_a_setting_existed_opens_with_what_it_was_trained_with(copy, monkeypatch):
    path = without_checksums(copy)
    settings = json.loads(path.read_text())
    del settings["kl_reduction"]
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(CASEConfig, "came_later", {"kl_reduction": "mean"})  # apart from today's default
    assert load_model(copy, "cpu")[0].config.kl_reduction == "mean"


def test_features_come_with_where_knowledge_came_from(store, copy):
    words = len(store.featurizer.vocabulary)
    featurizer, knowledge = load_features(copy, words)
    assert featurizer.vocabulary.words == store.featurizer.vocabulary.words and knowledge == store.knowledge
    with pytest.raises(CheckpointError, match=f"features: {words} words, the model has 7: they are of different runs. Remove .*"):
        load_features(copy, 7)
    for content in ("{}", '{"spec": 3}', '{"spec": "bundled", "cache": 3}', "[]", "[" * 100_000):
        (copy / "features" / "knowledge.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"knowledge.json: damaged .* case-fast train --data STORE --out .* --resume"):
            load_features(copy, words)


# ---- the best weights are those that were written


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checksums.json"])
def test_a_flipped_bit_anywhere_in_the_best_weights_is_noticed(copy, name):
    path, rng = copy / "best" / name, random.Random(name)
    whole = path.read_bytes()
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        openings = (lambda: load_model(copy, "cpu"), lambda: load(copy / "best"), lambda: CASE.from_pretrained(copy / "best"))
        for opened in openings:
            with pytest.raises(CheckpointError, match="damaged"):
                opened()
    path.write_bytes(whole)
    load_model(copy, "cpu")


def test_a_flipped_bit_in_the_weights_of_a_step_is_noticed(copy):
    path = copy / "checkpoints" / f"{STEPS:08d}" / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="its checksum does not match the manifest's"):
        load_model(copy, "cpu", str(STEPS))


def test_best_weights_of_an_earlier_version_load_which_is_said_once(copy, caplog):
    without_checksums(copy)
    for _ in range(3):
        load_model(copy, "cpu")
    assert [record.message.startswith(f"{copy / 'best'}: there are no checksums") for record in caplog.records] == [True]


def test_while_the_best_weights_are_replaced_they_load_at_every_moment(copy, monkeypatch):
    """Killed between any two system calls, the folder holds the old weights or the new ones, and checksums that fit."""
    old, _ = load_model(copy, "cpu")
    new = copy_of(old)
    with torch.no_grad():
        next(new.parameters()).add_(1)
    found = []
    real = os.replace

    def looking(*paths: object) -> None:
        real(*paths)
        model, _ = load_model(copy, "cpu")
        found.append(torch.equal(next(model.parameters()), next(new.parameters())))

    monkeypatch.setattr(os, "replace", looking)
    Run(copy).save_best(new)
    assert found[0] is False and found[-1] is True and sorted(found) == found and len(found) >= 4
    listed = json.loads((copy / "best" / "checksums.json").read_text())
    assert set(listed) == {"format", "files", "sha256"} and set(listed["files"]) == {"config.json", "model.safetensors"}


# ---- reading it for a report


def test_the_record_of_a_run_holds_what_was_written(store, trained):
    record = Record.read(trained)
    assert record.files.path == trained and record.problems == [] and record.store == {}  # memory.store is no folder
    assert record.config["model"]["d_model"] == 16 and lookup(record.manifest, "store.fingerprint") == store.fingerprint
    assert record.newest("validation")["step"] == STEPS and record.newest("end")["stopped"] == "max_steps"
    steps, values = record.series("validation", "ppl")
    assert steps == [7, 10, 13] and min(values) == lookup(record.manifest, "result.best.ppl")


def test_a_store_that_changed_since_is_not_the_runs(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["store"]["path"] = str(tmp_path)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for fingerprint in (manifest["store"]["fingerprint"], "another"):
        stored = {"fingerprint": fingerprint, "counts": {}}
        (tmp_path / "manifest.json").write_text(json.dumps(stored))
        assert Record.read(copy).store == (stored if fingerprint != "another" else {})


def test_the_last_record_of_a_step_counts(tmp_path):
    lines = [{"event": "step", "phase": 2, "step": s, "losses": {"kl": v}} for s, v in ((2, 1), (4, 2), (2, 3))]
    lines += [{"event": "step", "phase": 1, "step": 6, "losses": {"kl": 9}}, {"event": "validation", "step": 2, "kl": 7}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = Record.read(tmp_path)
    assert run.series("step", "kl", 2) == ([2, 4], [3, 2])
    assert run.series("step", "kl") == ([2, 4, 6], [3, 2, 9])
    assert run.series("validation", "kl") == ([2], [7])
    assert run.series("step", "absent") == ([], [])


def test_the_first_of_several_names_that_has_a_value_is_looked_up():
    values = {"a": {"b": 0, "c": ""}, "d": [1], "e": {}}
    assert lookup(values, "a.b") == 0 and lookup(values, "a.c", "x.y", "d") == [1]
    assert lookup(values, "a.c", "e", "d.x") is None and lookup(None, "a") is None
