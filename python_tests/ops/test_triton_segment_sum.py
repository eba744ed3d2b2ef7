"""The Triton kernels of segment_sum: in the interpreter against reference.py in float64."""

from __future__ import annotations

import pytest
from triton_worker import MARKS, interpreted_by
from triton_worker_segment_sum import CASES

WRONG = ["7", "-1", str(2**31 + 3), str(-(2**40))]
pytestmark = MARKS
interpreted = interpreted_by("triton_worker_segment_sum.py")


@pytest.mark.parametrize("case", CASES)
def test_sums_and_gradients_equal_the_equation(interpreted, case):
    found = interpreted[case]
    rows, size, dims, dtype, *_ = CASES[case]
    floor = 1e-12 if dtype == "float64" else 1e-5
    for error, plain in zip(found["error"], found["plain_error"], strict=True):
        assert error <= 2 * plain + floor  # the house's rule; NaN fails it
    assert set(found["dtypes"]) == {f"torch.{dtype}"}
    assert found["shapes"] == [[size, *dims], [rows, *dims]] and found["repeatable"]


@pytest.mark.parametrize("wrong", [*WRONG, *(f"{number}, sorted" for number in WRONG)])
def test_a_number_that_names_nothing_is_left_out_and_raised_once(interpreted, wrong):
    of_sum, of_gradient, others_stay, nan_rows = interpreted["damaged"]["said"][wrong]
    for first, again in (of_sum, of_gradient):
        assert first.startswith("segment_sum: segment names a segment, or take's index a row, that does not exist") and not again
    assert others_stay and nan_rows == [5]
