"""The Triton kernels of pooled_attention: in the interpreter against reference.py in float64, whose weights they drop."""

from __future__ import annotations

import pytest
from triton_worker import MARKS, interpreted_by
from triton_worker_pooled_attention import CASES

pytestmark = MARKS
interpreted = interpreted_by("triton_worker_pooled_attention.py")


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_equation(interpreted, case):
    found = interpreted[case]
    rows, heads, _, _, dtype, _ = CASES[case]
    floor = 1e-12 if dtype == "float64" else 1e-5
    for error, plain in zip(found["error"], found["plain_error"], strict=True):
        assert error <= 2 * plain + floor  # the house's rule; NaN fails it
    assert set(found["dtypes"]) == {f"torch.{dtype}"} and found["repeatable"]
    assert found["lse"] == [[len(rows), heads], "torch.float64" if dtype == "float64" else "torch.float32"]


def test_offsets_out_of_range_are_never_followed_and_raised_once(interpreted):
    for forward, again, backward, and_again in interpreted["damaged"]["said"].values():
        assert forward == backward and forward.startswith("pooled_attention: cu must rise from 0 to the number of rows")
        assert not again and not and_again


def test_a_seed_on_the_device_draws_as_its_number(interpreted):
    """Bit for bit, forward and backward."""
    assert interpreted["seeded"]["equal"] and interpreted["seeded"]["other"]
