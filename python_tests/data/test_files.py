"""Files and folders that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from case_fast import files
from case_fast.errors import DataError
from case_fast.files import sha256, whole_folder, write_json, write_text
from case_fast.text_files import read_json, require_file, require_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(path: Path, text: str) -> None:
    with whole_folder(path) as folder:
        (folder / "part").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "part").write_text(text)
        (folder / "deep" / "part").chmod(0o600)


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.store"
    with whole_folder(path) as folder:
        assert folder.parent == path.parent and not path.exists()
        (folder / "part").write_text("x")
    assert names(path) == ["part"] and names(path.parent) == ["a.store"]


def test_everyone_may_read_it(tmp_path):
    fill(tmp_path / "a", "x")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o755, "deep": 0o755, "part": 0o644}


def test_an_old_folder_is_replaced_whole(tmp_path):
    fill(tmp_path / "a", "old")
    (tmp_path / "a" / "more").touch()
    fill(tmp_path / "a", "new")
    assert names(tmp_path / "a") == ["deep", "part"] and (tmp_path / "a" / "part").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("bad")])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    fill(tmp_path / "a", "old")
    for name in ("a", "b"):
        with pytest.raises(type(error)), whole_folder(tmp_path / name) as folder:
            (folder / "part").write_text("half")
            raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "part").read_text() == "old"


@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_folder_comes_back_when_a_rename_fails(tmp_path, monkeypatch, failing):
    fill(tmp_path / "a", "old")
    rename, calls = Path.rename, []

    def broken(self, target):
        calls.append(self)
        if len(calls) == failing:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="no"):
        fill(tmp_path / "a", "new")
    monkeypatch.undo()
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "part").read_text() == "old"


def test_an_interrupt_after_the_rename_keeps_the_new_folder(tmp_path, monkeypatch):
    fill(tmp_path / "a", "old")

    def interrupted(path):
        if path == tmp_path:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "part").read_text() == "new"


def test_texts_are_written_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2]})
    assert read_json(path, "file", "") == {"é": [1, 2]} and "é" in path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert names(tmp_path) == ["a.json"] and json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2]}


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_required_file_or_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "f").touch()
    assert require_file(str(tmp_path / "f"), "thing") == tmp_path / "f" and require_folder(tmp_path, "place") == tmp_path
    for function, path, message in (
        (require_file, tmp_path / "g", "thing not found. Do this."),
        (require_file, tmp_path, "thing is a folder, not a file. Do this."),
        (require_folder, tmp_path / "g", "thing not found. Do this."),
        (require_folder, tmp_path / "f", "thing is a file, not a folder. Do this."),
    ):
        with pytest.raises(DataError) as caught:
            function(path, "thing", "Do this.")
        assert str(caught.value) == f"{path}: {message}" and caught.value.line is None
