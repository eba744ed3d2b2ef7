"""benchmarks/gpu.sh: a stage that fails in whatever way costs itself alone, a run that is killed leaves what has ended, and what
its record holds is told. No GPU: DRY=1 has everything tiny on the CPU, and with GPU_SCALE all that a stage does is to sleep.

    python -m python_tests.ops.test_benchmark_gpu    runs of full length killed at 20 to 400 s; each fault in each stage
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

import case_fast
from benchmarks import command, families, gpu, gpu_results, gpu_tests
from benchmarks.measure import LAUNCHED, OURS
from benchmarks.report import summary
from case_fast import cli

ROOT = Path(case_fast.__file__).parents[1]
STAGES = ["device", "build", "smoke", "training", "tests", "sanitizers", "ours", "peers", "variants"]
SECONDS = 540  # of all stages


def begin(out: Path, **environment: str) -> subprocess.Popen:
    """gpu.sh in a group of its own, as a command that is killed with all that it has started."""
    unwanted = {"STORE", "FAMILIES", "GPU_SCALE", "GPU_FAULT", "TRITON_INTERPRET", "CASE_FAST_BACKEND"}
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    given = kept | {"DRY": "1", "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([str(ROOT / "benchmarks" / "gpu.sh")], cwd=out.parent, env=given, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def record_of(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text())


def states(record: dict) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in record["stages"]}


def part(record: dict, stage: str, place: int = 0) -> dict:
    return next(entry for entry in record["stages"] if entry["name"] == stage)["parts"][place]


# ---- the whole way


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path, sample_store):
    run = begin(tmp_path / "out", FAMILIES="segment_sum", STORE=str(sample_store.path))  # the quickest in Triton's interpreter
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said
    record = record_of(tmp_path / "out")
    assert record["dry"] and record["finished"] and record["seconds"] < SECONDS
    assert states(record) == dict.fromkeys(STAGES, "ok"), said
    assert gpu_results.only(record, "device")["copy_tb_s"] > 0
    assert gpu_results.only(record, "smoke") == {"ran": ["segment_sum"], "left_out": {}, "failed": {}}
    tests = gpu_results.only(record, "tests")
    assert tests["passed"] >= 3 and tests["begun"] == tests["collected"] and not tests["failing"] and not tests["running"]
    assert "0 failures" in gpu_results.only(record, "sanitizers")["summary"]
    assert {*gpu_results.only(record, "training")["phases"]} == {"bow", "all"}
    measured = {"ours": {OURS}, "peers": {OURS, "index_add, eager"}, "variants": {OURS, "case_fast, sorted first"}}
    for stage, peers in measured.items():
        (case,) = gpu_results.cases(record, stage)
        assert peers <= {row["peer"] for row in case["rows"] if "median_ms" in row}
        assert case["needs"]["forward"]["flop"] > 0
    told = gpu_results.markdown(record)
    assert told.startswith("# none: a dry run") and "A dry run on a CPU" in told and "| segment_sum | 30x1:5 | forward |" in told
    assert gpu_results.overview(record) in said
    gpu_results.plot(record, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 500


def test_the_stages_fit_in_nine_minutes_and_know_every_family(monkeypatch):
    monkeypatch.setenv("STORE", "a.travel")
    listed = gpu.stages(families())
    assert [stage.name for stage in listed] == STAGES
    assert sum(stage.limit for stage in listed if not stage.beside) <= SECONDS - 6  # for what is between them
    assert all(stage.limit == before.limit for before, stage in zip(listed, listed[1:], strict=False) if stage.beside)
    for stage in listed:
        if len(stage.jobs) > 1:
            assert [*stage.jobs] == (list(gpu.CHECKS) if stage.name == "sanitizers" else families())
    assert sum(stage.limit for stage in gpu.recipe(Path("out"))) <= 570


def test_a_dry_run_never_writes_into_the_results(tmp_path):
    run = begin(tmp_path / "out", OUT="")
    assert run.wait(60) == 1 and "DRY=1 needs OUT" in run.stdout.read()
    run = begin(tmp_path / "out", FAMILIES="sorting")
    assert run.wait(60) == 1 and "FAMILIES names sorting; there are " in run.stdout.read()


# ---- faults


FAULTS = {"crash": ("crashed", "SIGSEGV"), "hang": ("timeout", "stopped after"), "memory": ("failed", "MemoryError")}


def test_without_a_gpu_nothing_begins(monkeypatch):
    monkeypatch.setattr(gpu, "gpu_name", lambda: "")
    monkeypatch.setattr(gpu, "DRY", False)
    monkeypatch.setattr(sys, "argv", ["gpu.sh"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="sees a GPU; DRY=1 OUT=folder"):
            gpu.main()
    finally:
        signal.signal(signal.SIGTERM, before)



@pytest.mark.slow
def test_faults_cost_their_own_parts_alone(tmp_path):
    faulty(tmp_path, {"device": "hang", "smoke": "crash", "tests": "memory", "sanitizers": "crash", "peers": "memory",
                      "variants": "crash"}, 0.1)


def faulty(folder: Path, faults: dict[str, str], scale: float) -> None:
    """A run in which the first parts of these stages have these faults, and the other parts nothing to do."""
    folder.mkdir(exist_ok=True)
    run = begin(folder / "out", GPU_SCALE=str(scale), GPU_SLEEP="0", FAMILIES="bilinear_mim graph_attention", STORE="a.travel",
                GPU_FAULT=",".join(f"{stage}:{kind}" for stage, kind in faults.items()))
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 1, said
    record = record_of(folder / "out")
    broken = [part(record, stage) for stage in faults]
    for entry, (stage, kind) in zip(broken, faults.items(), strict=True):
        state, why = FAULTS[kind]
        assert entry["state"] == state and why in entry["why"] and entry["result"]["rehearsed"] == [kind], entry
        assert f"{stage}: {state}" in said
    others = [entry for stage in record["stages"] for entry in stage["parts"] if not any(entry is one for one in broken)]
    assert record["finished"] and len(others) + len(broken) == 17 and {entry["state"] for entry in others} == {"ok"}, said
    assert record["seconds"] < SECONDS * scale


def job(folder: Path, words: str, seconds: float = 60) -> gpu.Job:
    """Of a stage of one part, that runs this Python."""
    stage = gpu.Stage("device", seconds, {"": [sys.executable, "-c", words]})
    return gpu.Job(stage, "", folder, time.monotonic() + seconds, 1)


def at_its_end(one: gpu.Job) -> tuple[str, str]:
    while not one.ended():
        time.sleep(0.01)
    return one.record["state"], one.record["why"]


@pytest.mark.parametrize("words, state, why", [
    ("print('all is well')", "ok", ""),
    ("print('no GPU'); raise SystemExit(77)", "skipped", "no GPU"),
    ("raise ValueError('too large')", "failed", "ValueError: too large"),
    ("raise SystemExit(255)", "failed", "exit status 255"),
    ("raise SystemExit(137)", "crashed", "SIGKILL: out of memory, perhaps"),
    ("import os; os.abort()", "crashed", "SIGABRT"),
    ("import sys; open(sys.argv[-1], 'w').write('{'); print('half written')", "ok", ""),
])
def test_how_a_process_ended_is_told_from_its_status(tmp_path, words, state, why):
    one = job(tmp_path, words)
    assert at_its_end(one) == (state, why) and one.record["result"] is None


def test_a_process_that_no_signal_ends_is_left_behind(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", lambda *_: None)  # as where it waits on a driver
        one = job(tmp_path, "import time; time.sleep(60)", 0.3)
        state, why = at_its_end(one)
    assert state == "timeout" and why.endswith(", in vain") and 1.2 < one.record["seconds"] < 30
    one.signal(signal.SIGKILL)
    one.process.wait(10)


def test_a_stage_whose_program_is_missing_costs_itself_alone(tmp_path):
    listed = [gpu.Stage("device", 5, {"": [str(tmp_path / "none")]}), gpu.Stage("build", 5, {"": [sys.executable, "-c", ""]})]
    run = gpu.Run(listed, "a GPU", tmp_path, [tmp_path / "gpu.json"])
    assert not run.run()
    assert states(record_of(tmp_path)) == {"device": "failed", "build": "ok"}
    assert "No such file" in record_of(tmp_path)["stages"][0]["why"]


# ---- kills


KILLS = [(at, how) for at in (20, 60, 200, 400) for how in ("SIGTERM", "SIGKILL", "SIGKILL of the group")]


def killed(folder: Path, at: float, how: str, scale: float, share: float) -> None:
    """A run whose parts sleep ``share`` of their limits, killed at this second; a scaled one at that second of its schedule."""
    folder.mkdir()
    run = begin(folder / "out", GPU_SCALE=str(scale), GPU_SLEEP=str(share), FAMILIES="graph_attention", STORE="a.travel")
    while not (folder / "out" / "gpu.json").exists():
        time.sleep(0.01)
    time.sleep(at if scale == 1 else at * scale * share)
    (os.killpg if "group" in how else os.kill)(run.pid, getattr(signal, how.split()[0]))
    said, _ = run.communicate(timeout=60)
    assert run.returncode == (143 if how == "SIGTERM" else -9), said
    record = record_of(folder / "out")
    assert not record["finished"] and [*states(record)] == STAGES
    assert gpu_results.markdown(record).startswith("# none: a dry run")
    ended = dict(line[10:].split(": ")[:2] for line in said.splitlines() if line[6:10] == " s  ")
    for stage in record["stages"]:
        if stage["name"] in ended:
            assert stage["state"] == ended[stage["name"]] in ("ok", "timeout"), said  # a scaled limit can be less than a start
        if stage["state"] == "ok":
            assert all(entry["result"]["rehearsed"] == ["sleep", "slept"] for entry in stage["parts"])
    assert scale < 1 or len(ended) == {20: 0, 60: 2, 200: 4, 400: 7}[at], said
    if how == "SIGTERM":
        assert "running" not in states(record).values() and "ended from outside" in said


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_what_has_ended(tmp_path):
    kill_all(tmp_path, scale=1 / 20, share=0.5)


def kill_all(folder: Path, scale: float, share: float) -> None:
    with ThreadPoolExecutor(len(KILLS)) as pool:
        for done in [pool.submit(killed, folder / f"{at} {how}", at, how, scale, share) for at, how in KILLS]:
            done.result()


def test_the_processes_of_a_killed_run_end_with_it(tmp_path):
    run = begin(tmp_path / "out", GPU_SCALE="1")
    child = 0
    for _ in range(200):
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        if children and (tmp_path / "out" / "parts" / "device.json").exists():
            child = int(children[0])
            break
        time.sleep(0.05)
    assert child
    run.kill()
    run.communicate(timeout=30)
    for _ in range(100):
        with suppress(FileNotFoundError):
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return
    pytest.fail("a process goes on without the run")


# ---- the tests of a family


def test_a_test_that_ends_its_process_costs_itself_alone(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text("""
import os, signal
def test_first(): pass
def test_wrong(): assert 1 == 2, "as it should"
def test_ends(): os.kill(os.getpid(), signal.SIGSEGV)
def test_refused(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_last(): pass
""")
    pytest_of = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider", "-p", "no:faulthandler",
                 "-q", "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path / "test_some.py")]
    monkeypatch.setattr(gpu_tests, "_command", lambda family: pytest_of)
    monkeypatch.setattr(sys, "argv", ["gpu_tests", "sorting", "--out", str(tmp_path / "found.json")])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(SystemExit, match="3 of 5 tests failed: test_some.py::test_wrong, test_some.py::test_ends, "):
        gpu_tests.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["passed"], found["failed"], found["begun"], found["running"]) == (2, 3, 5, "")
    assert found["failing"]["test_some.py::test_wrong"].startswith("AssertionError: as it should")
    assert found["failing"]["test_some.py::test_ends"] == "its process ended there, status -11"
    assert "illegal memory access" in found["failing"]["test_some.py::test_refused"]


# ---- sanitizers


LOG = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void case_fast::graph_attention::forward_rows<float, 2>(Args)+0x160 in cuda_rows.cuh:6
========= Invalid __global__ write of size 4 bytes
=========     at loss_tiles+0x40 in bilinear_mim_triton.py:80
graph_attention: every kernel has run
========= ERROR SUMMARY: 2 errors
"""


def test_what_a_sanitizer_says_is_counted(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"ran": ["graph_attention"], "left_out": {}, "failed": {}}))
    found = gpu.of_sanitizer(tmp_path / "x.json", LOG)
    assert found["errors"] == 2 and found["summary"] == "ERROR SUMMARY: 2 errors" and found["ran"] == ["graph_attention"]
    assert found["kernels"] == {"case_fast::graph_attention::forward_rows": 1, "loss_tiles": 1}
    races = gpu.of_sanitizer(tmp_path / "none", "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n")
    assert races["errors"] == 3 and not races["kernels"]
    assert gpu.of_sanitizer(tmp_path / "none", "no such option") is None


def test_kernels_of_libraries_are_left_out_where_the_tool_can(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    for option, expected in (("--kernel-name-exclude", 3), ("--kernel-regex-exclude", 0)):
        tool.write_text(f"#!/bin/sh\necho '  {option} arg   Skip kernels'\n")
        tool.chmod(0o755)
        jobs = gpu.sanitizers(str(tool))
        assert [*jobs] == ["memcheck", "racecheck", "initcheck", "synccheck"]
        assert sum("--kernel-name-exclude" in words for words in jobs.values()) == expected
        assert "--kernel-name-exclude" not in jobs["initcheck"]
        assert all(words[-3:] == ["benchmarks.gpu_steps", "smoke", "all"] for words in jobs.values())


def test_no_kernel_of_ours_has_a_library_s_name():
    sources = [*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "case_fast" / "ops").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    names = re.findall(r"__launch_bounds__\([^)]*\)\s+(\w+)\(", text) + re.findall(r"@triton\.jit\ndef (\w+)", text)
    assert len(names) > 20
    for name in names:
        for whole in (name, *(f"case_fast::{family}::{name}<float>" for family in families())):
            assert not re.search(gpu.LIBRARIES, whole), whole
    assert re.search(gpu.LIBRARIES, "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>")
    assert re.search(gpu.LIBRARIES, "_ZN2at6native29vectorized_elementwise_kernelILi4E")


# ---- the page


def row(peer: str, mode: str, ms: float, **more: object) -> dict:
    return {"peer": peer, "mode": mode, "threads": 8, "how": "CUDA graph", "median_ms": ms, "quartiles_ms": [ms, ms],
            "fastest_ms": ms, "rounds": 12, "error_over_limit": 0.25} | more


def case(family: str, name: str, dtype: str, rows: list[dict], flop: float, moved: float) -> dict:
    return {"family": family, "dtype": dtype, "name": name, "what": "a made case", "shape": {"V": 1344}, "size": None,
            "axis": "rows", "modes": ["forward"], "needs": {"forward": {"flop": flop, "bytes": moved}},
            "cores_busy_with_others": {"forward": 0.0}, "rows": rows}


def made_record() -> dict:
    """As gpu.sh writes one, of a GPU that there is not: every figure is made up."""
    bounds = {"environment": {"commit": "0123456789ab", "versions": {"torch": "2.0"}}, "nvidia_smi": {"driver_version": "1.2"},
              "copy_tb_s": 3.0, "float32_tflop_s": 50.0, "bfloat16_tflop_s": 600.0, "us_a_launch": 2.5}
    results = {
        "device": {"": bounds},
        "build": {"": {"native": {"cuda": True}}},
        "smoke": {"graph_attention": {"ran": ["graph_attention"], "left_out": {}, "failed": {}}},
        "training": {"": {"phases": {"all": {
            "form": "CapturedStep", "ms": 4.75, "launches": 1280.0, "busy": 0.97, "losses": [9.5, 9.25],
            "cpu_losses": [9.5, 9.25], "agree": True,
            "eager": {"form": "EagerStep", "ms": 14.25, "launches": 1322.0, "busy": 0.31}}}}},
        "tests": {"graph_attention": {"passed": 100, "failed": 1, "skipped": 2, "begun": 103, "collected": 110,
                                      "running": "t.py::hangs", "failing": {"t.py::wrong": "out is off"}}},
        "sanitizers": {"memcheck": {"summary": "ERROR SUMMARY: 0 errors", "errors": 0, "kernels": {},
                                    "ran": ["graph_attention"]}},
        "ours": {"graph_attention": {"failed": {"1e5, float32, case_fast": "OutOfMemoryError: no"}, "in_time": True, "cases": [
            case("graph_attention", "paper", "float32", [
                row(OURS, "forward", 0.01), row("bare matrix products", "forward", 0.005, yardstick=True)], 1e8, 1.5e7)]}},
        "peers": {"graph_attention": {"failed": {}, "in_time": True, "cases": [
            case("graph_attention", "paper", "float32", [
                row(OURS, "forward", 0.011), row("eager", "forward", 0.044),
                {"peer": "wrong", "mode": "forward", "refused": "out is off"}], 1e8, 1.5e7),
            case("graph_attention", "paper", "float32", [
                row(OURS, "forward", 0.012), row("compiled", "forward", 0.09, how="launched one by one", launched=True),
                row(LAUNCHED, "forward", 0.03, how="launched one by one", launched=True)], 1e8, 1.5e7)]}},
    }
    stages = [{"name": name, "state": "ok" if name in results else "waiting", "seconds": 10.0, "limit": 30.0, "parts": [
        {"name": part, "state": "ok", "why": "", "seconds": 9.0, "limit": 30.0, "result": found, "log": []}
        for part, found in results.get(name, {}).items()]} for name in STAGES]
    return {"gpu": "Fixture G1", "dry": False, "begun": "2000-01-01T00:00:00+00:00", "finished": False, "seconds": 200.0,
            "stages": stages}


@pytest.fixture
def stored(tmp_path, monkeypatch) -> Path:
    """Where `case-fast bench --show gpu` looks for a record."""
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    path = tmp_path / "results" / "fixture-g1" / "gpu.json"
    path.parent.mkdir(parents=True)
    return path


def test_the_page_tells_all_that_the_record_holds(stored, tmp_path, capsys):
    stored.write_text(json.dumps(made_record()))
    assert cli.main(["bench", "--show", "gpu", "--machine", "fixture-g1", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert lines[0] == "# Fixture G1: what the kernels do there" and "commit 0123456789ab; driver 1.2; torch 2.0" in told
    assert "when the run was ended from outside" in told and "Never begun: variants." in told
    assert "| TFLOP/s float32 | 50 |" in lines and "| us a launch | 2.5 |" in lines
    assert "| graph_attention | 100 | 1 | 2 | 7 |" in lines and "- `t.py::wrong`: out is off" in lines
    assert "- `t.py::hangs`: ran when the time was over" in lines
    assert "| memcheck | 0 | ERROR SUMMARY: 0 errors | graph_attention |  |" in lines
    assert "| all | CapturedStep | 4.75 | 1280 | 0.97 | 9.5, 9.25 | 9.5, 9.25 |" in lines
    assert "| all | EagerStep | 14.25 | 1322 | 0.31 |  |  |" in lines
    # 15 MB at 3 TB/s are 5 us of 10; the compiled peer is 3 times ours as launched, the eager one 4 times ours replayed
    assert ("| graph_attention | paper | forward | 10 | **3.00** | compiled | 50 % (bytes) | 2.00 | 0.25 |" in lines)
    assert "- ours, graph_attention: 1e5, float32, case_fast: OutOfMemoryError: no" in lines
    assert "## peers: graph_attention, paper, float32: a made case" in lines and "wrong: out is off" in told
    assert (tmp_path / "out" / "fixture-g1" / "gpu.md").read_text() + "" in told
    with Image.open(tmp_path / "out" / "fixture-g1" / "gpu.png") as picture:
        assert picture.width > 500


def test_a_record_of_stages_that_never_began_is_told(stored, capsys):
    record = made_record()
    for stage in record["stages"]:
        stage |= {"state": "waiting", "parts": []}
    stored.write_text(json.dumps(record))
    assert cli.main(["bench", "--show", "gpu"]) == 0
    assert f"Never begun: {', '.join(STAGES)}." in capsys.readouterr().out


@pytest.mark.parametrize("damage, said", [
    (lambda record: json.dumps(record)[:-9], "damaged"),
    (lambda record: "[]", "damaged"),
    (lambda record: json.dumps(record | {"stages": 3}), "damaged"),
    (lambda record: json.dumps({name: value for name, value in record.items() if name != "stages"}), "damaged"),
    (lambda record: json.dumps(record | {"dry": True}), "the record of a dry run, which is no result"),
])
def test_a_damaged_record_and_one_of_a_dry_run_are_refused(stored, capsys, damage, said):
    stored.write_text(damage(made_record()))
    assert cli.main(["bench", "--show", "gpu"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "gpu.json" in error.replace(" ", "")


def test_where_there_is_no_record_it_is_said_how_to_make_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert cli.main(["bench", "--show", "gpu"]) == 1
    assert "benchmarks/gpu.sh makes them" in " ".join(capsys.readouterr().err.split())


def test_a_peer_that_was_launched_is_compared_with_ours_launched():
    first, second = made_record()["stages"][STAGES.index("peers")]["parts"][0]["result"]["cases"]
    assert [round(line["ratio"], 6) for line in summary(first)] == [4]
    assert [(line["best_peer"], line["ours_ms"], round(line["ratio"], 6)) for line in summary(second)] == [("compiled", 0.03, 3)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kill_all(Path(folder), scale=1, share=0.85)
        print(f"{len(KILLS)} runs of full length killed: each left the record of all stages that had ended", flush=True)
        wanted = [(stage, kind) for stage in STAGES for kind in FAULTS]
        for stage, kind in wanted:
            faulty(Path(folder, f"{stage} {kind}"), {stage: kind}, 0.1)
        print(f"{len(wanted)} faults: each cost the part that it was in")
