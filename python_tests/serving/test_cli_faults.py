"""The command line on broken files, disks and folders: one line and a status, before the work and not after it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from case_fast import cli
from case_fast.commands import machine
from case_fast.data.travel import pack_store
from case_fast.errors import DataError, PlaceError

SMALL = ["--model.d_model", "16", "--model.ffn", "16"]
BUNDLED = ["--conceptnet", "bundled", "--lexicon", "bundled"]
SOURCES = ["--knowledge", "bundled", *BUNDLED]
MEMORY = "/proc/self/mem"  # a regular file that nobody can read from its start, root neither

pytestmark = pytest.mark.skipif(not Path(MEMORY).exists(), reason="the faults are those of Linux")


class Files:
    """What the commands are given: a sound store, a sound run, and a folder to break."""

    def __init__(self, store: Path, run: Path, travel: Path):
        self.store, self.run, self.travel = store, run, travel
        self.cache = store.with_name(f"{store.name}.knowledge.sqlite")

    def words(self, words: list[str], **places: object) -> list[str]:
        return [word.format(store=self.store, run=self.run, travel=self.travel, cache=self.cache, **places) for word in words]


@pytest.fixture(scope="module")
def files(sample_store, sample_run, tmp_path_factory) -> Files:
    travel = tmp_path_factory.mktemp("faults") / "sample.travel"
    pack_store(sample_store, travel)
    return Files(sample_store.path, sample_run, travel)


class Begun(Exception):
    """A command has begun its work."""


WORK = ["data.prepare.read_conversations", "importing.command.read_released", "data.travel._pack", "data.travel._Part.unpack",
        "evaluation.floors.Bigrams", "training.loop.Trainer.train_step", "tables.plan.carry_out", "evaluation.diagnose.diagnose",
        "evaluation.evaluate.read_references", "evaluation.report._page", "knowledge.cache.InferenceCache.merge",
        "training.profile.measure_rates", "published.write",
        "serving.responder.Responder.explain", "serving.responder.Responder.respond", "data.inspect.describe"]


@pytest.fixture
def no_work(monkeypatch):
    """What the commands are there for is not reached."""

    def begun(*_: object, **__: object) -> None:
        raise Begun

    machine._benchmarks()
    for name in [*(f"case_fast.{name}" for name in WORK), "benchmarks.command.run"]:
        *module, last = name.split(".")
        owner = None if module[-1][0].islower() and not module[-1].startswith("_") else module.pop()
        found = import_module(".".join(module))
        monkeypatch.setattr(getattr(found, owner) if owner else found, last, begun)


def refused(words: list[str], capsys, *named: object) -> str:
    """Run a command that has to end with a status and one line that names these; the line."""
    capsys.readouterr()
    assert cli.main(words) == 1, words
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
    assert all(str(name) in line for name in named), (line, named)
    return line


# ---- places to write to

# What a command writes, with {out} for its place; is that a folder?
OUTPUTS = {
    "prepare": (["prepare", "--dialogues", "bundled", *SOURCES, "--out", "{out}"], True),
    "prepare --cache": (["prepare", "--dialogues", "bundled", *SOURCES, "--out", "{tmp}/new.store", "--cache", "{out}"], False),
    "import": (["import", "{travel}", *BUNDLED, "--out", "{out}"], True),
    "pack": (["pack", "{store}", "{out}"], False),
    "unpack": (["unpack", "{travel}", "{out}"], True),
    "floors": (["floors", "{store}", "--json", "{out}"], False),
    "train": (["train", "--data", "{store}", "--out", "{out}", *SMALL], True),
    "table": (["table", "1", "--data", "{store}", "--out", "{out}", "--models", "transformer"], True),
    "evaluate": (["evaluate", "{linked}", "--data", "{store}"], True),  # whose folder "evaluation" is a link to {out}
    "diagnose": (["diagnose", "{run}", "--data", "{store}", "--out", "{out}"], True),
    "score": (["score", "{store}", "--out", "{out}"], True),
    "report": (["report", "{run}", "--out", "{out}"], False),
    "explain": (["explain", "{run}", "I am sad.", "--json", "{out}"], False),
    "publish": (["publish", "{run}", "--out", "{out}"], True),
    "merge-cache": (["merge-cache", "{out}", "{cache}"], False),
    "demo": (["demo", "--out", "{out}"], True),
    "profile": (["profile", "--store", "{store}", "--out", "{out}"], True),
    "bench": (["bench", "linear", "--quick", "--out", "{out}"], True),
    "bench --show": (["bench", "--show", "linear", "--out", "{out}"], True),
}
NOTHING_WRITTEN = {"inspect", "doctor", "debug", "chat"}  # but for the inferences that chat keeps where it can


def under_a_file(tmp: Path) -> Path:
    (tmp / "file").touch()
    return tmp / "file" / "x"


def in_a_circle(tmp: Path) -> Path:
    (tmp / "loop").symlink_to("loop")
    return tmp / "loop" / "x"


def of_a_long_name(tmp: Path) -> Path:
    return tmp / ("n" * 300)


def where_nobody_may_write(tmp: Path) -> Path:
    return Path("/proc/nowhere/x")


PLACES = {"under a file": under_a_file, "in a circle of links": in_a_circle, "of too long a name": of_a_long_name,
          "in /proc": where_nobody_may_write}
# What a disk, a mount or permissions make calls of os fail with, and which.
FAILURES = {"on a full disk": (errno.ENOSPC, "fsync"), "without an inode left": (errno.ENOSPC, "mkdir", "open"),
            "beyond a quota": (errno.EDQUOT, "fsync"), "read-only": (errno.EROFS, "mkdir", "open"),
            "without permission": (errno.EACCES, "mkdir", "open"), "on a broken disk": (errno.EIO, "mkdir", "fsync")}


def fail(patch: pytest.MonkeyPatch, folder: Path, number: int, *names: str) -> None:
    """These calls of os fail in a folder, "open" where it would make a file."""

    def failing(real: Callable, creates: bool) -> Callable:
        def call(path: object, *others: object, **named: object) -> object:
            if isinstance(path, int) or (str(path).startswith(str(folder)) and (not creates or others[0] & os.O_CREAT)):
                raise OSError(number, os.strerror(number), None if isinstance(path, int) else path)
            return real(path, *others, **named)

        return call

    for name in names:
        patch.setattr(os, name, failing(getattr(os, name), name == "open"))


def linked_run(files: Files, tmp: Path, evaluation: Path | None = None) -> Path:
    """The run, its parts links, with an "evaluation" elsewhere or none."""
    run = tmp / "linked"
    run.mkdir()
    for part in files.run.iterdir():
        (run / part.name).symlink_to(part)
    if evaluation:
        (run / "evaluation").symlink_to(evaluation)
    return run


def listing(*folders: Path) -> list[str]:
    return sorted(str(path) for folder in folders for path in folder.rglob("*"))


@pytest.mark.parametrize("fault", [*PLACES, *FAILURES])
@pytest.mark.parametrize("command", OUTPUTS)
def test_where_nothing_can_be_written_is_found_before_the_work(command, fault, files, no_work, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = PLACES[fault](tmp_path) if fault in PLACES else tmp_path / "new" / "x"
    linked = linked_run(files, tmp_path, out if fault in PLACES else None) if command == "evaluate" else ""
    before = listing(tmp_path, files.run, files.store)
    with monkeypatch.context() as patch:
        if fault in FAILURES:
            fail(patch, tmp_path, *FAILURES[fault])
        words = files.words(OUTPUTS[command][0], out=out, tmp=tmp_path, linked=linked)
        beside = tmp_path / "new.store" if command == "prepare --cache" and fault in FAILURES else out  # fails before
        line = refused(words, capsys, linked or beside)
    assert fault not in FAILURES or os.strerror(FAILURES[fault][0]) in line
    assert listing(tmp_path, files.run, files.store) == before


def test_every_command_that_writes_is_tried():
    assert {name.partition(" ")[0] for name in OUTPUTS} | NOTHING_WRITTEN == set(cli._COMMANDS)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system's own refusal to let a file grow, to be met without a full disk: for everybody, root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", [name for name in OUTPUTS if name != "evaluate"])
def test_a_file_that_cannot_grow_is_found_before_the_work(command, files, no_work, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with files_of_at_most(1000):
        line = refused(files.words(OUTPUTS[command][0], out=tmp_path / "new" / "x", tmp=tmp_path), capsys, "File too large")
    assert "ulimit -f" in line
    assert not listing(tmp_path)


@pytest.mark.parametrize("command", [name for name, (_, is_folder) in OUTPUTS.items() if not is_folder])
@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a link to a pipe"])
def test_what_is_no_file_is_not_replaced_by_one(command, kind, files, no_work, tmp_path, capsys):
    """Else a command that is given /dev/stdout or /dev/null would put a file in its place."""
    out = tmp_path / "out"
    out.mkdir() if kind == "a folder" else os.mkfifo(tmp_path / ("out" if kind == "a pipe" else "pipe"))
    if kind == "a link to a pipe":
        out.symlink_to("pipe")
    refused(files.words(OUTPUTS[command][0], out=out, tmp=tmp_path), capsys, out)
    assert not out.is_file() and out.is_symlink() == (kind == "a link to a pipe")


def test_a_link_to_a_file_is_followed(files, tmp_path, monkeypatch):
    monkeypatch.setattr("case_fast.evaluation.report._page", lambda run: "")
    (tmp_path / "real").mkdir()
    (tmp_path / "link.html").symlink_to("real/page.html")
    for _ in range(2):
        assert cli.main(["report", str(files.run), "--out", str(tmp_path / "link.html")]) == 0
        assert (tmp_path / "link.html").is_symlink() and (tmp_path / "real" / "page.html").is_file()


@pytest.mark.parametrize("command", [*OUTPUTS, "inspect", "chat"])
def test_a_working_folder_that_is_gone_is_said(command, files, no_work, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    words = OUTPUTS[command][0] if command in OUTPUTS else [command, "{store}"]
    refused(files.words(words, out="x", tmp=".", linked="run"), capsys, "is not there any more; change into another one")


def test_a_disk_without_room_for_a_checkpoint_is_found_before_the_training(files, no_work, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    words = files.words(["train", "--data", "{store}", "--out", "{out}", *SMALL], out=tmp_path / "run")
    line = refused(words, capsys, "MiB are needed and 1 MiB are left", tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists(), line


def test_a_disk_without_room_for_what_is_unpacked_is_found_before_it(files, no_work, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(files.words(["unpack", "{travel}", "{out}"], out=tmp_path / "s.store"), capsys, "MiB are needed and 0 MiB are left")
    assert not listing(tmp_path)


def test_figures_that_took_long_are_shown_where_they_cannot_be_written(files, tmp_path, capsys, monkeypatch):
    """The disk fills up during the work."""
    run = linked_run(files, tmp_path, tmp_path / "there")
    (tmp_path / "there").mkdir()
    module = import_module("case_fast.evaluation.evaluate")

    def full(path: Path, text: str) -> None:
        with files_of_at_most(0):
            real(path, text)

    real = module.write_text
    monkeypatch.setattr(module, "write_text", full)
    assert cli.main(["evaluate", str(run), "--data", str(files.store), "--limit", "2", "--max_words", "2"]) == 1
    said = capsys.readouterr()
    assert "Perplexity" in said.out and "predictions.jsonl: cannot be written (File too large)" in said.err
    assert not (run / "evaluation" / "test" / "metrics.json").exists()


# ---- files and folders to read

# {bad}: what cannot be read; of which kind it should be
INPUTS = [
    ("file", ["prepare", "--dialogues", "bundled", *SOURCES, "--out", "{tmp}/o", "--embeddings", "{bad}"]),
    ("file", ["prepare", "--dialogues", "bundled", *SOURCES, "--out", "{tmp}/o", "--emotion_words", "{bad}"]),
    ("file", ["prepare", "--dialogues", "bundled", *SOURCES, "--out", "{tmp}/o", "--conceptnet", "{bad}"]),
    ("file", ["prepare", "--dialogues", "bundled", *SOURCES, "--out", "{tmp}/o", "--lexicon", "{bad}"]),
    ("file", ["unpack", "{bad}", "{tmp}/o"]),
    ("file", ["debug", "{bad}"]),
    ("file", ["merge-cache", "{tmp}/all.sqlite", "{bad}"]),
    ("file", ["score", "{bad}"]),
    ("file", ["table", "1", "--data", "{store}", "--out", "{tmp}/o", "--settings", "{bad}"]),
    ("file", ["train", "--data", "{store}", "--out", "{tmp}/o", "--config", "{bad}"]),
    ("dialogues", ["prepare", "--dialogues", "{bad}", *SOURCES, "--out", "{tmp}/o"]),
    ("release", ["import", "{bad}", "--check"]),
    ("store", ["inspect", "{bad}"]),
    ("store", ["pack", "{bad}", "{tmp}/o"]),
    ("store", ["floors", "{bad}"]),
    ("store", ["train", "--data", "{bad}", "--out", "{tmp}/o"]),
    ("store", ["table", "1", "--data", "{bad}", "--out", "{tmp}/o"]),
    ("store", ["evaluate", "{run}", "--data", "{bad}"]),
    ("store", ["diagnose", "{run}", "--data", "{bad}"]),
    ("store", ["profile", "--store", "{bad}", "--out", "{tmp}/o"]),
    ("store", ["bench", "step", "--store", "{bad}", "--out", "{tmp}/o"]),
    ("store", ["bench", "decode", "--store", "{bad}", "--run", "{run}", "--out", "{tmp}/o"]),
    ("run", ["evaluate", "{bad}", "--data", "{store}"]),
    ("run", ["diagnose", "{bad}", "--data", "{store}"]),
    ("run", ["chat", "{bad}"]),
    ("run", ["report", "{bad}"]),
    ("run", ["explain", "{bad}", "I am sad."]),
    ("run", ["publish", "{bad}", "--out", "{tmp}/o"]),
    ("run", ["profile", "--store", "{store}", "--run", "{bad}", "--out", "{tmp}/o"]),
    ("run", ["bench", "decode", "--store", "{store}", "--run", "{bad}", "--out", "{tmp}/o"]),
]
READS_ANYTHING = {"demo", "doctor"}  # nothing, or whatever there is: see test_doctor.py


def unreadable(kind: str, files: Files, tmp: Path) -> Path:
    """A thing of this kind that is there and cannot be read."""
    bad = tmp / "bad"
    if kind in ("store", "run"):
        shutil.copytree(getattr(files, kind), bad)
        part = bad / ("manifest.json" if kind == "store" else "best/config.json")
        part.unlink()
        part.symlink_to(MEMORY)
    else:
        bad.symlink_to(MEMORY)
    return bad


UNREADABLE = {"under a file": under_a_file, "a circle of links": in_a_circle, "too long a name": of_a_long_name}


@pytest.mark.parametrize("fault", [*UNREADABLE, "unreadable", "without permission"])
@pytest.mark.parametrize(("kind", "words"), INPUTS, ids=lambda of: of if isinstance(of, str) else " ".join([of[0], *of[-2:]]))
def test_what_cannot_be_read_is_found_before_the_work(kind, words, fault, files, tmp_path, capsys, monkeypatch, request):
    if (fault == "unreadable" and words[0] == "report") or (fault != "unreadable" and "--config" in words):
        return  # a report tells of whatever is there (test_report.py); that there is no such file of settings, the parser says
    if kind not in ("dialogues", "release"):  # to read those is the work
        request.getfixturevalue("no_work")
    if fault == "without permission":
        bad = forbidden(tmp_path, monkeypatch)
    else:
        bad = unreadable(kind, files, tmp_path) if fault == "unreadable" else UNREADABLE[fault](tmp_path)
    refused(files.words(words, bad=bad, tmp=tmp_path), capsys, bad)


def forbidden(tmp: Path, patch: pytest.MonkeyPatch) -> Path:
    """A place in a folder that may not be looked into."""
    real = os.stat

    def stat(path: object, *others: object, **named: object) -> os.stat_result:
        if str(path).startswith(str(tmp / "secret" / "x")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *others, **named)

    patch.setattr(os, "stat", stat)
    return tmp / "secret" / "x"


def test_every_command_that_reads_is_tried():
    assert {words[0] for _, words in INPUTS} | READS_ANYTHING == set(cli._COMMANDS)


# ---- folders of another kind


def strange_folders(files: Files, tmp: Path) -> dict[str, Path]:
    hub = tmp / "hub"
    hub.mkdir()
    (hub / "config.json").write_text('{"model_type": "bart", "architectures": ["BartModel"]}')
    (hub / "manifest.json").write_text('{"name": "an app", "icons": []}')
    shutil.copytree(files.store, tmp / "store")
    shutil.copytree(files.run, tmp / "run")
    (checkpoint, *_) = sorted((tmp / "run" / "checkpoints").glob("0*"))
    return {"store": tmp / "store", "weights": tmp / "run" / "best", "checkpoint": checkpoint, "model of others": hub,
            "features": tmp / "run" / "features"}


@pytest.mark.parametrize("kind", ["store", "weights", "checkpoint", "model of others", "features"])
def test_what_is_no_run_is_not_written_into(kind, files, no_work, tmp_path, capsys):
    folder = strange_folders(files, tmp_path)[kind]
    before = listing(tmp_path)
    for words in (["report", "{bad}"], ["evaluate", "{bad}", "--data", "{store}"], ["diagnose", "{bad}", "--data", "{store}"],
                  ["chat", "{bad}"], ["profile", "--store", "{store}", "--run", "{bad}"],
                  ["train", "--data", "{store}", "--out", "{bad}", "--resume", *SMALL]):
        if kind in ("model of others",) and words[0] == "train":
            continue
        line = refused(files.words(words, bad=folder), capsys, folder)
        assert "no run to resume" in line or "not a run folder" in line, line
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", [name for name, (_, folder) in OUTPUTS.items() if folder and name != "evaluate"])
def test_nothing_else_is_written_into_a_store(command, files, no_work, tmp_path, capsys):
    store = tmp_path / "a.store"
    shutil.copytree(files.store, store)
    before = listing(store)
    for out in (store / "new", *[store] * (command not in ("prepare", "import"))):  # these replace a store
        refused(files.words(OUTPUTS[command][0], out=out, tmp=tmp_path), capsys, store)
    assert listing(store) == before


# ---- arguments


@pytest.mark.parametrize(("words", "said"), [
    (["evaluate", "{run}", "--data", "{store}", "--batch_size", "0"], "batch_size must be at least 1, not 0"),
    (["evaluate", "{run}", "--data", "{store}", "--batch_size", "-3"], "batch_size must be at least 1, not -3"),
    (["evaluate", "{run}", "--data", "{store}", "--limit", "0"], "limit must be at least 1, not 0"),
    (["diagnose", "{run}", "--data", "{store}", "--batches", "0"], "batches must be at least 1, not 0"),
    (["profile", "--store", "{store}", "--steps", "0"], "steps must be at least 1, not 0"),
    (["table", "1", "--data", "{store}", "--out", "t", "--max_steps", "0"], "max_steps must be a whole number of at least 1"),
    (["table", "1", "--data", "{store}", "--out", "t", "--jobs", "0"], "must be at least 1"),
    (["train", "--data", "{store}", "--out", "r", "--batch_size", "0"], "batch_size must be a whole number of at least 1, not 0"),
    (["bench", "linear", "--budget", "0"], "budget must be above 0 seconds"),
    *((words + ["--device", device], f"device '{device}'")
      for device, words in zip(["mps", "meta", "xpu", "CUDA", "cuda:99", "cuda:-1", "gpu", ""], [
          ["evaluate", "{run}", "--data", "{store}"], ["table", "1", "--data", "{store}", "--out", "t"],
          ["train", "--data", "{store}", "--out", "r"], ["diagnose", "{run}", "--data", "{store}"], ["chat", "{run}"],
          ["profile", "--store", "{store}"], ["prepare", "--dialogues", "bundled", *SOURCES, "--out", "s"],
          ["bench", "linear"]], strict=True)),
    (["table", "1", "--data", "{store}", "--out", "t", "--device", "mps"], "device 'mps'"),
    (["table", "2", "--data", "{store}", "--out", "t", "--device", "cuda:99"], "device 'cuda:99'"),
])  # fmt: skip
def test_a_number_or_device_that_cannot_work_is_named(words, said, files, no_work, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(files.words(words), capsys, said)
    assert not listing(tmp_path)


# ---- the one place that says it


@pytest.mark.parametrize(("error", "said"), [
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "a/b: No such file or directory. Check that it,"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free some space there, or give another place."),
    (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a: Invalid cross-device link. Check the path"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer."),
    (OSError("something else"), "something else."), (OSError(), "OSError."),
    (PlaceError("x", OSError(errno.EROFS, "Read-only file system")), "x: cannot be written (Read-only file system). Nothing"),
    (PlaceError("x", ValueError("I/O error: No space (os error 28)")), "x: cannot be written (No space left on device). Free"),
    (MemoryError(), "there is not enough memory"), (MemoryError("8 GiB"), "there is not enough memory (8 GiB)"),
    (DataError("a\nb\x1b[31m\udcff", "odd"), "a b\\x1b[31m\\udcff: odd."),
])  # fmt: skip
def test_whatever_a_command_raises_of_that_kind_is_one_line(error, said, capsys, monkeypatch):
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setitem(cli._COMMANDS, "report", cli._COMMANDS["report"]._replace(run=broken))
    assert refused(["report", "x"], capsys).startswith(f"error: {said}")


def test_what_is_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(cli._COMMANDS, "report", cli._COMMANDS["report"]._replace(run=lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "x"])
