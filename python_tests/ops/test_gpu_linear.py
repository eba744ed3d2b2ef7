"""linear on a GPU, where torch's products serve it. Needs only torch, numpy and pytest."""

from __future__ import annotations

import pytest
import torch
from gpu import case_of, same_bits
from op_case import HALF
from op_cases.linear import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("shape", Linear.ON_GPU)
def test_results_and_gradients_are_those_of_plain_torch(shape, dtype):
    case = case_of(Linear, shape, dtype=dtype)
    assert same_bits(case.results(), case.results(case.plain))


def test_autocast_is_that_of_the_products():
    case = case_of(Linear, "query, key and value")
    with torch.autocast("cuda", torch.bfloat16):
        assert case.call()["out"].dtype == torch.bfloat16
