"""`case-fast doctor`: a healthy run and store, every state forced by making the fault, and a report that can be pasted."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from doctor_helpers import of, of_next, of_run, of_store, parsed, states
from rich.console import Console
from safetensors.torch import save_file

from case_fast import checksums, cli, doctor
from case_fast.data import open_store
from case_fast.data.prepare import PrepareSettings, prepare
from case_fast.doctor import check, machine, next_step, privacy
from case_fast.doctor.check import Check, carried_out, ok, warn
from case_fast.doctor.given import Given
from case_fast.doctor.next_step import NextStep
from case_fast.doctor.show import Display
from case_fast.optional import PlainConsole
from case_fast.training import preset, train

SMALL = {"model": {"d_model": 16, "ffn": 16}, "phase1_steps": 2, "max_steps": 4, "validate_every": 2, "valid_limit": 4,
         "min_steps": 0, "checkpoint_every": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """A folder with store/ and run/, whose training has finished; read only."""
    folder = tmp_path_factory.mktemp("doctor")
    prepare(PrepareSettings("bundled", "bundled", "bundled", "bundled", str(folder / "store"), limit=8))
    train(open_store(folder / "store"), folder / "run", preset("demo", **SMALL), PlainConsole())
    return folder


@pytest.fixture
def copy(sample, tmp_path) -> Path:
    return shutil.copytree(sample, tmp_path / "copy")


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(next_step, "SECONDS", 0.0)
    monkeypatch.delenv("CASE_FAST_BACKEND", raising=False)


# ---- all of it


def test_a_healthy_run_and_store_are_sound_and_nothing_is_written(sample, tmp_path, monkeypatch, capsys):
    def contents() -> dict[str, tuple]:
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else sorted(path.iterdir()))
                for folder in (sample, tmp_path) for path in [folder, *folder.rglob("*")]}

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.chdir(tmp_path)
    for name in ("mkstemp", "mkdtemp", "TemporaryFile"):
        monkeypatch.setattr(tempfile, name, refuse)
    before = contents()
    assert cli.main(["doctor", str(sample / "run"), str(sample / "store"), "--json", "--full"]) == 0
    assert contents() == before
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "case_fast doctor 1" and found["status"] == 0 and found["for"] is None
    assert found["states"] == {state: sum(item["state"] == state for item in found["checks"]) for state in check.STATES}
    by_group: dict[str, dict[str, str]] = {}
    for item in found["checks"]:
        assert list(item) == ["group", "path", "name", "state", "reason", "remedy"]
        assert item["reason"] and (item["remedy"] or item["state"] == "ok"), item
        by_group.setdefault(item["group"], {})[item["name"]] = item["state"]
    assert list(by_group) == ["software", "machine", "native", "store", "run", "next step", "privacy"]
    assert by_group["store"] == {"format": "ok", "arrays": "ok", "checksums": "ok", "examples": "ok", "fields": "ok",
                                 "word vectors": "skip"}
    assert by_group["run"] == dict.fromkeys(("settings", "training", "weights", "vocabulary", "store", "checkpoints",
                                             "knowledge"), "ok")
    assert by_group["next step"] == dict.fromkeys(("disk", "time", "command"), "ok")
    assert found["checks"][-2]["remedy"] == f"case-fast evaluate {sample / 'run'} --data {sample / 'store'} --split test"


def test_without_paths_it_looks_at_the_machine_and_names_the_demo(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "no path given" in shown and "case-fast demo --out demo" in shown and " 0 fail" in shown
    assert "backend of" not in shown  # the log of what is looked at


def test_json_is_the_same_again_but_for_what_is_measured(sample, monkeypatch, capsys):
    monkeypatch.setattr(machine, "_memory", lambda: ok("enough"))
    monkeypatch.setattr(next_step.shutil, "disk_usage", lambda place: SimpleNamespace(free=1 << 40))
    monkeypatch.setattr(next_step, "training_steps", lambda *arguments: {"bow": 0.1, "all": 0.25})
    said = []
    for _ in range(2):
        assert cli.main(["doctor", str(sample / "store"), "--json"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    item = json.loads(said[0])["checks"][-3]
    assert item["name"] == "time" and "250 ms" in item["reason"] and "by a probe of" in item["reason"]


def test_the_exit_status_says_whether_a_check_failed(copy, capsys):
    store = str(copy / "store")
    assert cli.main(["doctor", store, "--for", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["for"] == "train"
    (copy / "store" / "texts.safetensors").unlink()
    assert cli.main(["doctor", store, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == 1
    for words in (["--for", "web"], ["--nonsense"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["doctor", *words])
        assert stopped.value.code == 2
        capsys.readouterr()


# ---- privacy


def test_json_tells_no_home_folder_user_or_host_unless_asked(copy, monkeypatch, capsys):
    home = copy / "home" / "nightingale"
    home.mkdir(parents=True)
    shutil.move(copy / "store", home / "store")
    shared = copy / "of-nightingale on florence" / "run"
    shutil.move(copy / "run", shared)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("OMP_PLACES", "florence.example.org")
    monkeypatch.setattr(privacy.getpass, "getuser", lambda: "nightingale")
    monkeypatch.setattr(privacy.socket, "gethostname", lambda: "florence.example.org")
    words = ["doctor", str(home / "store"), str(shared), "--json"]
    cli.main(words)
    said = capsys.readouterr().out
    assert str(home) not in said and "nightingale" not in said.lower() and "florence" not in said.lower()
    found = json.loads(said)
    assert found["full"] is False and found["checks"][-1]["name"] == "--json" and found["checks"][-1]["state"] == "ok"
    assert "~/store" in {item["path"] for item in found["checks"]} and "of-USER on HOST" in said
    cli.main([*words, "--full"])
    said = capsys.readouterr().out
    assert str(home / "store") in said and "florence" in said
    last = json.loads(said)["checks"][-1]
    assert last["state"] == "warn" and last["reason"] == "tells a home folder and a host and a user, since --full asks for it"


def test_a_private_word_that_were_left_in_is_a_failed_check(monkeypatch):
    told = Check("machine", "", "cores", "ok", "of nightingale", "")
    monkeypatch.setattr(privacy.getpass, "getuser", lambda: "nightingale")
    monkeypatch.setattr(privacy, "redacted", lambda item: item)
    (item,) = carried_out("privacy", privacy.looks([told], full=False))
    assert item.state == "fail" and item.reason == "tells a user"


# ---- stores


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_of_an_array_is_found_by_its_checksum(copy):
    flip(copy / "store" / "train.safetensors", -5)
    found = of_store(copy)
    assert states(found) | {"word vectors": "skip"} == {"format": "ok", "arrays": "ok", "checksums": "fail", "examples": "ok",
                                                        "fields": "ok", "word vectors": "skip"}
    assert found["checksums"].reason.startswith("train.safetensors: not the bytes")
    words = shlex.split(found["checksums"].remedy)
    assert words[:2] == ["case-fast", "prepare"] and words[words.index("--out") + 1] == str(copy / "store")


@pytest.mark.parametrize(("damage", "failing"), [
    (lambda store: (store / "valid.safetensors").write_bytes((store / "valid.safetensors").read_bytes()[:-20]), "arrays"),
    (lambda store: (store / "texts.safetensors").unlink(), "arrays"),
    (lambda store: (store / "vocabulary.json").write_text("[]"), "arrays"),
    (lambda store: (store / "manifest.json").write_text("{"), "format"),
    (lambda store: _change(store / "manifest.json", format="case_fast store 0"), "format"),
    (lambda store: _change(store / "manifest.json", emotions=["joy"]), "format"),
])
def test_a_damaged_part_of_a_store_fails_a_check(damage, failing, copy):
    damage(copy / "store")
    found = of_store(copy)
    assert found[failing].state == "fail" and found[failing].remedy.startswith("case-fast prepare")
    assert found["checksums"].state == "fail"
    assert of_next(copy / "store", before=tuple(found.values()))["command"].state == "skip"


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_store_too_large_for_a_look_is_no_sound_one(copy, monkeypatch):
    monkeypatch.setattr("case_fast.doctor.store.MOST_BYTES", 1000)
    assert of_store(copy)["checksums"].state == "skip"


def test_a_store_of_an_earlier_version_is_a_warning(sample, monkeypatch):
    monkeypatch.setattr("case_fast.data.store.Store._lacking", lambda self, split: ["feedback"])
    found = of_store(sample)["fields"]
    assert found.state == "warn" and "no field feedback" in found.reason


# ---- runs


def cut(run: Path, step: int) -> None:
    file = run / "checkpoints" / f"{step:08d}" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_checkpoints_cut_short_warn_while_an_older_one_is_whole(copy):
    run, store = copy / "run", copy / "store"
    newest, older = sorted((int(path.name) for path in (run / "checkpoints").iterdir() if path.is_dir()), reverse=True)
    cut(run, newest)
    found = of_run(copy, store)["checkpoints"]
    assert found.state == "warn" and f"the newest that is whole is of step {older}" in found.reason
    assert f"{newest:08d}/optimizer.safetensors: damaged" in found.reason and "--resume" in found.remedy
    assert cli.main(shlex.split(found.remedy)[1:]) == 0  # the line does what it says
    assert of_run(copy, store)["checkpoints"].state == "ok"
    for path in (run / "checkpoints").iterdir():
        if path.is_dir() and path.name.isdecimal():
            cut(run, int(path.name))
    found = of_run(copy, store)["checkpoints"]
    assert found.state == "fail" and "none of 2 checkpoints is whole" in found.reason
    shutil.rmtree(run / "checkpoints")
    assert of_run(copy, store)["checkpoints"].state == "skip"


def test_a_vocabulary_that_differs_has_failed(copy):
    path = copy / "run" / "features" / "vocabulary.json"
    words = json.loads(path.read_text())
    path.write_text(json.dumps([*words, "a word of its own"]))
    found = of_run(copy)["vocabulary"]
    assert found.state == "fail" and "they are of different runs" in found.reason
    assert found.remedy.startswith(f"rm -r {copy / 'run' / 'features'} && case-fast train --config")
    path.write_text(json.dumps(words))
    assert of_run(copy)["vocabulary"].state == of_run(copy, copy / "store")["vocabulary"].state == "ok"
    path = copy / "store" / "vocabulary.json"
    path.write_text(json.dumps([*words[:8], *sorted(words[8:], reverse=True)]))  # as many, in another order
    found = of_run(copy, copy / "store")["vocabulary"]
    assert found.state == "fail" and f"other ones in {copy / 'store'}" in found.reason


@pytest.mark.parametrize(("damage", "name", "state", "said"), [
    (lambda run: (run / "config.json").write_text("{"), "settings", "fail", "no config.json that can be read"),
    (lambda run: _change(run / "config.json", colour=1), "settings", "fail", "unknown setting colour"),
    (lambda run: (run / "log.jsonl").write_text("{\n"), "training", "warn", "1 damaged line"),
    (lambda run: _change(run / "manifest.json", result=None), "training", "ok", "begun, not finished: step 6"),
    (lambda run: (run / "failure").mkdir() or (run / "failure" / "step-00000003.json").write_text("{}"), "training", "warn",
     "not finite: step-00000003.json"),
    (lambda run: shutil.rmtree(run / "best"), "weights", "skip", "none yet"),
    (lambda run: (run / "best" / "model.safetensors").write_bytes(b"cut"), "weights", "fail", "damaged"),
    (lambda run: _change(run / "manifest.json", store={}), "store", "warn", "does not say"),
    (lambda run: _change(run / "manifest.json", store={"path": "gone", "fingerprint": "0" * 64}), "store", "warn", "not there"),
    (lambda run: _change(run / "features" / "knowledge.json", spec="atomic:gone"), "knowledge", "warn", "not there any more"),
    (lambda run: _change(run / "features" / "knowledge.json", spec="imported:00"), "knowledge", "warn", "imported file"),
])
def test_a_damaged_or_unfinished_run_is_told(damage, name, state, said, copy):
    damage(copy / "run")
    found = of_run(copy)[name]
    assert found.state == state and said in found.reason


def test_weights_that_are_not_finite_have_failed(copy):
    from safetensors.torch import load_file

    path = copy / "run" / "best" / "model.safetensors"
    weights = load_file(path)
    next(x for x in weights.values() if x.is_floating_point()).view(-1)[0] = torch.nan
    save_file(weights, path)
    checksums.write(path.parent)
    found = of_run(copy)["weights"]
    assert found.state == "fail" and "not finite" in found.reason


def test_a_run_beside_another_store_is_a_warning(copy):
    _change(copy / "store" / "manifest.json", fingerprint="0" * 64)
    assert of_run(copy, copy / "store")["store"].state == "warn"


def test_weights_alone_are_opened(sample, tmp_path):
    found = of(carried_out("data", Given([str(sample / "run" / "best")]).looks(None)))
    assert found["weights"].state == "ok" and "CASE, " in found["weights"].reason
    shutil.copytree(sample / "run" / "best", tmp_path / "best")
    (tmp_path / "best" / "model.safetensors").write_bytes(b"")
    assert of(carried_out("data", Given([str(tmp_path / "best")]).looks(None)))["weights"].state == "fail"


# ---- what comes next


def test_too_little_disk_fails_and_little_warns(sample, monkeypatch):
    step = NextStep("", [], Given([str(sample / "store")]), [], 0.0)
    needed = step._needed()
    assert needed > 4 * 10 * step._parameters()  # the best weights, and three checkpoints with two moments each
    for free, state in ((needed - 1, "fail"), (needed, "warn"), (2 * needed, "ok")):
        monkeypatch.setattr(next_step.shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        found = step._disk()
        assert found.state == state and f"about {check.size(needed)} needed to train" in found.reason
        assert found.remedy == ("" if state == "ok" else "df -h .")


def test_the_next_step_follows_from_what_is_given(copy):
    store, run = copy / "store", copy / "run"
    found = of_next(store)["command"].remedy
    assert found == f"case-fast train --preset demo --data {store} --out ed.run" and parsed(found)
    found = of_next(run)["command"].remedy
    assert found == f"case-fast chat {run}" and parsed(found)
    assert of_next(run, asked="evaluate")["command"].state == "fail"  # needs a store
    assert of_next(asked="chat")["command"].reason == "to chat takes a run too, which was not given"
    assert of_next(asked="train")["command"].remedy == "case-fast doctor STORE --for train"
    assert of_next()["command"].remedy == "case-fast demo --out demo"
    found = of_next(run, store)
    assert "for the split test" in found["time"].reason and parsed(found["command"].remedy)
    _change(run / "manifest.json", result=None)
    found = of_next(run, store)
    assert "of phase" not in found["time"].reason and "no step is left" in found["time"].reason
    assert found["command"].reason == "goes on with the run" and parsed(found["command"].remedy)


def test_what_is_sound_but_does_not_go_together_is_no_next_step(copy):
    store, run = copy / "store", copy / "run"
    _change(store / "manifest.json", fingerprint="0" * 64)
    found = of_next(run, store, asked="train")
    assert found["command"].state == "fail" and "was trained on another store" in found["command"].reason
    assert found["time"].state == "skip" and parsed(found["command"].remedy)
    shutil.rmtree(run / "best")
    for asked in ("evaluate", "chat"):
        found = of_next(run, store, asked=asked)
        assert found["command"].state == "fail" and f"no weights to {asked} with yet" in found["command"].reason
        assert found["command"].remedy.endswith("--resume")


def test_the_time_of_training_is_estimated_by_steps_of_each_phase(sample, monkeypatch):
    found = of_next(sample / "store")["time"]
    assert found.state == "ok" and "of phase bow at" in found.reason and "of phase all at" in found.reason
    assert re.search(r"at least, by a probe of \d+\.\d s: ", found.reason)
    monkeypatch.setattr(next_step, "training_steps", lambda *arguments: {"bow": 1.0, "all": 3600.0})
    assert "about 13 days at least" in of_next(sample / "store")["time"].reason  # 300 steps at least


# ---- what a user sees


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_the_lines_fit_the_terminal_and_those_to_paste_are_whole(width):
    shown = io.StringIO()
    display = Display(Console(file=shown, width=width))
    line = "case-fast prepare --dialogues " + "long/" * 30 + "[bold]ed"
    checks = [Check("software", "", "needed packages", "ok", "one two " * 30, ""),
              Check("store", "my [red]store", "checksums", "fail", "a reason of [some] words " * 6, line),
              Check("store", "my [red]store", "fields", "warn", "w" * 150, line),
              Check("next step", "", "time", "skip", "so", "df -h ."),
              Check("next step", "", "linear_cross_entropy", "ok", "so", "")]
    for item in checks:
        display.show(item)
    display.end(checks)
    text = shown.getvalue()
    assert text.count(f"\n    {line}\n") == 2 and "store: my [red]store\n" in text and "[some]" in text
    lines = [found for found in text.splitlines() if line not in found]
    assert all(len(found) <= width and found == found.rstrip() for found in lines)
    assert "2 ok, 1 skip, 1 warn, 1 fail (checksums of my [red]store)" in " ".join(text.split())
    assert "".join(text.split()).count("w" * 150) == 1


def test_examine_carries_out_one_check_after_the_other_and_keeps_the_log_as_it_was():
    import logging

    log = logging.getLogger("case_fast")
    before, checks = log.level, doctor.examine()
    assert next(checks).name == "case_fast" and log.level > logging.CRITICAL
    checks.close()
    assert log.level == before


def test_sizes_and_errors_in_words():
    assert [check.size(count) for count in (5, 2048, 3 << 20, 3 << 29)] == ["5 bytes", "2 KiB", "3 MiB", "1.5 GiB"]
    assert check.said(ValueError("x" * 1000)).endswith(" ...") and warn("a", "b").state == "warn"
