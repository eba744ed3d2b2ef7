"""The Triton kernels of graph_attention: in the interpreter against equations.py in float64."""

from __future__ import annotations

import pytest
from triton_worker import MARKS, interpreted_by
from triton_worker_graph_attention import CASES

pytestmark = MARKS
interpreted = interpreted_by("triton_worker_graph_attention.py")


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


def test_a_seed_on_the_device_draws_as_its_number(interpreted):
    """Bit for bit, forward and backward."""
    assert interpreted["seeded"]["equal"] and interpreted["seeded"]["other"]
