"""Checkpoints: every damage is noticed, every failure to write leaves the one before, nothing is taken from a hostile file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import tiny_model

from case_fast.errors import CheckpointError
from case_fast.training import checkpoint as module
from case_fast.training.adam import Adam
from case_fast.training.checkpoint import Checkpoints, load_optimizer, optimizer_tensors, rng_state, set_rng_state

STATE = {"rng": {"cpu": "AAAA"}, "stopping": {"best": 1 / 3}, "config": {"words": "é", "none": None}}


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 2), value), "b": torch.arange(4)}, "optimizer": {"a/step": torch.tensor(value)}}


@pytest.fixture
def two(tmp_path) -> Checkpoints:
    """Checkpoints of the steps 3 and 7, with their step as value."""
    (tmp_path / "run").mkdir()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(3, tensors(3.0), STATE)
    checkpoints.save(7, tensors(7.0), STATE)
    return checkpoints


def reseal(path: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest as someone would who knows its checksum."""
    body = json.loads(path.read_bytes())
    del body["sha256"]
    change(body)
    path.write_bytes(module.sealed(body))


def test_what_was_saved_is_read_back(two):
    found = two.newest()
    assert (found.step, found.state, found.path.name) == (7, STATE, "00000007")
    assert torch.equal(found.tensors["model"]["a"], torch.full((3, 2), 7.0))
    assert found.tensors["model"]["b"].dtype == torch.int64
    assert (two.folder / "latest").read_text() == "00000007\n"
    assert sorted(path.name for path in two.folder.iterdir()) == ["00000003", "00000007", "latest"]


def test_what_went_wrong_on_the_way_to_the_disk_is_noticed_before_older_ones_go(two, monkeypatch):
    write = safetensors.torch.save_file

    def badly(content, file):
        write(content, file)
        raw = file.read_bytes()
        file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))

    monkeypatch.setattr(safetensors.torch, "save_file", badly)
    with pytest.raises(CheckpointError, match="damaged"):
        two.save(9, tensors(9.0), STATE)
    assert two.steps() == [3, 7, 9]


def test_without_a_checkpoint_there_is_no_newest_one(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints").newest() is None


def test_old_ones_go_after_the_new_one_was_read_back(two, monkeypatch):
    two.save(9, tensors(9.0), STATE)
    assert two.steps() == [7, 9]

    def broken(self, step):
        raise CheckpointError("read back: damaged")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "check", broken)
        with pytest.raises(CheckpointError, match="read back"):
            two.save(11, tensors(11.0), STATE)
    assert two.steps() == [7, 9, 11]
    two.save(12, tensors(12.0), STATE)
    assert two.steps() == [11, 12]
    one = Checkpoints(two.folder, keep=1)
    one.save(13, tensors(13.0), STATE)
    assert one.steps() == [13]


def test_a_step_is_saved_once(two):
    before = {path: path.stat().st_mtime_ns for path in two.path(7).iterdir()}
    two.save(7, tensors(7.0), STATE)
    assert before == {path: path.stat().st_mtime_ns for path in two.path(7).iterdir()}


FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_noticed_and_the_older_one_used(two, file, caplog):
    path = two.path(7) / file
    sound = path.read_bytes()
    rng = random.Random(file)
    for _ in range(60):
        place, bit = rng.randrange(len(sound)), rng.randrange(8)
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << bit]) + sound[place + 1 :])
        for look in (two.read, two.check):
            with pytest.raises(CheckpointError, match=file):
                look(7)
    caplog.clear()
    found = two.newest()
    assert found.step == 3 and torch.equal(found.tensors["model"]["a"], torch.full((3, 2), 3.0))
    assert file in caplog.text and "set aside" in caplog.text
    assert sorted(path.name for path in two.folder.iterdir()) == ["00000003", "00000007.damaged", "latest"]
    two.save(7, tensors(7.0), STATE)  # the run comes by again
    assert two.newest().step == 7


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "folder", "link", "pipe"])
def test_a_file_that_is_not_what_it_was_is_refused_and_the_older_checkpoint_used(two, file, damage):
    path = two.path(7) / file
    sound = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "link":
        twin = two.folder.parent / "twin"
        twin.write_bytes(sound)
        path.symlink_to(twin)
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": sound[:-1], "longer": sound + b"\n"}[damage])
    for look in (two.read, two.check):
        with pytest.raises(CheckpointError, match=file):
            look(7)
    assert two.newest().step == 3


def test_all_damaged_is_an_error_that_names_each(two):
    for step in (3, 7):
        (two.path(step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is sound: .*00000007.*; .*00000003"):
        two.newest()
    assert two.steps() == [3, 7]


@pytest.mark.parametrize("content", [None, "00000099\n", "../../elsewhere\n", "\0\xff", ""])
def test_latest_names_nothing(two, content, caplog):
    """`latest` is for people: the newest sound checkpoint is found without it."""
    (two.folder / "latest").unlink()
    if content is not None:
        (two.folder / "latest").write_text(content, encoding="latin-1")
    assert two.newest().step == 7
    assert "the newest sound checkpoint is that of step 7" in caplog.text


def test_other_names_in_the_folder_are_nothing_to_it(two):
    for name in ("7", "0000007", "000000000000000099", ".00000009.removed", "٠٠٠٠٠٠٠٩", "notes"):
        (two.folder / name).mkdir()
    (two.folder / "00000009").symlink_to(two.path(7))
    assert two.newest().step == 7
    two.clean()
    assert not (two.folder / ".00000009.removed").exists() and (two.folder / "notes").exists()


# ---- hostile files


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["files"].update({"../../../outside.safetensors": {"sha256": "0", "bytes": 0}}),
        lambda body: body["files"].update({"/etc/passwd": body["files"].pop("model.safetensors")}),
        lambda body: body["files"].pop("optimizer.safetensors"),
        lambda body: body.update(files=[]),
        lambda body: body.update(files={name: None for name in body["files"]}),
        lambda body: body.update(state=[]),
        lambda body: body.update(step=8),
        lambda body: body.update(format="case_fast checkpoint 99"),
        lambda body: body.pop("state"),
    ],
)
def test_a_manifest_that_asks_for_something_else_is_refused(two, change):
    reseal(two.path(7) / "manifest.json", change)
    with pytest.raises(CheckpointError, match="00000007"):
        two.read(7)


@pytest.mark.parametrize("raw", [b"[]", b"null", b"{}", b"[" * 500_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"sha256": 3}'])
def test_a_manifest_that_is_no_manifest_is_refused_at_once(two, raw):
    (two.path(7) / "manifest.json").write_bytes(raw)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="manifest.json"):
        two.read(7)
    assert time.monotonic() - started < 1


def put(checkpoints: Checkpoints, data: bytes) -> None:
    """These bytes as the model of step 7, with a manifest that vouches for them."""
    (checkpoints.path(7) / "model.safetensors").write_bytes(data)
    listed = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    reseal(checkpoints.path(7) / "manifest.json", lambda body: body["files"].update({"model.safetensors": listed}))


def header(content: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if size is None else size) + content


@pytest.mark.parametrize(
    "data",
    [
        header(b"{}", 1 << 60), header(b"{}", 1 << 40), header(b" " * 30_000_000), header(b"[" * 100_000), b"", b"\0" * 7,
        header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),  # its data are missing
        header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}') + b"\0" * 4,
        b"\x80\x04cos\nsystem\n.",
    ],
)
def test_a_hostile_safetensors_file_is_refused_at_once(two, data):
    put(two, data)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="model.safetensors"):
        two.read(7)
    assert time.monotonic() - started < 1


def test_a_file_larger_than_expected_is_not_read(two):
    with open(two.path(7) / "model.safetensors", "r+b") as stream:
        stream.truncate(1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(CheckpointError, match="refused: 1099511627776 bytes, expected at most 1000000"):
        two.read(7, max_bytes=1_000_000)


def test_a_linked_checkpoint_is_refused(two):
    shutil.move(two.path(7), two.folder.parent / "elsewhere")
    two.path(7).symlink_to(two.folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="a link"):
        two.read(7)
    assert two.newest().step == 3


# ---- failures to write


class Full:
    """Fails the n-th of the named calls of os with ENOSPC; n = 0 counts only."""

    def __init__(self, patch: pytest.MonkeyPatch, n: int):
        self.calls, self.n = 0, n
        for name in ("fsync", "replace", "rename", "rmdir", "unlink", "mkdir"):
            patch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, real):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call


def test_a_full_disk_at_any_moment_leaves_a_sound_checkpoint_and_says_why(two, tmp_path):
    """Every system call of a save fails in turn: what was there is sound, and a second try succeeds."""
    original = two.folder.parent
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(original, tmp_path / "dry")
        disk = Full(patch, 0)
        Checkpoints(tmp_path / "dry" / "checkpoints").save(9, tensors(9.0), STATE)
        total = disk.calls
    assert total > 15
    unread = 0
    for n in range(1, total + 1):
        checkpoints = Checkpoints(shutil.copytree(original, tmp_path / f"full{n}") / "checkpoints")
        with pytest.MonkeyPatch.context() as patch:
            Full(patch, n)
            try:
                checkpoints.save(9, tensors(9.0), STATE)
            except CheckpointError as error:
                assert "the checkpoint of step 9 could not be written" in str(error) and "No space left on device" in str(error)
            else:
                unread += 1  # the call that failed removed a temporary file
        checkpoints.clean()
        found = checkpoints.newest()
        assert found.step in (7, 9)
        assert torch.equal(found.tensors["model"]["a"], torch.full((3, 2), float(found.step)))
        checkpoints.save(9, tensors(9.0), STATE)
        assert checkpoints.newest().step == 9
    assert unread <= 3


def test_a_run_folder_that_is_gone_is_not_made_anew(two):
    shutil.rmtree(two.folder.parent)
    with pytest.raises(CheckpointError, match="is gone"):
        two.save(9, tensors(9.0), STATE)
    assert not two.folder.parent.exists()


# ---- what goes into a checkpoint


def adam(model: torch.nn.Module) -> Adam:
    return Adam([{"params": list(model.parameters())}], 0.1, (0.9, 0.98), 1e-9)


def trained(model: torch.nn.Module) -> tuple[Adam, list[str]]:
    names = [name for name, _ in model.named_parameters()]
    optimizer = adam(model)
    for parameter in list(model.parameters())[::2]:  # the others have no state
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer, names


def test_optimizer_state_comes_back_by_name():
    model = tiny_model()
    optimizer, names = trained(model)
    stored = optimizer_tensors(optimizer, names)
    other = adam(tiny_model())
    load_optimizer(other, names, safetensors.torch.load(safetensors.torch.save(stored)))
    again = optimizer_tensors(other, names)
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
    assert {name.rpartition("/")[2] for name in stored} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update({"nothing/exp_avg": torch.zeros(2)}), "'nothing/exp_avg' belongs to no parameter"),
        (lambda s: s.update({"embedding.weight/amsgrad": torch.zeros(2)}), "belongs to no parameter"),
        (lambda s: s.pop("embedding.weight/step"), "holds exp_avg, exp_avg_sq only"),
        (lambda s: s.update({"embedding.weight/exp_avg": torch.zeros(2)}), r"is torch.float32 \(2,\), expected float32"),
        (lambda s: s.update({"embedding.weight/step": torch.tensor(1)}), "is torch.int64"),
    ],
)
def test_optimizer_state_that_does_not_fit_is_named(change, said):
    optimizer, names = trained(tiny_model())
    stored = optimizer_tensors(optimizer, names)
    change(stored)
    with pytest.raises(CheckpointError, match=said):
        load_optimizer(optimizer, names, stored)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("w_aff"), "w_aff is missing"),
        (lambda s: s.update(w_extra=torch.zeros(2)), "w_extra is unknown"),
        (lambda s: s.update(w_aff=torch.zeros(2)), r"w_aff is torch.float32 \(2,\), expected torch.float32 \(32,\)"),
        (lambda s: s.update(w_aff=s["w_aff"].double()), "w_aff is torch.float64"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, said):
    model = tiny_model()
    stored = dict(model.state_dict())
    change(stored)
    with pytest.raises(CheckpointError, match=said):
        model.load_tensors(stored)


def test_the_random_state_comes_back_and_a_damaged_one_is_refused():
    cpu = torch.device("cpu")
    state = json.loads(json.dumps(rng_state(cpu)))
    expected = torch.rand(5)
    set_rng_state(state, cpu)
    assert torch.equal(torch.rand(5), expected)
    for bad in ({}, {"cpu": "AAAA"}, {"cpu": "not base64!"}, {"cpu": 3}, []):
        with pytest.raises(CheckpointError, match="random state"):
            set_rng_state(bad, cpu)
