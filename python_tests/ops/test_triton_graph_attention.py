"""The Triton kernels of graph_attention: in the interpreter against equations.py in float64, and compiled for sm_90; no GPU."""

from __future__ import annotations

import importlib.util

import pytest
from triton_worker import CASES, in_own_process

WORKER = "triton_worker.py"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    lines = in_own_process(WORKER, "interpret", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_equation(interpreted, case):
    found = interpreted[case]
    vertices, edges, heads, dim, relations, dropout_p, dtype, _ = CASES[case]
    assert len(found["error"]) == (6 if relations else 4)
    floor = 1e-12 if dtype == "float64" else 1e-5
    for error, plain in zip(found["error"], found["plain_error"], strict=True):
        assert error <= 2 * plain + floor  # the house's rule; NaN fails it
    assert set(found["dtypes"]) == {f"torch.{dtype}"}
    assert found["weights"] == [[edges, heads], "torch.float64" if dtype == "float64" else "torch.float32"]
    assert found["repeatable"]


def test_the_same_edges_are_dropped_as_in_the_equation(interpreted):
    assert interpreted["kept"]["equal"] == [True] * 3


@pytest.mark.parametrize("wrong", ["indices 6", "indices -1", "relation 3", "relation -7"])
def test_an_index_out_of_range_makes_its_row_nan_and_is_raised_once(interpreted, wrong):
    error, nan_rows = interpreted["damaged"]["said"][wrong]
    assert error.startswith(f"IndexError: graph_attention: {wrong.split()[0]} ") and not error.endswith("(and again)")
    assert nan_rows == [True] + [False] * 5


@pytest.mark.parametrize("wrong", ["indptr 99", "indptr -4"])
def test_offsets_out_of_range_are_clamped_and_raised(interpreted, wrong):
    error, _ = interpreted["damaged"]["said"][wrong]
    assert error.startswith("IndexError: graph_attention: indptr ")


def test_every_kernel_compiles_for_sm_90_without_a_gpu(tmp_path):
    kernels = in_own_process(WORKER, "compile", tmp_path)
    assert {line["kernel"].split()[0] for line in kernels} == {
        "forward_rows", "backward_rows", "backward_columns", "relation_part"
    }
    for line in kernels:
        assert line["target"].startswith("sm_90") and line["bytes"] > 1000
        assert line.get("STACK", 0) == 0 and line.get("LOCAL", 0) == 0, f"{line['kernel']} spills"
        assert line.get("REG", 0) <= 128
