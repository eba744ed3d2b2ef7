"""The CUDA side of the native module where it was compiled in; none of this needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from case_fast.ops import native_report

native = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
pytestmark = pytest.mark.skipif(not native_report()["cuda"], reason="the native module was built without CUDA")
ROOT = Path(__file__).resolve().parents[1]


def fields(vertices: int = 1344, edges: int = 5376, relations: int = 7, heads: int = 2, dim: int = 150, dtype: int = 0,
           index_bits: int = 32, dropout_p: float = 0.0) -> tuple:  # fmt: skip
    """struct case_fast_graph with addresses that are never followed."""
    return (vertices, edges, relations, heads, dim, dtype, index_bits, 256, 256, 256, 0.1, dropout_p, 0)


def test_workspace_grows_with_edges_and_relation_tables_alone():
    def size(backward: bool = True, plan: int = 0, **changes: int) -> int:
        return native.graph_attention_workspace_cuda(*fields(**changes), backward, plan)

    assert size(backward=False) == 0, "forward of a sparse graph needs none"
    tables = 4 * (5376 * 2 + 2 * 1344 * 2 * 7)  # dscore (E, H) and two of (V, H, R)
    part = 4 * 42 * 2 * 7 * 2 * 150  # 42 parts of 32 vertices
    assert tables + part <= size() <= tables + part + 8192
    assert tables + part + 8 * 5376 <= size(plan=2) <= tables + part + 8 * 5376 + 4 * 2 * 1344 + 8192
    assert size(vertices=100_000, edges=400_000) < 4 * (400_000 * 4 + 2 * 100_000 * 14) + 8 * 400_000 + 2**23
    assert size(dtype=1) > 1.9 * size()


@pytest.mark.parametrize("change", [{"dim": 257}, {"dim": 0}, {"heads": 0}, {"vertices": 2**31}, {"edges": 2**31}, {"edges": -1},
                                    {"dtype": 4}, {"index_bits": 16}, {"dropout_p": 1.5}])  # fmt: skip
def test_sizes_that_the_kernels_do_not_take_are_refused_before_any_launch(change):
    graph = fields(**change)
    assert native.graph_attention_workspace_cuda(*graph, True, 0) == 0
    assert native.graph_attention_forward_cuda(*graph, *[256] * 7, 0, 0, 0, 0, 0) == 4
    assert native.graph_attention_backward_cuda(*graph, *[256] * 12, 0, 256, 1 << 40, 0, 0) == 4


def test_a_missing_array_or_too_small_a_workspace_is_refused():
    graph = fields()
    assert native.graph_attention_forward_cuda(*graph, 0, *[256] * 6, 0, 0, 0, 0, 0) == 4
    assert native.graph_attention_backward_cuda(*graph, *[256] * 11, 0, 0, 256, 1 << 40, 0, 0) == 4
    size = native.graph_attention_workspace_cuda(*graph, True, 0)
    assert native.graph_attention_backward_cuda(*graph, *[256] * 12, 0, 256, size - 1, 0, 0) == 4


@pytest.mark.skipif(native_report().get("cuda_devices", 0) > 0, reason="there is a GPU: the addresses would be followed")
@pytest.mark.parametrize("plan", [1, 2])
def test_without_a_gpu_a_launch_is_an_error_status_and_nothing_more(plan):
    graph = fields()
    for _ in range(2):
        assert native.graph_attention_forward_cuda(*graph, *[256] * 7, plan, 256, 1 << 40, 0, 0) == 6
        assert native.graph_attention_backward_cuda(*graph, *[256] * 12, plan, 256, 1 << 40, 0, 0) == 6


def test_the_cuda_runtime_is_linked_statically():
    needed = subprocess.run(["readelf", "-d", native.__file__], capture_output=True, text=True)
    if needed.returncode:
        pytest.skip("readelf cannot read the module")
    assert "libcudart" not in needed.stdout and "libcuda." not in needed.stdout


def test_no_hot_kernel_spills_registers():
    command = [sys.executable, "-m", "benchmarks.kernel_resources", native.__file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "cuobjdump was not found" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    hot = [line for line in done.stdout.splitlines() if "2, 3>" in line]
    assert {line.split()[0] for line in hot} == {"sm_80", "sm_90"}
    assert len(hot) == 2 * 3 * 8  # targets, storage types, kernels
