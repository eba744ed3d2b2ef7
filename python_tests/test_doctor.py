"""`case-fast doctor`: a healthy run and store, every state forced by making the fault, and a report that can be pasted."""

from __future__ import annotations

import builtins
import gzip
import io
import json
import shlex
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from safetensors.torch import save_file

from case_fast import cli, cli_arguments, doctor, ops
from case_fast.data import open_store
from case_fast.data.prepare import PrepareSettings, bundled, prepare
from case_fast.doctor import check, files, machine, native, next_step, privacy, software
from case_fast.doctor.check import Check, Look, carried_out, ok, skip, warn
from case_fast.doctor.given import Given
from case_fast.doctor.next_step import NextStep
from case_fast.doctor.run import GivenRun
from case_fast.doctor.show import Display
from case_fast.doctor.store import GivenStore
from case_fast.ops import backend
from case_fast.ops.backend import native_report
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


def of(checks) -> dict[str, Check]:
    found = {item.name: item for item in checks}
    for item in found.values():
        assert item.state in check.STATES and item.reason and (item.remedy or item.state == "ok"), item
        assert "\n" not in item.reason + item.remedy
    return found


def of_store(folder: Path) -> dict[str, Check]:
    return of(carried_out("store", GivenStore(str(folder / "store")).looks(), "store"))


def of_run(folder: Path, *stores: Path) -> dict[str, Check]:
    given = [GivenStore(str(store)) for store in stores]
    return of(carried_out("run", GivenRun(str(folder / "run"), given).looks(), "run"))


def of_next(*paths: Path | str, asked: str = "", before: tuple[Check, ...] = ()) -> dict[str, Check]:
    paths = [str(path) for path in paths]
    return of(carried_out("next step", NextStep(asked, paths, Given(paths), before).looks()))


def of_software() -> dict[str, Check]:
    return of(carried_out("software", software.looks(())))


def of_machine() -> dict[str, Check]:
    return of(carried_out("machine", machine.looks()))


def of_native() -> dict[str, Check]:
    return of(carried_out("native", native.looks()))


def states(found: dict[str, Check]) -> dict[str, str]:
    return {name: item.state for name, item in found.items()}


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


# ---- no check is sound by default


def test_a_check_that_raises_or_finds_nothing_has_failed():
    def stops() -> check.Finding:
        return next(iter(()))

    def looks():
        yield Look("raises", lambda: 1 / 0, "mend it")
        yield Look("stops", stops, "mend it")
        yield Look("says nothing", lambda: None, "mend it")
        yield Look("says ok", lambda: "ok", "mend it")
        yield Look("has no reason", lambda: ok(""), "mend it")
        yield Look("has no remedy", lambda: skip("so", ""), "mend it")
        yield Look("is sound", lambda: ok("so"), "mend it")
        raise OSError(13, "Permission denied", "somewhere")

    found = of(carried_out("group", looks(), "path"))
    assert states(found) == {"raises": "fail", "stops": "fail", "says nothing": "fail", "says ok": "fail",
                             "has no reason": "fail", "has no remedy": "fail", "is sound": "ok", "checks": "fail"}
    assert found["raises"].reason == "ZeroDivisionError: division by zero" and found["raises"].remedy == "mend it"
    assert found["checks"].reason == "somewhere: Permission denied"


def test_a_broken_torch_fails_its_checks_and_nothing_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = of_software()
    assert (found["torch"].state, found["python"].state, found["needed packages"].state) == ("fail", "ok", "ok")
    assert found["torch"].remedy == "pip install torch"


# ---- software


def version_of(changes: dict[str, str | None]):
    real = metadata.version

    def version(name: str) -> str:
        found = changes.get(name, real(name) if name not in changes else None)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    return version


@pytest.mark.parametrize(("name", "changes", "state", "said", "remedy"), [
    ("extra comet", {"transformers": None}, "skip", "transformers not installed; of use for inferences by COMET alone",
     "pip install 'case_fast[comet]'"),
    ("needed packages", {"nltk": None}, "fail", "no nltk", "pip install nltk"),
    ("needed packages", {"jsonargparse": "4.20.0"}, "fail", "4.20.0 jsonargparse",
     "pip install 'jsonargparse[signatures]>=4.49'"),
    ("pinned versions", {"numpy": "1.26.0", "scipy": "1.0"}, "warn", "numpy 1.26.0 (==", "numpy scipy"),
    ("case_fast", {"case_fast": "0.0.1"}, "warn", "pip knows 0.0.1", "pip install"),
    ("case_fast", {"case_fast": None}, "warn", "which pip does not know", "pip install"),
    ("triton", {"triton": None}, "skip", "of use on a GPU alone", "pip install triton"),
])
def test_what_is_installed_wrongly_is_named(name, changes, state, said, remedy, monkeypatch):
    monkeypatch.setattr(metadata, "version", version_of(changes))
    item = of_software()[name]
    assert item.state == state and said in item.reason and remedy in item.remedy


def test_an_old_torch_or_python_has_failed(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    found = of_software()
    assert found["torch"].state == "fail" and "torch>=2.10" in found["torch"].reason
    assert found["python"].state == "fail" and "3.10.2, and case_fast needs >=3.11" in found["python"].reason


def test_installed_without_a_checkout_it_asks_pip_what_is_needed(monkeypatch, tmp_path):
    pytest.importorskip("case_fast")
    expected = software._requirements(), software._extras()
    monkeypatch.setattr(software, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(software, "_PINS", tmp_path / "constraints.txt")
    if software._version("case_fast"):
        assert (software._requirements(), software._extras()) == expected
        assert of_software()["pinned versions"].state == "skip"
        assert software.reinstall() == "pip install --force-reinstall --no-deps case_fast"


def test_two_runtimes_of_openmp_are_a_warning(monkeypatch):
    def loaded(*prefixes: str) -> None:
        found = [{"user_api": "openmp", "prefix": prefix, "filepath": f"lib/{prefix}.so"} for prefix in prefixes]
        monkeypatch.setattr("threadpoolctl.threadpool_info", lambda: found)

    for prefixes, state in ((("libgomp", "libgomp"), "ok"), (("libgomp", "libiomp"), "warn"), (("libomp", "libiomp"), "warn"),
                            ((), "skip")):
        loaded(*prefixes)
        assert of_software()["OpenMP"].state == state, prefixes


@pytest.mark.parametrize(("value", "state"), [("reference", "warn"), ("cuda", "fail"), ("nothing=native", "fail")])
def test_a_chosen_backend_is_named(value, state, monkeypatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", value)
    item = of_software()["variables"]
    assert item.state == state and f"CASE_FAST_BACKEND={value}" in item.reason.replace("'", "")


def test_variables_of_the_command_line_are_told_from_the_users(monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", cli.WAITING["OMP_WAIT_POLICY"])
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    cli.main(["doctor", "--json"])
    (item,) = (item for item in json.loads(capsys.readouterr().out)["checks"] if item["name"] == "variables")
    assert "OMP_DYNAMIC=true" in item["reason"] and "OMP_WAIT_POLICY=PASSIVE (by case-fast)" in item["reason"]


# ---- machine


def test_a_container_limits_cores_threads_and_memory(tmp_path, monkeypatch):
    group = tmp_path / "pod" / "job"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/pod/job\n")
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("50000 100000\n")
    (group / "memory.max").write_text(f"{1 << 30}\n")
    (group / "memory.current").write_text(f"{1 << 29}\n")
    (tmp_path / "meminfo").write_text("MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB\n")
    for name, value in (("_CGROUP", tmp_path), ("_OWN_CGROUP", tmp_path / "own"), ("_MEMORY", tmp_path / "meminfo")):
        monkeypatch.setattr(machine, name, value)
    found = of_machine()
    assert machine.usable_cores() == 0.5 and "0.5 of" in found["cores"].reason
    assert (found["threads"].state, found["threads"].remedy) == ("warn", "export OMP_NUM_THREADS=1")
    assert found["memory"].state == "warn" and found["memory"].reason.startswith("512 MiB of 1.0 GiB free")
    (tmp_path / "meminfo").write_text("nothing\n")
    assert of_machine()["memory"].state == "skip"


def test_fewer_threads_than_cores_are_a_warning_where_a_variable_says_so(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = of_machine()["threads"]
    assert (found.state, found.remedy) == ("warn", "unset OMP_NUM_THREADS")


def test_a_gpu_is_named_and_one_that_torch_does_not_see_is_a_warning(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "nothing")
    assert machine._gpu().state == "skip"
    monkeypatch.setattr(machine, "_DRIVER", driver)
    for cuda, said in ((None, "torch is built for the CPU"), ("12.8", "torch sees no GPU")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert machine._gpu().state == "warn" and said in machine._gpu().reason
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: gpu)
    assert machine._gpu().reason == ("NVIDIA H100 (80.0 GiB, compute capability 9.0); "
                                     "NVIDIA UNIX x86_64 Kernel Module  570.86.15")


def test_without_a_compiler_only_a_missing_module_is_a_warning(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    for available, state in ((True, "skip"), (False, "warn")):
        monkeypatch.setattr(ops, "native_report", lambda available=available: {"available": available, "reason": "so"})
        assert machine._compilers().state == state


# ---- kernels


def test_every_family_of_ops_has_a_call():
    report = native_report()
    if report["available"]:
        assert set(native._calls("cpu")) == set(report["families"])
    found = of_native()
    assert set(found) == {"module", "CUDA", *native._calls("cpu")}
    assert all(found[family].state == "ok" for family in native._calls("cpu"))


@pytest.fixture
def no_native(monkeypatch):
    """A native module that cannot be used, for a reason."""
    def lacking(reason: str) -> None:
        monkeypatch.setattr(backend, "_native_missing", reason)
        backend._choose.cache_clear()

    yield lacking
    monkeypatch.undo()
    backend._choose.cache_clear()


@pytest.mark.parametrize(("reason", "state"), [
    ("it is not built for this Python; pip install -e . builds it", "warn"),
    ("it is version 0.1.0, the package is 0.2.0; install case_fast again", "fail"),
    ("it cannot be loaded (undefined symbol); install case_fast again", "fail"),
])
def test_without_the_native_module_ops_run_in_plain_torch(reason, state, no_native):
    no_native(reason)
    found = of_native()
    assert found["module"].state == state and reason in found["module"].reason and "pip install" in found["module"].remedy
    assert found["CUDA"].state == "skip"
    assert found["linear"].state == "ok" and found["linear"].reason.startswith("reference (native not used: native module: it ")


@pytest.mark.parametrize(("op", "broken", "said"), [
    ("linear", lambda **given: ops.reference.linear(**given) + 1e-3, "the result is off by 0.001"),
    ("linear", lambda **given: ops.reference.linear(**given) * torch.nan, "is off by nan"),
    ("linear", lambda **given: ops.reference.linear(**given)[:2], "the result is off by inf"),
    ("packed_attention", lambda **given: ops.reference.packed_attention(**given | {"value": given["value"].detach()})
     + 0 * given["value"], "the gradient of value is off by"),
    ("graph_attention", lambda **given: 1 / 0, "ZeroDivisionError"),
])
def test_an_op_that_gives_a_wrong_value_has_failed(op, broken, said, monkeypatch):
    monkeypatch.setattr(ops, op, broken)
    found = of_native()
    assert found[op].state == "fail" and said in found[op].reason
    assert found[op].remedy == f"export CASE_FAST_BACKEND={op}=reference"
    assert {name for name, item in found.items() if item.state == "fail"} == {op}


def test_cuda_of_the_module_is_told_beside_what_torch_sees(monkeypatch):
    report = {"available": True, "reason": "", "cuda": True, "cuda_runtime": "13.0", "cuda_architectures": [80, 90],
              "cuda_devices": 0, "cuda_status": "no CUDA driver is installed"}
    for seen, changes, state in ((False, {}, "skip"), (True, {}, "fail"), (True, {"cuda_devices": 1}, "ok"),
                                 (True, {"cuda": False}, "warn"), (False, {"cuda": False}, "skip")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(ops, "native_report", lambda changes=changes: report | changes)
        assert native._cuda().state == state, (seen, changes)


# ---- data


@pytest.mark.parametrize(("kind", "path"), [
    ("EmpatheticDialogues", bundled("dialogues")), ("ConceptNet", bundled("conceptnet")), ("NRC-VAD", bundled("lexicon")),
    ("ATOMIC", bundled("dialogues").parent / "atomic" / "events.tsv"),
])
def test_a_data_set_is_known_by_its_rows(kind, path, tmp_path):
    if path.is_file():  # its name tells nothing, and it may be packed
        path = tmp_path / "some file"
        path.write_bytes(gzip.compress(_first_bytes(kind)))
    ((place, found, finding),) = files.look(path)
    assert (place, found, finding.state) == (path, kind, "ok"), finding
    assert files.SOURCES[kind].licence in finding.reason and files.SOURCES[kind].published in finding.reason


def _first_bytes(kind: str) -> bytes:
    sample = bundled("dialogues").parent
    return {"ConceptNet": bundled("conceptnet"), "NRC-VAD": bundled("lexicon"),
            "ATOMIC": sample / "atomic" / "events.tsv"}[kind].read_bytes()


def test_a_folder_is_searched_and_prepare_told_what_is_missing(tmp_path):
    sample = bundled("dialogues").parent
    shutil.copytree(sample / "dialogues", tmp_path / "data" / "ed")
    shutil.copytree(sample / "conceptnet", tmp_path / "data" / "conceptnet")
    (tmp_path / "data" / "README").write_text("some text\n\nmore text\n")
    given = Given([str(tmp_path / "data")])
    assert set(given.data) == {"EmpatheticDialogues", "ConceptNet"}
    found = of(carried_out("data", given.looks("prepare")))
    assert states(found) == {"EmpatheticDialogues": "ok", "ConceptNet": "ok", "ATOMIC": "skip", "NRC-VAD": "skip",
                             "GloVe": "skip"}
    assert found["NRC-VAD"].reason.startswith("not given; research use")
    found = of_next(tmp_path / "data")
    assert found["command"].state == "warn" and "to prepare takes COMET and NRC-VAD too" in found["command"].reason
    assert found["time"].state == "skip" and found["disk"].state in ("ok", "warn", "fail")
    assert of_next(tmp_path / "data", asked="prepare")["command"].state == "fail"
    found = of_next(tmp_path / "data", sample / "atomic", sample / "lexicon", asked="prepare")["command"]
    assert found.state == "ok"
    words = parsed(found.remedy)
    assert dict(zip(words[::2], words[1::2], strict=True)) == {
        "--dialogues": str(tmp_path / "data" / "ed"), "--conceptnet": str(tmp_path / "data" / "conceptnet" / "assertions.csv"),
        "--knowledge": f"atomic:{sample / 'atomic'}", "--lexicon": str(sample / "lexicon" / "lexicon.txt"), "--out": "ed.store"}


@pytest.mark.parametrize(("content", "name", "kind", "state", "said"), [
    (gzip.compress(b"happy\t0.9\t0.5\t0.4\n" * 3000)[:60], "lexicon.gz", "damaged", "fail", "damaged file"),
    (b"\xff\xfe\x00" * 500, "noise", "unknown", "fail", "no reader takes its first 2,000 lines"),
    (b"", "empty", "damaged", "fail", "an empty file"),
    (b"word\tvalence\tarousal\tdominance\nhappy\t0.9\t0.5\t0.4\nsad\tlow\t0.5\t0.1\nglad\t0.8\t0.5\t0.4\n", "vad.txt", "NRC-VAD",
     "warn", "1 malformed (value is not a number: 1, the first in line 3"),
    (b"".join(b"w%d 0.1 0.2 0.3\n" % (n % 50) for n in range(60)), "vectors", "GloVe", "warn", "10 malformed (word occurs twice"),
    (b"".join(b"w%d 0.1 0.2 0.3 0.4 0.5\n" % n for n in range(60)), "vectors", "GloVe", "warn",
     "5 numbers a word; licence on its page; nlp.stanford.edu/projects/glove; the model's width is 300"),
    (b"joy\thappy\t1\nsad\tjoy\t0\n", "emolex", "NRC EmoLex", "ok", "2 rows"),
    (b"conv_id,utterance_idx,context\n", "train.csv", "other", "skip", "which is read as a folder"),
    (b"\x80\x04\x95", "dataset_preproc.p", "other", "skip", "a pickle"),
    (b"SQLite format 3\0", "cache", "other", "skip", "a cache of inferences"),
    (b"case_fast travel 1\n", "ed.travel", "other", "skip", "a packed store"),
    (None, "nowhere", "missing", "fail", "not found"),
])
def test_a_file_that_is_no_sound_data_set_is_told(content, name, kind, state, said, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    ((_, found, finding),) = files.look(file)
    assert (found, finding.state) == (kind, state), finding
    assert said in finding.reason and (finding.remedy or state == "ok")


def test_a_file_that_cannot_be_opened_has_failed(tmp_path, monkeypatch):
    file = tmp_path / "secret"
    file.write_bytes(_first_bytes("NRC-VAD"))
    real = builtins.open

    def refuse(path, *arguments, **named):
        if str(path) == str(file):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(builtins, "open", refuse)
    found = of(carried_out("data", Given([str(file)]).looks(None)))["damaged"]
    assert found.state == "fail" and found.reason == f"{file}: Permission denied" and found.remedy == f"ls -l {file}"


def test_a_folder_of_comet_needs_sound_weights_and_transformers(tmp_path, monkeypatch):
    folder = tmp_path / "comet"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    weights = folder / "model.safetensors"
    save_file({"x": torch.zeros(100)}, weights)
    ((_, kind, finding),) = files.look(folder)
    assert kind == "COMET" and finding.state == ("ok" if "transformers" in _installed() else "fail")
    monkeypatch.setitem(sys.modules, "transformers", None)
    ((_, _, finding),) = files.look(folder)
    assert finding.state == "fail" and finding.remedy == "pip install 'case_fast[comet]'"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert next(files.look(folder))[2].state == "fail"
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK cut short")
    assert "cut short" in next(files.look(folder))[2].reason
    (folder / "pytorch_model.bin").unlink()
    assert "no weights" in next(files.look(folder))[2].reason


def _installed() -> set[str]:
    return {name for name in ("transformers",) if software._version(name)}


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
    assert of_run(copy, copy / "store")["vocabulary"].state == "ok"
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
    step = NextStep("", [], Given([str(sample / "store")]), [])
    needed = step._needed()
    assert needed > 4 * 10 * step._parameters()  # the best weights, and three checkpoints with two moments each
    for free, state in ((needed - 1, "fail"), (needed, "warn"), (2 * needed, "ok")):
        monkeypatch.setattr(next_step.shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        found = step._disk()
        assert found.state == state and f"about {check.size(needed)} needed to train" in found.reason
        assert found.remedy == ("" if state == "ok" else "df -h .")


def parsed(line: str) -> list[str]:
    """The words of a line for the command line, which takes them."""
    program, name, *words = shlex.split(line)
    assert program == "case-fast"
    parser = ArgumentParser(prog=name)
    getattr(cli_arguments, name)(parser)
    parser.parse_args([cli._underscored(word) for word in words])
    return words


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


def test_the_time_of_training_is_estimated_by_steps_of_each_phase(sample, monkeypatch):
    found = of_next(sample / "store")["time"]
    assert found.state == "ok" and "of phase bow at" in found.reason and "of phase all at" in found.reason
    assert "by a probe of 0 s" in found.reason
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
    assert text.count(f"       {line}\n") == 2 and "store my [red]store\n" in text and "[some]" in text
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


def test_states_and_sizes_in_words():
    assert [check.size(count) for count in (5, 2048, 3 << 20, 3 << 29)] == ["5 bytes", "2 KiB", "3 MiB", "1.5 GiB"]
    assert check.said(ValueError("x" * 1000)).endswith(" ...") and warn("a", "b").state == "warn"
