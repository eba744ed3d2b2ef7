"""`case-fast doctor`: no check is sound by default; software, machine, kernels and data, each state by making the fault."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import shutil
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from doctor_helpers import of, of_machine, of_native, of_next, of_software, parsed, states
from safetensors.torch import save_file

from case_fast import cli, ops
from case_fast.commands.machine import WAITING
from case_fast.data.prepare import bundled
from case_fast.doctor import check, files, machine, native, next_step, software
from case_fast.doctor.check import Look, carried_out, ok, skip
from case_fast.doctor.given import Given
from case_fast.ops import backend
from case_fast.ops.backend import native_report
from case_fast.sources import SOURCES


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(next_step, "SECONDS", 0.0)
    monkeypatch.delenv("CASE_FAST_BACKEND", raising=False)


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
    monkeypatch.setenv("OMP_WAIT_POLICY", WAITING["OMP_WAIT_POLICY"])
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    cli.main(["doctor", "--json"])
    (item,) = (item for item in json.loads(capsys.readouterr().out)["checks"] if item["name"] == "variables")
    assert "OMP_DYNAMIC=true" in item["reason"] and "by case-fast: " in item["reason"].partition("OMP_WAIT_POLICY=PASSIVE")[0]


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
    ("linear", lambda **given: ops.reference.linear(**given) + 1e-3, "result is off by 0.001"),
    ("linear", lambda **given: ops.reference.linear(**given) * torch.nan, "is off by nan"),
    ("linear", lambda **given: ops.reference.linear(**given)[:2], "result is off by inf"),
    ("packed_attention", lambda **given: ops.reference.packed_attention(**given | {"value": given["value"].detach()})
     + 0 * given["value"], "gradient of value is off by"),
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
    assert SOURCES[kind].licence in finding.reason and SOURCES[kind].published in finding.reason


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
    (gzip.compress(b"happy\t0.9\t0.5\t0.4\n" * 3000, mtime=0)[:60], "lexicon.gz", "damaged", "fail", "damaged file"),
    (b"\xff\xfe\x00" * 500, "noise", "unknown", "fail", "no reader takes its first 2,000 lines"),
    (b"", "empty", "damaged", "fail", "an empty file"),
    (b"word\tvalence\tarousal\tdominance\nhappy\t0.9\t0.5\t0.4\nsad\tlow\t0.5\t0.1\nglad\t0.8\t0.5\t0.4\n", "vad.txt", "NRC-VAD",
     "warn", "1 malformed (value is not a number: 1, the first in line 3"),
    (b"".join(b"w%d 0.1 0.2 0.3\n" % (n % 50) for n in range(60)), "vectors", "GloVe", "warn", "10 malformed (word occurs twice"),
    (b"".join(b"w%d 0.1 0.2 0.3 0.4 0.5\n" % n for n in range(60)), "vectors", "GloVe", "warn",
     "5 numbers a word; PDDL 1.0; nlp.stanford.edu/projects/glove; the model's width is 300"),
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


def test_a_pipe_is_not_waited_for_and_a_large_folder_not_searched_to_its_end(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    assert [found[1] for found in files.look(tmp_path / "pipe")] == ["unknown"]
    (tmp_path / "pipe").unlink()
    assert [found[2].state for found in files.look(tmp_path)] == ["fail"]  # nothing in it
    for name in "abc":
        (tmp_path / name).write_bytes(b"happy\t0.9\t0.5\t0.4\n")
    monkeypatch.setattr(files, "_FILES", 2)
    assert [(found[1], found[2].state) for found in files.look(tmp_path)] == [("NRC-VAD", "ok")] * 2 + [("other", "skip")]


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
