"""The Triton kernels of bilinear_mim: in the interpreter against equations.py in float64."""

from __future__ import annotations

import pytest
from triton_worker import MARKS, interpreted_by
from triton_worker_bilinear_mim import CASES, SIGMOID

pytestmark = MARKS
interpreted = interpreted_by("triton_worker_bilinear_mim.py")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_equation(interpreted, case):
    found = interpreted[case]
    *_, score, dtype = CASES[case]
    assert len(found["error"]) == (6 if score == SIGMOID else 5)
    floor = 1e-12 if dtype == "float64" else 1e-5
    for error, plain in zip(found["error"], found["plain_error"], strict=True):
        assert error <= 2 * plain + floor  # the house's rule; NaN fails it
    full = "torch.float64" if dtype == "float64" else "torch.float32"
    assert found["dtypes"] == [full] * 3 + [f"torch.{dtype}"] * (len(found["error"]) - 3)
    assert found["repeatable"]


@pytest.mark.parametrize("case", [case for case in CASES if "one pair" in case])
def test_a_pair_alone_has_no_loss_and_no_gradient(interpreted, case):
    side_y, side_x, _, *grads = interpreted[case]["largest"]
    assert side_y == side_x == 0 and not any(grads)


def test_blocks_and_atomics_change_nothing(interpreted):
    assert len(interpreted["small blocks"]["error"]) == 4
    for errors in interpreted["small blocks"]["error"].values():
        assert max(errors) <= 1e-5


def test_the_same_rows_are_drawn_as_in_the_equation(interpreted):
    assert set(map(tuple, interpreted["draws"]["equal"].values())) == {(True, True)}


def test_nan_shows_where_the_equation_shows_it_and_large_scores_stay_finite(interpreted):
    found = interpreted["hard"]
    for sides in found["nan"].values():
        for ours, expected in sides:
            assert ours == expected and any(ours)
    assert any(not all(ours) for name in ("sampled", "sampled dot") for ours, _ in found["nan"][name])
    for said in found["finite"].values():
        assert all(said)


def test_a_positive_out_of_range_makes_its_loss_nan_and_is_raised(interpreted):
    for error, nan, count in interpreted["hard"]["wrong"].values():
        assert error.startswith("bilinear_mim: positive ") and nan and count == 1


def test_what_does_not_exist_is_in_no_sum_and_has_zeros(interpreted):
    found = interpreted["not all exist"]
    assert len(found["error"]) == 12
    assert all(error <= 1e-5 for errors in found["error"].values() for error in errors)
    assert not any(map(any, found["beyond"].values()))


def test_a_seed_on_the_device_draws_as_its_number(interpreted):
    """Bit for bit, forward and backward."""
    assert interpreted["seeded"]["equal"] and interpreted["seeded"]["other"]
