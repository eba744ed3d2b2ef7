"""The native module's report, and the choice of a backend with and without it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import case_fast
from case_fast import equations, ops
from case_fast.ops import backend_name, native_report, reference

BLOCK_NATIVE = "import sys; sys.modules['case_fast._native'] = None\n"
CHOOSE = """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
from case_fast.errors import CaseFastError
from case_fast.ops import backend_name, native_report
try:
    print([backend_name(), backend_name()])
except CaseFastError as error:
    print(type(error).__name__, error)
"""


FORKS = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    code, environment, *paths = json.loads(line)
    pid = os.fork()
    if pid == 0:
        status = 1
        for number, path in enumerate(paths, 1):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
        os.environ |= environment
        try:
            exec(compile(code, "code", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def clean(**environment: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CASE_FAST_")}
    return kept | environment | {"PYTHONPATH": str(Path(case_fast.__file__).parents[1])}


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    """A process that has loaded torch and not this package, and runs code in forks of itself."""
    with subprocess.Popen([sys.executable, "-c", FORKS], env=clean(OMP_NUM_THREADS="1"), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(forks, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """What code says in a process of its own, in which this package is not yet loaded."""
    def in_a_fork(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = [tmp_path / "stdout", tmp_path / "stderr"]
        forks.stdin.write(json.dumps([code, environment, *map(str, paths)]) + "\n")
        forks.stdin.flush()
        status = int(forks.stdout.readline())
        done = subprocess.CompletedProcess(code, status, *(path.read_text() for path in paths))
        assert done.returncode == 0, done.stderr
        return done

    return in_a_fork


def test_the_report_says_what_was_built():
    native = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    report = native_report()
    assert report == {"available": True, "reason": "", **native.report()}
    assert report["version"] == case_fast.__version__ == native.__version__
    assert report["simd"] == native.simd
    assert not report["bf16"] or report["simd"] == "avx512"
    if report["cuda"]:
        assert report["cuda_architectures"] == [80, 90]
        assert re.fullmatch(r"1[1-9]\.\d+", report["cuda_runtime"])
    else:
        assert (report["cuda_architectures"], report["cuda_runtime"], report["cuda_devices"]) == ([], "", 0)
    assert report["cuda_devices"] >= 0
    assert bool(report["cuda_status"]) == (report["cuda_devices"] == 0), "no device must come with its reason"


def test_every_family_has_its_kernel_its_op_and_its_reference():
    native = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    families = native_report()["families"]
    assert families
    for family in families:
        assert callable(getattr(native, f"{family}_forward"))
        assert hasattr(native, f"{family}_backward") == (family != "segment_sum")  # whose gradient is a gather of torch's own
        assert getattr(ops, family).__module__ == f"case_fast.ops.{family}"
        oracle = getattr(reference, family)
        expected = ops.segment_sum if family == "segment_sum" else oracle  # no equation of the paper: what they sum by
        assert getattr(equations, family, oracle) is expected  # the paper's own by the same name
        assert backend_name(family) == "native"


GRAPH = (1, 2, 0, 1, 1, 0, 64, 0, 0, 0, 0.1, 0.0, 0, 0)  # struct case_fast_graph


@pytest.mark.parametrize("arguments, said", [
    ((), "graph_attention_forward takes 9 arguments, 0 given"),
    ((GRAPH, *[0] * 9), "graph_attention_forward takes 9 arguments, 10 given"),
    ((*GRAPH[:1], *[0] * 8), "graph_attention_forward: argument 1 must be a tuple of 14 members, not 1"),
    ((list(GRAPH), *[0] * 8), "graph_attention_forward: argument 1 must be a tuple of 14 members, not a list"),
    ((GRAPH[1:], *[0] * 8), "graph_attention_forward: argument 1 takes 14 members, 13 given"),
    (((*GRAPH, 0), *[0] * 8), "graph_attention_forward: argument 1 takes 14 members, 15 given"),
    (((*GRAPH[:7], None, *GRAPH[8:]), *[0] * 8), "member 8 of argument 1 must be an address, not a NoneType"),
    (((*GRAPH[:4], 2**31, *GRAPH[5:]), *[0] * 8), "member 5 of argument 1 must be a whole number of 32 bits, not 2147483648"),
    (((2**63, *GRAPH[1:]), *[0] * 8), "member 1 of argument 1 must be a whole number of 64 bits, not 9223372036854775808"),
    (((1.0, *GRAPH[1:]), *[0] * 8), "member 1 of argument 1 must be a whole number of 64 bits, not a float"),
    (((*GRAPH[:10], "x", *GRAPH[11:]), *[0] * 8), "member 11 of argument 1 must be a number, not a str"),
    (((*GRAPH[:12], -1, 0), *[0] * 8), "member 13 of argument 1 must be a whole number of 64 bits, not below 0, not -1"),
    ((GRAPH, 0.0, *[0] * 7), "argument 2 must be an address, not a float"),
    ((GRAPH, *[0] * 7, None), "argument 9 must be a whole number of 32 bits, not a NoneType"),
])
def test_the_native_module_says_what_of_a_call_does_not_fit(arguments, said):
    native = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    assert native.graph_attention_forward(GRAPH, *[0] * 8) == 4  # a call that fits, refused by the kernel
    with pytest.raises(TypeError) as raised:
        native.graph_attention_forward(*arguments)
    assert str(raised.value).endswith(said)


def test_the_native_module_takes_as_many_structs_as_the_call_says():
    native = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    call, source = (1, 1, 1, 1, 1, 1, 0, 64, 0, 1e-5, 0.0, 0.0, 0), (0,) * 17
    assert native.cross_attention_forward(call, [source], 0, 0, 0, 1) == 4
    for sources, said in (
        ([], "argument 2 takes 1 tuples, 0 given"), ([source] * 2, "argument 2 takes 1 tuples, 2 given"),
        (source, "argument 2 must be a list of tuples, not a tuple"), ([source[1:]], "argument 2 takes 17 members, 16 given"),
    ):
        with pytest.raises(TypeError, match=f"^cross_attention_forward: {said}$"):
            native.cross_attention_forward(call, sources, 0, 0, 0, 1)
    with pytest.raises(TypeError, match="^cross_attention_backward: argument 6 takes 1 tuples, 0 given$"):
        native.cross_attention_backward(call, [source], 0, 0, 0, [], 1)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's list of processor features")
def test_simd_level_is_what_the_processor_offers():
    native = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    features = set(Path("/proc/cpuinfo").read_text().split())
    if platform.machine() == "x86_64":
        avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features
        expected = "avx512" if avx512 else "avx2" if {"avx2", "fma"} <= features else "scalar"
    else:
        expected = "neon" if platform.machine() == "aarch64" else "scalar"
    assert native.simd == expected


def test_hidden_devices_are_reported_and_never_an_exception(run):
    pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    done = run(
        "from case_fast import _native; r = _native.report(); print(r['cuda_devices'], bool(r['cuda_status']))",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.stdout.split() == ["0", "True"]


def chosen_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("case_fast backend of")]


@pytest.mark.parametrize("asked", ["", "native"])
def test_native_runs_on_cpu_and_is_logged_once(run, asked):
    native = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    done = run(CHOOSE, CASE_FAST_BACKEND=asked)
    assert done.stdout.strip() == "['native', 'native']"
    (line,) = chosen_lines(done)
    assert line.startswith("case_fast backend of graph_attention on cpu: native")
    assert ("CASE_FAST_BACKEND asks for it" if asked else native.simd) in line


def test_reference_runs_where_asked_for_and_is_logged_once(run):
    done = run(CHOOSE, CASE_FAST_BACKEND="reference")
    assert done.stdout.strip() == "['reference', 'reference']"
    (line,) = chosen_lines(done)
    assert line == "case_fast backend of graph_attention on cpu: reference (CASE_FAST_BACKEND asks for it)"


@pytest.mark.parametrize(
    "asked, before, why",
    [
        ("native", BLOCK_NATIVE, "native module: it is not built for this Python"),
        ("triton", "import sys; sys.modules['triton'] = None\n", "triton is not installed"),
        ("triton", "", "no Triton kernels for cpu (TRITON_INTERPRET=1 interprets them)"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_with_the_reason(run, asked, before, why):
    if not before:
        pytest.importorskip("triton", reason="triton is not installed")
    said = run(before + CHOOSE, CASE_FAST_BACKEND=asked, TRITON_INTERPRET="0").stdout
    assert said.startswith(f"ConfigError CASE_FAST_BACKEND={asked}: graph_attention on cpu cannot run there: {why}")


def test_an_unknown_backend_is_refused_naming_the_variable(run):
    said = run(CHOOSE, CASE_FAST_BACKEND="cudnn").stdout
    assert said.startswith("ConfigError CASE_FAST_BACKEND='cudnn' names no backend; use native, triton, reference")


def test_each_family_may_have_its_own_backend(monkeypatch):
    pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    from case_fast.errors import ConfigError
    from case_fast.ops import backend_name

    one, other = "bilinear_mim=reference", "graph_attention=native"
    for said in (f"native,{one}", f"{one},native", f"{one},{other}", one):
        monkeypatch.setenv("CASE_FAST_BACKEND", said)
        assert (backend_name("graph_attention"), backend_name("bilinear_mim")) == ("native", "reference")
    for said, message in (("bilinear_mim=cudnn", "names no backend"), ("mim=native", "names no family of ops: 'mim'")):
        monkeypatch.setenv("CASE_FAST_BACKEND", said)
        with pytest.raises(ConfigError, match=message):
            backend_name("graph_attention")


def test_works_without_the_native_module(run):
    done = run(BLOCK_NATIVE + CHOOSE + "print(native_report())\nimport case_fast; print(case_fast.__version__)")
    chosen, report, version = done.stdout.splitlines()
    assert chosen == "['reference', 'reference']"
    assert report.startswith("{'available': False, 'reason': 'it is not built for this Python")
    assert version == case_fast.__version__
    (line,) = chosen_lines(done)
    assert "reference, plain torch and slower (native not used: native module: it is not built for this Python" in line


def test_a_module_of_another_version_is_not_used(run):
    stand_in = "import sys, types; m = types.ModuleType('case_fast._native'); m.__version__ = '0.0.1'\n"
    stand_in += "import case_fast; case_fast._native = sys.modules['case_fast._native'] = m\n"
    done = run(stand_in + CHOOSE + "print(native_report())")
    assert "'available': False" in done.stdout and "it is version 0.0.1" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_where_openmp_has_threads():
    """OpenMP's threads, which the kernels share with torch, do not follow a fork; torch's own loops hang there."""
    pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    code = """
import os, signal, torch
from case_fast.ops import bilinear_mim
torch.set_num_threads(2)
torch.manual_seed(0)
x, weight = torch.randn(512, 64), torch.randn(64, 64) / 64
loss = bilinear_mim(x, x, weight)
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(bilinear_mim(x, x, weight), loss) else 1)
print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=clean(CASE_FAST_BACKEND="native"), capture_output=True, text=True,
                          timeout=120)
    assert done.stdout.split() == ["child", "0"], done.stderr
