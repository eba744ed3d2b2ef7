"""The benchmarks: nothing is timed that was not found right, and what a run writes can be read again."""

from __future__ import annotations

import ast
import io
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import case_fast
from benchmarks import command, families, gpu_steps, measure, memory, report
from benchmarks import run as running
from benchmarks.clock import CpuClock, CudaClock, Prepared
from benchmarks.family import DTYPES, Family, family_of
from benchmarks.graph_attention.cases import GraphCase, case_of, truth
from benchmarks.graph_attention.peers import PEERS
from benchmarks.measure import BACKWARD, LAUNCHED, MODES, OURS, Timing, Truth, Unfit, Work, WrongResult, Yardstick, is_ours
from benchmarks.run import run
from benchmarks.switches import native_or_triton
from case_fast import cli
from case_fast.commands import machine
from case_fast.errors import CaseFastError, ConfigError

FAMILY = family_of("graph_attention")
ROOT = Path(case_fast.__file__).parents[1]


def broken(of: str, how) -> object:
    """The peer with its output passed through ``how``."""
    whole = PEERS[of]

    def prepare(case: GraphCase) -> Work:
        work = whole(case)
        right = work.function
        work.function = lambda *leaves: how(right(*leaves))
        return work

    return prepare


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


# ---- what is wrong


@pytest.mark.parametrize("how, mode, named", [
    (lambda out: out * 1.001, "forward", "out is off by"),
    (lambda out: out[:, :, :1], "forward", "out has shape"),
    (lambda out: torch.where(out == out.max(), torch.nan, out), "forward+backward", "out is off by nan"),
    (WrongBackward.apply, "forward+backward", "grad_query is off by"),
], ids=["scaled", "shape", "nan", "gradient"])
def test_a_wrong_peer_is_refused_before_it_is_timed(monkeypatch, how, mode, named):
    case = case_of("20")
    work = broken("equations.py, eager", how)(case)
    monkeypatch.setattr(CpuClock, "seconds", lambda *_: pytest.fail("a wrong peer was timed"))
    with pytest.raises(WrongResult, match=named):
        measure.tune(work, mode, truth(case), CpuClock(), [1])


def test_a_refused_peer_has_no_time_and_is_no_rival(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "measurable", lambda: False)
    eager = "equations.py, eager"
    peers = {OURS: PEERS[OURS], "right": PEERS[eager], "wrong": broken(eager, lambda out: out + 1)}
    (case,) = run(replace(FAMILY, peers=peers), ["8"], quick=True)
    rows = {(row["peer"], row["mode"]): row for row in case["rows"]}
    for mode in MODES:
        assert "refused" in rows["wrong", mode] and "median_ms" not in rows["wrong", mode]
        assert rows["right", mode]["median_ms"] > 0
    assert [line["best_peer"] for line in report.summary(case)] == ["right", "right"]
    written = report.write("graph_attention", report.environment("graph_attention"), [case], tmp_path)
    assert "wrong: out is off by" in written[1].read_text()


def test_a_yardstick_is_timed_and_is_no_rival(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "measurable", lambda: False)
    calls: list[str] = []
    ruler = Yardstick({mode: lambda mode=mode: calls.append(mode) for mode in MODES})
    peers = {OURS: PEERS[OURS], "a ruler": lambda case: ruler, "right": PEERS["equations.py, eager"]}
    (case,) = run(replace(FAMILY, peers=peers), ["8"], quick=True)
    assert set(calls) == set(MODES)
    rows = {(row["peer"], row["mode"]): row for row in case["rows"]}
    for line in report.summary(case):
        assert line["best_peer"] == "right"
        assert line["in_yardsticks"]["a ruler"] == line["ours_ms"] / rows["a ruler", line["mode"]]["median_ms"]
    paths = report.write("graph_attention", report.environment("graph_attention"), [case], tmp_path)
    table = paths[1].read_text()
    assert "| case_fast / a ruler |" in table and "| *a ruler* |" in table


def test_nothing_is_written_when_we_are_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PEERS, OURS, broken(OURS, lambda out: out * 1.01))
    assert cli.main(["bench", "graph_attention", "--quick", "--sizes", "8", "--out", str(tmp_path / "out")]) == 1
    assert "our own result is wrong" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_peer_that_fails_is_named_and_the_others_are_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "measurable", lambda: False)

    def failing(case):
        raise ValueError("no such kernel\nsecond line")

    peers = {OURS: PEERS[OURS], "failing": failing, "right": PEERS["equations.py, eager"]}
    (case,) = run(replace(FAMILY, peers=peers), ["8"], quick=True)
    assert [row["failed"] for row in case["rows"] if row["peer"] == "failing"] == ["ValueError: no such kernel"] * 2
    assert [line["best_peer"] for line in report.summary(case)] == ["right", "right"]
    written = report.write("graph_attention", report.environment("graph_attention"), [case], tmp_path)
    assert "| failing |  | failed: ValueError: no such kernel |" in written[1].read_text()
    with pytest.raises(ValueError, match="no such kernel"):
        next(run(replace(FAMILY, peers={OURS: failing}), ["8"], quick=True))


def test_limits_follow_the_error_of_plain_torch():
    exact, plain = torch.tensor([1.0, 300.0]).double(), torch.tensor([1.0, 300.5])
    truth = Truth.of(["out"], [exact], [plain])
    assert truth.limits == (pytest.approx(measure.SLACK * 0.5 + 3e-3),)
    assert truth.check((torch.tensor([1.0, 301.9]),)) < 1
    with pytest.raises(WrongResult, match="out is off by 2.1"):
        truth.check((torch.tensor([1.0, 302.1]),))


# ---- the measuring


def test_memory_sees_what_is_freed_again():
    if not memory.measurable():
        pytest.skip("needs Linux")
    kept = torch.ones(8 << 20)
    seen = memory.extra_bytes(lambda: (torch.ones(8 << 20), torch.ones(16 << 20).sum(), kept * 2)[:1])
    assert 60e6 < seen < 110e6  # 64 MiB, freed before the next 32 MiB or not; the 32 MiB that are returned do not count


def test_turns_are_interleaved_and_samples_counted():
    order: list[str] = []
    leaf = torch.ones(1)

    def work(name: str) -> Work:
        return Work(lambda x: (order.append(name), x * 1)[1], (leaf,), leaf)

    ready = {name: Timing(Prepared(work(name).call("forward")), 1, 0.0, taken) for name, taken in (("a", 1.0), ("b", 0.005))}
    others = measure.take_turns(ready, CpuClock(), rounds=7, budget=0.0)
    assert "".join(order) == "abbbb" * 5  # over budget: five rounds; "a" is slow and needs no call to warm up
    assert all(len(timing.samples) == 5 and timing.median >= 0 for timing in ready.values())
    assert others is None or others >= 0


# ---- the command


def test_quick_run_writes_what_can_be_read(tmp_path, capsys):
    out = tmp_path / "results"
    assert cli.main(["bench", "graph_attention", "--quick", "--sizes", "40", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" x faster than ") == 2 and "graph_attention.md" in printed
    results = json.loads((out / "graph_attention.json").read_text())
    environment = results["environment"]
    assert environment["quick"] and environment["machine"]["cores"] and environment["versions"]["torch"] == torch.__version__
    assert [case["name"] for case in results["cases"]] == ["40"]
    for case in results["cases"]:
        assert {(row["peer"], row["mode"]) for row in case["rows"]} == {(peer, mode) for peer in FAMILY.quick for mode in MODES}
        for row in case["rows"]:
            if "left_out" not in row:
                assert 0 < row["fastest_ms"] <= row["median_ms"] and row["rounds"] == 3 and row["threads"] == 1
                assert row["error_over_limit"] <= 1 and not {"refused", "failed"} & {*row}
                assert not memory.measurable() or row["extra_bytes"] >= 0
    table = (out / "graph_attention.md").read_text()
    assert "quick run" in table and str(ROOT) not in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {7}
    with Image.open(out / "graph_attention.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((60, 30)).tobytes())) > 5


def test_a_peer_without_a_backward_pass_is_left_out_of_that_mode():
    leaf = torch.ones(3)
    assert measure.prepared(lambda case: Work(torch.exp, (leaf,), leaf, trains=False), None, "forward").run("forward")
    with pytest.raises(Unfit, match="only decodes"):
        measure.prepared(lambda case: Work(torch.exp, (leaf,), leaf, trains=False, note="only decodes"), None, MODES[1])
    with pytest.raises(Unfit, match="has no backward alone"):
        measure.prepared(lambda case: Yardstick(dict.fromkeys(MODES, list)), None, BACKWARD)


def test_peers_are_left_out_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(memory, "measurable", lambda: False)
    assert not [*run(FAMILY, ["8"], quick=True, until=0.0)]
    moments = iter([0.0, 0.0, *[2.0] * 99])
    monkeypatch.setattr(running.time, "monotonic", lambda: next(moments))
    (case,) = run(FAMILY, ["8", "9"], quick=True, until=1.0)
    left_out = {(row["peer"], row["mode"]): row.get("left_out") for row in case["rows"]}
    assert all(left_out[OURS, mode] is None for mode in MODES)
    assert left_out["equations.py, eager", "forward"] is None  # its turn came in time
    assert {why for (peer, mode), why in left_out.items() if peer != OURS and mode == MODES[1]} == {"the time was over"}


# ---- on a GPU


@pytest.mark.parametrize("name", families())
def test_what_runs_on_a_gpu_is_known(name):
    cpu, cuda = family_of(name), family_of(name, "cuda")
    assert next(iter(cpu.peers)) == next(iter(cuda.peers)) == OURS
    ways = [peer for peer in cuda.peers if is_ours(peer)]
    assert ways and {peer for peer in cuda.peers if peer not in ways} < set(cpu.peers)
    size = cpu.quick_sizes[0]
    for way in ways:
        try:
            work = cuda.peers[way](cuda.case_of(size))
        except ConfigError as error:  # a backend that this machine lacks
            assert "CASE_FAST_BACKEND" in str(error)
            continue
        with work.switch():
            pass
    assert all(cuda.case_of(size).name == size for size in cuda.sizes if size != "1e5")


def test_a_run_on_a_gpu_takes_the_same_way(monkeypatch, tmp_path):
    """Everything of such a run but the GPU: its clock, its memory and where the tensors lie."""
    seen = []

    class Clock(CpuClock):
        def prepare(self, make):
            return Prepared(make(), "CUDA graph")

    def extra_bytes(call):
        call()
        return 7_000_000

    monkeypatch.setattr(running, "clock_of", lambda device: seen.append(device) or Clock())
    monkeypatch.setattr(memory, "extra_bytes_on_gpu", extra_bytes)
    monkeypatch.setattr(memory, "measure", lambda *_: pytest.fail("a process of its own, which measures a CPU"))
    family = family_of("graph_attention", "cuda")
    family = replace(family, case_of=lambda size, device="cpu", dtype=torch.float32: case_of(size, dtype=dtype))
    cases = [*run(family, ["40"], quick=True)]
    assert seen == ["cuda"] and [case["dtype"] for case in cases] == [*DTYPES["cuda"]]
    for case in cases:
        assert [*case["modes"]] == ["forward", "backward", "forward+backward"]
        rows = {(row["peer"], row["mode"]): row for row in case["rows"]}
        for mode in case["modes"]:
            assert rows[OURS, mode]["how"] == "CUDA graph" and rows[OURS, mode]["median_ms"] > 0
            assert rows[OURS, mode].get("extra_bytes") == (None if mode == BACKWARD else 7_000_000)
            assert {"median_ms", "failed"} & {*rows["case_fast, plan rows", mode]}
        assert {line["best_peer"] for line in report.summary(case)} == {"gather/scatter, relation tables, eager"}
    found = report.environment("graph_attention")
    found["machine"]["gpu"] = "a GPU"
    table = report.write("graph_attention", found, cases, tmp_path)[1].read_text()
    assert "; a GPU, " in table and "| backward | timed as |" in table and "| 40, bfloat16 | forward |" in table
    assert "plain torch is in float32 or bfloat16" in table and "All float32" not in table


class OneThread(CpuClock):
    def thread_counts(self):
        return [1]


def on_cpu_as_on_gpu(monkeypatch, clock: type[CpuClock] = OneThread, **changes) -> Family:
    """A family that is measured as on a GPU, all but the GPU, in two rounds."""
    monkeypatch.setattr(running, "clock_of", lambda device: clock())
    monkeypatch.setattr(gpu_steps, "run", lambda *given, **more: run(*given, **more | {"rounds": 2}))
    monkeypatch.setattr(memory, "extra_bytes_on_gpu", lambda call: 7)
    peers = {OURS: PEERS[OURS], "case_fast, again": PEERS[OURS], "right": PEERS["equations.py, eager"]}
    return replace(FAMILY, **({"peers": peers, "sizes": ["8"], "device": "cuda",
                               "case_of": lambda size, device="cpu", dtype=torch.float32: case_of(size, dtype=dtype)} | changes))


@pytest.mark.parametrize("which, peers", [
    ("ours", [{OURS}]), ("variants", [{OURS, "case_fast, again"}]), ("peers", [{OURS, "right"}, {OURS, "right, torch.compile"}])])
def test_the_benchmarks_of_gpu_sh_take_ours_peers_and_variants_by_themselves(monkeypatch, which, peers):
    family = on_cpu_as_on_gpu(monkeypatch)
    family.peers["right, torch.compile"] = PEERS["equations.py, eager"]
    monkeypatch.setattr(gpu_steps, "family_of", lambda name, device: family)
    monkeypatch.setattr(sys, "stdin", io.StringIO("600\n"))
    said = []
    gpu_steps.bench(which, "graph_attention", lambda found: said.append(json.loads(json.dumps(found))))
    assert len(said) == len(said[-1]["cases"]) == 2 * len(peers) and said[-1]["in_time"] and not said[-1]["failed"]
    for place, case in enumerate(said[-1]["cases"]):
        assert (case["family"], case["name"], case["dtype"]) == ("graph_attention", "8", DTYPES["cuda"][place % 2])
        assert {row["peer"] for row in case["rows"]} == peers[place // 2] and all(row["median_ms"] > 0 for row in case["rows"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("-1\n"))
    gpu_steps.bench(which, "graph_attention", said.append)
    assert not said[-1]["in_time"] and not said[-1]["cases"]


def test_a_case_that_fails_costs_itself_alone(monkeypatch):
    """Its truth too, and a result of ours that is wrong."""
    def truth_of(case: GraphCase) -> Truth:
        if case.query.dtype == torch.bfloat16:
            raise RuntimeError("no memory for float64")
        return truth(case)

    wrong = {OURS: lambda case: (broken(OURS, lambda out: out * 1.01) if case.vertices == 9 else PEERS[OURS])(case)}
    family = on_cpu_as_on_gpu(monkeypatch, truth=truth_of, sizes=["8", "9", "10"], peers=wrong)
    monkeypatch.setattr(gpu_steps, "family_of", lambda name, device: family)
    monkeypatch.setattr(sys, "stdin", io.StringIO("600\n"))
    said = []
    with pytest.raises(SystemExit, match="4 failed: RuntimeError: no memory for float64"):
        gpu_steps.bench("ours", "graph_attention", said.append)
    assert [case["name"] for case in said[-1]["cases"]] == ["8", "10"]
    assert said[-1]["failed"]["9, float32, case_fast"].startswith("WrongResult: 9, forward: case_fast: out is off by")


def test_beside_a_peer_that_is_launched_ours_is_launched_too(monkeypatch):
    asked: list[str] = []

    class Clock(OneThread):
        def prepare(self, make, capture=True):
            launched = not capture or asked[-1] == "launched"
            return Prepared(make(), "launched one by one" if launched else "CUDA graph", launched=launched)

    def named(name: str, peer: str):
        return lambda case: asked.append(name) or PEERS[peer](case)

    peers = {OURS: named(OURS, OURS)} | {name: named(name, "equations.py, eager") for name in ("launched", "right")}
    family = on_cpu_as_on_gpu(monkeypatch, Clock, peers=peers)
    (case,) = run(family, ["8"], dtypes=["float32"], rounds=3)
    rows = {row["peer"]: row for row in case["rows"] if row["mode"] == "forward"}
    assert [peer for peer, row in rows.items() if row.get("launched")] == ["launched", LAUNCHED]
    assert rows[LAUNCHED]["median_ms"] > 0 and rows[LAUNCHED]["error_over_limit"] == rows[OURS]["error_over_limit"]
    (case,) = run(replace(family, peers={name: peers[name] for name in (OURS, "right")}), ["8"], dtypes=["float32"], rounds=3)
    assert LAUNCHED not in {row["peer"] for row in case["rows"]}


@pytest.mark.parametrize("built, gpu, runs", [(True, True, "native"), (False, True, "triton"), (False, False, "native")])
def test_where_no_cuda_was_built_triton_is_measured(monkeypatch, built, gpu, runs):
    monkeypatch.setattr(case_fast.ops, "native_report", lambda: {"cuda": built})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert native_or_triton() == runs


@pytest.mark.parametrize("name", families())
def test_what_a_case_cannot_do_without_is_counted(name):
    """Operations in proportion to the work, bytes to the size of a number; of modes, the whole is the sum of its parts."""
    family = family_of(name)
    case = family.case_of(family.quick_sizes[0])
    half = family.case_of(family.quick_sizes[0], dtype=torch.bfloat16)
    forward, backward = (case.needs(mode) for mode in (MODES[0], BACKWARD))
    assert case.needs(MODES[1]) == {unit: forward[unit] + backward[unit] for unit in forward}
    assert forward["flop"] == half.needs(MODES[0])["flop"] > 0
    assert forward["bytes"] / 2 <= half.needs(MODES[0])["bytes"] < forward["bytes"]


def test_the_least_of_known_cases():
    def least(name: str, size: str, mode: str = MODES[0]) -> tuple[float, float]:
        return tuple(family_of(name).case_of(size).needs(mode).values())

    assert least("linear_cross_entropy", "16x2000") == (2 * 16 * 2000 * 300, 4 * 300 * 2016)
    assert least("bilinear_mim", "24x10", BACKWARD) == (4 * 300 * (24 * 10 + 24 * 300), 8 * 300 * (24 + 10 + 300))
    lengths = family_of("packed_attention").case_of("4x9").lengths
    assert least("packed_attention", "4x9") == (4 * 300 * sum(n * n for n in lengths), 16 * 300 * sum(lengths))
    assert least("graph_attention", "8") == (4 * 32 * 300 + 4 * 8 * 7 * 300, 16 * 8 * 300 + 4 * (8 + 2 * 32))


@pytest.mark.parametrize("refuses", [False, True])
def test_a_gpu_is_timed_by_replays_or_says_why_not(monkeypatch, refuses):
    told: list[str] = []

    @contextmanager
    def on(stream):
        told.append("in")
        yield
        told.append("out")

    @contextmanager
    def capture(graph, stream):
        if refuses:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        yield

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("record")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            return 6.0

    class Graph:
        def replay(self):
            told.append("replay")

    class Cuda:
        Stream, CUDAGraph, stream, graph = object, Graph, staticmethod(on), staticmethod(capture)
        synchronize = staticmethod(lambda: None)

    Cuda.Event = Event
    monkeypatch.setattr(torch, "cuda", Cuda)
    clock = CudaClock()
    ready = clock.prepare(lambda: told.append("made") or (lambda: told.append("call")))
    assert told[:5] == ["in", "made", "call", "call", "call"] and told[5] == "out"
    assert told[6:] == ([] if refuses else ["call"])
    told.clear()
    assert clock.seconds(ready.run, 3) == pytest.approx(0.002)
    assert told == ["in", "record", *(["call" if refuses else "replay"] * 3), "record", "out", "wait"]
    if refuses:
        assert ready.how == "launched one by one, since it cannot be captured: operation not permitted"
    else:
        assert ready.how == "CUDA graph" and ready.keeps is not None  # a graph does not hold what it reads


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_here_is_refused(monkeypatch, tmp_path, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU" if device == "cuda" else "'tpu' is not one to measure on"):
        command.bench("graph_attention", [], True, tmp_path, lambda *_: None, device=device)


# ---- the files


def test_no_benchmark_imports_in_a_circle_and_no_family_another():
    imports = {}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        imports[name] = names | {node.module for node in nodes}
    imports = {name: {module for module in modules if module in imports} for name, modules in imports.items()}
    assert imports["benchmarks.run"] >= {"benchmarks.memory", "benchmarks.measure"}
    for name, modules in imports.items():
        seen, ahead = set(), {*modules}
        while ahead:
            seen |= ahead
            ahead = {further for module in ahead for further in imports[module]} - seen
        assert name not in seen, f"{name} imports itself, by way of others"
        own = name.split(".")[1]
        if own in families():
            assert not {module for module in seen if module.split(".")[1] in {*families()} - {own}}, name


# ---- outside a checkout


def test_without_a_checkout_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "case_fast" / "commands" / "machine.py"))
    assert cli.main(["bench", "graph_attention", "--quick"]) == 1
    assert "not installed with the package: clone the repository" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["--help"]) == 0
    assert "  bench " in capsys.readouterr().out


def test_an_unknown_family_is_told_which_there_are(tmp_path):
    with pytest.raises(CaseFastError, match="no benchmark of 'sorting'; one of .*graph_attention"):
        command.bench("sorting", [], True, tmp_path, lambda *_: None)
    with pytest.raises(ConfigError, match="budget must be above 0"):
        command.bench("graph_attention", [], True, tmp_path, lambda *_: None, budget=0)
