"""The command line's terminal: texts as they are, in any encoding, and an output that nobody reads or that is full."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from case_fast import cli
from case_fast.data.travel import pack_store

SMALL = ["--model.d_model", "16", "--model.ffn", "16", "--phase1-steps", "1", "--max-steps", "1", "--validate-every", "1",
         "--valid-limit", "2", "--min-steps", "0", "--device", "cpu"]
STRANGE = ["[red]a[/red]", "[/]", "[b] c", ":bug:", "{x}", "é 😀"]  # not to be shown as anything else


@contextmanager
def streams(encoding: str = "utf-8", typed: bytes = b"") -> Iterator[Callable[[], tuple[str, str]]]:
    """Standard streams of this encoding, strict as Python's are; what was written to output and errors."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding))
        yield lambda: tuple(stream.buffer.getvalue().decode(encoding) for stream in (out, err))


@pytest.fixture
def printing(sample_store, sample_run) -> dict[str, list[str]]:
    """Commands whose output has signs that not every encoding has."""
    store, run = str(sample_store.path), str(sample_run)
    return {"inspect": ["inspect", store], "inspect --json": ["inspect", store, "--json"], "--help": ["--help"],
            "chat": ["chat", run, "--max_words", "3"], "bench --show": ["bench", "--show", "linear"], "--version": ["--version"]}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "koi8-r", "cp437", "shift_jis", "utf-16", "utf-8"])
@pytest.mark.parametrize("command", ["inspect", "inspect --json", "chat", "bench --show"])
def test_every_encoding_takes_the_output(command, encoding, printing):
    typed = "I failed my exám 😀.\n/why\n".encode(encoding, "replace")
    with streams(encoding, typed) as written:
        assert cli.main(printing[command]) == 0
        shown, _ = written()
    assert len(shown) > 100
    if command == "inspect --json":
        assert json.loads(shown)["context"]
    elif command == "chat" and encoding == "ascii":
        assert "#" in shown and "unknown words" in shown


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", [*STRANGE, os.fsdecode(b"\xff"), "a\nb", "\x1b[31m"])
def test_errors_name_any_path_in_any_encoding(name, encoding, tmp_path):
    with streams(encoding) as written:
        assert cli.main(["inspect", str(tmp_path / name)]) == 1
        _, said = written()
    shown = name.encode(encoding, "backslashreplace").decode(encoding).replace("\n", " ").replace("\x1b", "\\x1b")
    assert said.startswith("error: ") and said.count("\n") == 1 and f"{tmp_path}/{shown}: store not found" in said


def test_bytes_that_are_no_text_are_talked_about_all_the_same(sample_run):
    with streams(typed=b"I failed \xff\xfe my exam.\n") as written:
        assert cli.main(["chat", str(sample_run), "--max_words", "3"]) == 0
        assert "emotion" in written()[0]


@pytest.fixture(scope="module")
def packed(sample_store, tmp_path_factory) -> Path:
    pack_store(sample_store, path := tmp_path_factory.mktemp("packed") / "sample.travel")
    return path


@pytest.mark.parametrize("name", STRANGE)
def test_a_path_is_shown_as_it_is(name, packed, sample_store, sample_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("case_fast.evaluation.report._page", lambda run: "")
    place, cache = tmp_path / name / "x", sample_store.knowledge["cache"]
    for words in (["unpack", str(packed), f"{place}.store"], ["report", str(sample_run), "--out", f"{place}.html"],
                  ["merge-cache", f"{place}.sqlite", cache],
                  ["prepare", "--dialogues", str(place), "--out", f"{tmp_path}/o", "--knowledge", "bundled", "--conceptnet",
                   "bundled", "--lexicon", "bundled"]):
        assert cli.main(words) == (words[0] == "prepare")
        said = capsys.readouterr()
        assert str(place) in said.out + said.err


def test_a_run_lives_in_a_folder_of_any_name(sample_store, tmp_path, capsys):
    run = tmp_path / "".join(STRANGE).replace("/", "-") / "run"
    assert cli.main(["train", "--data", str(sample_store.path), "--out", str(run), *SMALL]) == 0
    assert f"evaluate {run} --data" in capsys.readouterr().out
    assert cli.main(["train", "--data", str(sample_store.path), "--out", str(run), *SMALL, "--resume"]) == 0
    assert cli.main(["evaluate", str(run), "--data", str(sample_store.path), "--limit", "2", "--max_words", "2"]) == 0
    assert f"Written to {run}" in capsys.readouterr().out


def test_a_name_that_is_no_text_is_refused_before_the_work(sample_store, tmp_path, capsys):
    """safetensors writes there, and does not read it back."""
    out = tmp_path / os.fsdecode(b"\xff") / "run"
    assert cli.main(["train", "--data", str(sample_store.path), "--out", str(out), *SMALL]) == 1
    assert "\\udcff/run (its name is no text in UTF-8)" in capsys.readouterr().err and not list(tmp_path.iterdir())


@contextmanager
def closed_pipe(typed: str = "") -> Iterator[Callable[[], str]]:
    """A standard output whose reader has gone away; what was not read of what was typed, and the errors."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stdin", io.StringIO(typed))
        patch.setattr(sys, "stderr", io.StringIO())
        yield lambda: (sys.stdin.read(), sys.stderr.getvalue())


@pytest.mark.parametrize("command", ["inspect", "inspect --json", "bench --show"])
def test_a_reader_that_goes_away_is_no_error(command, printing):
    with closed_pipe() as left:
        assert cli.main(printing[command]) == 0
        assert left() == ("", "")


def test_chat_ends_when_nobody_reads_it_any_more(sample_run):
    with closed_pipe("I failed my exam.\n" * 9) as left:
        assert cli.main(["chat", str(sample_run), "--max_words", "1"]) == 0
        assert left()[0] == "I failed my exam.\n" * 8


def test_training_goes_on_when_nobody_reads_it_any_more(sample_store, tmp_path):
    with closed_pipe() as left:
        assert cli.main(["train", "--data", str(sample_store.path), "--out", str(tmp_path / "run"), *SMALL]) == 0
        assert "error" not in left()[1]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["result"]["stopped"] == "max_steps"


@pytest.mark.parametrize("command", ["inspect", "inspect --json", "bench --show", "--help", "--version"])
def test_an_output_that_is_full_is_said(command, printing, capsys, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(printing[command]) == 1
    assert capsys.readouterr().err == "error: the standard output cannot be written (No space left on device)\n"


def test_a_process_without_standard_streams_works(sample_store, sample_run, tmp_path, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["chat", str(sample_run)]) == 0
    assert cli.main(["pack", str(sample_store.path), str(tmp_path / "s.travel")]) == 0
    assert cli.main(["inspect", "nowhere"]) == 1


def test_the_streams_are_as_they_were_afterwards():
    before = sys.stdin, sys.stdout, sys.stderr
    with streams("cp1252"):
        inside = sys.stdin, sys.stdout, sys.stderr
        cli.main(["--help"])
        assert (sys.stdin, sys.stdout, sys.stderr) == inside and {stream.errors for stream in inside} == {"strict"}
    assert (sys.stdin, sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(("after", "status", "said"), [
    ("| head -c 1", 0, ""), ("> /dev/full", 1, "No space left on device"), (">&- 2>&- <&-", 0, ""), ("2>&1 | head -c 1", 0, ""),
    ("2> /dev/full", 0, ""),
])  # fmt: skip
def test_python_ends_well_too(after, status, said):
    """Of a process of its own: what Python does with its streams when it ends."""
    line = f"set -o pipefail; exec 3>&2; '{sys.executable}' -m case_fast --help {after}"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status and said in done.stderr and "Exception" not in done.stderr and "Traceback" not in done.stderr
