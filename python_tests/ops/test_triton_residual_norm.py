"""The Triton kernels of residual_norm: in the interpreter against reference.py in float64."""

from __future__ import annotations

import pytest
from triton_worker import MARKS, interpreted_by
from triton_worker_residual_norm import CASES

pytestmark = MARKS
interpreted = interpreted_by("triton_worker_residual_norm.py")


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_equal_the_equation(interpreted, case):
    found = interpreted[case]
    rows, width, dtype, _, adds, *_ = CASES[case]
    floor = 1e-11 if dtype == "float64" else 1e-5
    for error, plain in zip(found["error"], found["plain_error"], strict=True):
        assert error <= 2 * plain + floor  # the house's rule; NaN fails it
    assert set(found["dtypes"]) == {f"torch.{dtype}"}
    assert found["shapes"] == [[rows, width]] * (4 if adds else 3) + [[width]] * 2
    assert found["repeatable"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_dropped_is_what_the_reference_drops(interpreted, case):
    assert interpreted[case]["alike"]
