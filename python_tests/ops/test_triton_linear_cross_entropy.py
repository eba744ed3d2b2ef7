"""The Triton kernels of linear_cross_entropy and top_words: in the interpreter against equations.py in float64."""

from __future__ import annotations

import pytest
from triton_worker import MARKS, interpreted_by
from triton_worker_linear_cross_entropy import BEST, CASES

pytestmark = MARKS
interpreted = interpreted_by("triton_worker_linear_cross_entropy.py")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_equation(interpreted, case):
    found = interpreted[case]
    *_, dtype = CASES[case]
    floor = 1e-12 if dtype == "float64" else 1e-5
    for how in ("error", "kept_error"):
        assert len(found[how]) == 4
        for error, plain in zip(found[how], found["plain_error"], strict=True):
            assert error <= 2 * plain + floor  # the house's rule; NaN fails it
    full = "torch.float64" if dtype == "float64" else "torch.float32"
    assert found["dtypes"] == [full, *[f"torch.{dtype}"] * 3, "torch.int64"]
    assert found["predicted"] and found["repeatable"]


@pytest.mark.parametrize("case", BEST)
def test_the_most_probable_words_equal_the_equation(interpreted, case):
    found = interpreted[f"best: {case}"]
    *_, dtype = BEST[case]
    assert found["error"] <= 2 * found["plain_error"] + (1e-12 if dtype == "float64" else 1e-5)
    assert found["words"]
    assert found["dtypes"] == ["torch.float64" if dtype == "float64" else "torch.float32", "torch.int64"]


def test_blocks_change_nothing_and_each_gradient_comes_alone(interpreted):
    errors = interpreted["small blocks"]["error"]
    assert len(errors) == 2 * (2 + 3) + 4
    for name, found in errors.items():
        assert max(found) <= 1e-5, name


def test_ties_forbidden_words_and_nan_are_as_in_the_equation(interpreted):
    said = interpreted["hard"]["said"]
    assert len(said) > 50
    assert not [name for name, right in said.items() if not right]


def test_a_target_or_an_offset_out_of_range_makes_losses_nan_and_is_raised(interpreted):
    said = interpreted["damaged"]["said"]
    assert len(said) == 12
    for name, (nan, error) in said.items():
        argument = name.split()[0]
        assert error.startswith(f"linear_cross_entropy: {argument} "), name
        assert nan == [4] if argument == "target" else nan, name
    assert interpreted["damaged"]["again"] == ""


def test_the_ops_call_the_kernels(interpreted):
    """With and without what is kept, and for the words up to 32."""
    assert interpreted["public"]["calls"] == [True, False, 3, 32]
    assert interpreted["public"]["right"] == [True] * 5
