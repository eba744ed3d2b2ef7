"""The CUDA side of the native module where it was compiled in; none of this needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from case_fast.ops import native_report

native = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
pytestmark = pytest.mark.skipif(not native_report()["cuda"], reason="the native module was built without CUDA")
ROOT = Path(__file__).resolve().parents[2]


def fields(vertices: int = 1344, edges: int = 5376, relations: int = 7, heads: int = 2, dim: int = 150, dtype: int = 0,
           index_bits: int = 32, dropout_p: float = 0.0) -> tuple:
    """struct case_fast_graph with addresses that are never followed."""
    return (vertices, edges, relations, heads, dim, dtype, index_bits, 256, 256, 256, 0.1, dropout_p, 0, 0)


def test_workspace_grows_with_edges_and_relation_tables_alone():
    def size(backward: bool = True, plan: int = 0, **changes: int) -> int:
        return native.graph_attention_workspace_cuda(fields(**changes), backward, plan)

    assert size(backward=False) == 0, "forward of a sparse graph needs none"
    tables = 4 * (5376 * 2 + 2 * 1344 * 2 * 7)  # dscore (E, H) and two of (V, H, R)
    part = 4 * 42 * 2 * 7 * 2 * 150  # 42 parts of 32 vertices
    assert tables + part <= size() <= tables + part + 8192
    assert tables + part + 8 * 5376 <= size(plan=2) <= tables + part + 8 * 5376 + 4 * 2 * 1344 + 8192
    assert size(vertices=100_000, edges=400_000) < 4 * (400_000 * 4 + 2 * 100_000 * 14) + 8 * 400_000 + 2**23
    assert size(dtype=1) > 1.9 * size()


@pytest.mark.parametrize("change", [{"dim": 257}, {"dim": 0}, {"heads": 0}, {"vertices": 2**31}, {"edges": 2**31}, {"edges": -1},
                                    {"dtype": 4}, {"index_bits": 16}, {"dropout_p": 1.5}])
def test_sizes_that_the_kernels_do_not_take_are_refused_before_any_launch(change):
    graph = fields(**change)
    assert native.graph_attention_workspace_cuda(graph, True, 0) == 0
    assert native.graph_attention_forward_cuda(graph, *[256] * 7, 0, 0, 0, 0, 0) == 4
    assert native.graph_attention_backward_cuda(graph, *[256] * 12, 0, 256, 1 << 40, 0, 0) == 4


def test_a_missing_array_or_too_small_a_workspace_is_refused():
    graph = fields()
    assert native.graph_attention_forward_cuda(graph, 0, *[256] * 6, 0, 0, 0, 0, 0) == 4
    assert native.graph_attention_backward_cuda(graph, *[256] * 11, 0, 0, 256, 1 << 40, 0, 0) == 4
    size = native.graph_attention_workspace_cuda(graph, True, 0)
    assert native.graph_attention_backward_cuda(graph, *[256] * 12, 0, 256, size - 1, 0, 0) == 4


@pytest.mark.skipif(native_report().get("cuda_devices", 0) > 0, reason="there is a GPU: the addresses would be followed")
@pytest.mark.parametrize("plan", [1, 2])
def test_without_a_gpu_a_launch_is_an_error_status_and_nothing_more(plan):
    graph = fields()
    for _ in range(2):
        assert native.graph_attention_forward_cuda(graph, *[256] * 7, plan, 256, 1 << 40, 0, 0) == 6
        assert native.graph_attention_backward_cuda(graph, *[256] * 12, plan, 256, 1 << 40, 0, 0) == 6


# ---- attention of packed sequences, and the decoder's block


def attention(batch: int = 16, queries: int = 240, key_sequences: int = 16, keys: int = 1600, heads: int = 2, dim: int = 150,
              dtype: int = 0, index_bits: int = 32, cu_query: int = 256, key_of: int = 0, stride: int = 300,
              dropout_p: float = 0.0) -> tuple:
    """struct case_fast_packed_attention with addresses that are never followed."""
    lists = (cu_query, 256, key_of, 0)
    return (batch, queries, key_sequences, keys, heads, dim, dtype, index_bits, 0, *lists, *[stride] * 3, 0.1, dropout_p, 0, 0)


BACKWARD = (*[256] * 6, 256, 300, 256, 300, 256, 300)  # arrays, then gradients with their strides


def test_workspace_of_attention_is_a_number_a_row_and_head():
    size = native.packed_attention_workspace_cuda
    assert size(attention(), False) == 0
    assert size(attention(dropout_p=0.1), False) == 256, "the longest sequence of keys"
    assert 4 * 240 * 2 <= size(attention(), True) <= 4 * 240 * 2 + 256
    assert size(attention(dtype=1), True) > 1.7 * size(attention(), True)


@pytest.mark.parametrize("change", [{"dim": 257}, {"dim": 0}, {"heads": 0}, {"queries": 2**31}, {"keys": 2**31}, {"batch": -1},
                                    {"dtype": 4}, {"index_bits": 16}, {"dropout_p": 1.5}, {"key_sequences": 15},
                                    {"cu_query": 0}])
def test_attention_that_the_kernels_do_not_take_is_refused_before_any_launch(change):
    call = attention(**change)
    assert native.packed_attention_workspace_cuda(call, True) == 0
    assert native.packed_attention_forward_cuda(call, *[256] * 5, 0, 256, 1 << 40, 0, 0) == 4
    assert native.packed_attention_backward_cuda(call, *BACKWARD, 256, 1 << 40, 0, 0) == 4


def test_attention_without_an_array_a_plan_or_room_is_refused():
    forward, backward = native.packed_attention_forward_cuda, native.packed_attention_backward_cuda
    assert forward(attention(), 0, *[256] * 4, 0, 0, 0, 0, 0) == 4
    assert forward(attention(), *[256] * 5, 4, 0, 0, 0, 0) == 4
    assert forward(attention(stride=299), *[256] * 5, 0, 0, 0, 0, 0) == 4
    assert backward(attention(), *BACKWARD[:-2], 0, 300, 256, 1 << 40, 0, 0) == 4
    assert backward(attention(), *BACKWARD[:-1], 299, 256, 1 << 40, 0, 0) == 4
    assert backward(attention(), *BACKWARD, 256, native.packed_attention_workspace_cuda(attention(), True) - 1, 0, 0) == 4
    # offsets of no sequences are wrong, whatever they hold
    assert forward(attention(batch=0, key_sequences=0), *[256] * 5, 0, 0, 0, 0, 0) == 7
    assert forward(attention(batch=0, queries=0, key_sequences=0), *[256] * 5, 0, 0, 0, 0, 0) == 8
    assert forward(attention(key_sequences=0, keys=0, key_of=256), *[256] * 5, 0, 0, 0, 0, 0) == 9
    assert forward(attention(queries=0), *[256] * 5, 0, 0, 0, 0, 0) == 0, "nothing to launch"


def block(rows: int = 16, width: int = 300, dtype: int = 0, heads: int = 2, norm_weight: int = 256, stride: int = 300,
          key_weight: int = 0) -> tuple:
    """struct case_fast_cross_attention, and two of its sources, whose addresses are never followed."""
    first = (16, 1600, 300, 300, 256, 0, 0, 256, 256, 256, 256, 256, 256, 1, 2, 0, 0)
    second = (16, 1600, stride, 300, 256, 0, 0, 256, 256, norm_weight, 256, 256, 256, 3, 4, key_weight, key_weight)
    return (16, rows, 2, width, heads, 150, dtype, 32, 256, 1e-5, 0.0, 0.0, 0), [first, second]


def test_a_decoder_block_that_the_kernels_do_not_take_is_refused_before_any_launch():
    forward = native.cross_attention_forward_cuda
    size = native.cross_attention_workspace_cuda(block()[0])
    assert 4 * 16 * 300 <= size <= 4 * 16 * 300 + 256
    for change in ({"rows": 65536}, {"width": 4097}, {"width": 0}, {"dtype": 4}, {"heads": 0}):
        assert native.cross_attention_workspace_cuda(block(**change)[0]) == 0
        assert forward(*block(**change), 256, 256, 256, 1 << 40, 0, 0) == 4
    assert forward(*block(), 256, 256, 256, size - 1, 0, 0) == forward(*block(), 0, 256, 256, size, 0, 0) == 4
    assert forward(*block(norm_weight=0), 256, 256, 256, size, 0, 0) == 4 + 16, "of the second source"
    assert forward(*block(stride=299), 256, 256, 256, size, 0, 0) == 4 + 16
    assert forward(*block(key_weight=256), 256, 256, 256, size, 0, 0) == 4 + 16, "keys are not made there"
    assert forward(*block(rows=0), 256, 256, 256, size, 0, 0) == 0
    assert native.cross_attention_drop_cuda(5, 4, 0.1, 0, 0, 256, 0, 256, 0) == 4
    assert native.cross_attention_drop_cuda(0, 0, 0.1, 0, 0, 0, 0, 0, 0) == 0


@pytest.mark.skipif(native_report().get("cuda_devices", 0) > 0, reason="there is a GPU: the addresses would be followed")
@pytest.mark.parametrize("dtype", range(4))
def test_without_a_gpu_launches_of_attention_are_error_statuses(dtype):
    for plan in (1, 2, 3):
        assert native.packed_attention_forward_cuda(attention(dtype=dtype), *[256] * 5, plan, 256, 1 << 40, 0, 0) == 6
    assert native.packed_attention_backward_cuda(attention(dtype=dtype), *BACKWARD, 256, 1 << 40, 0, 0) == 6
    assert native.cross_attention_forward_cuda(*block(dtype=dtype), 256, 256, 256, 1 << 40, 0, 0) == 6
    assert native.cross_attention_drop_cuda(5, dtype, 0.1, 0, 0, 256, 0, 256, 0) == 6


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
    hot = [line for line in done.stdout.splitlines() if "2, 3>" in line or "4, 1>" in line]
    targets = {f"sm_{number}" for number in native_report()["cuda_architectures"]}
    assert targets and {line.split()[0] for line in hot} == targets
    for family, kernels in (("graph_attention", 8), ("packed_attention", 5), ("cross_attention", 2)):
        found = len([line for line in hot if f"{family}::" in line])
        assert found == len(targets) * 3 * 2 * kernels  # storage types, ways to read a row
    assert len(hot) == len(targets) * 3 * 2 * 15
