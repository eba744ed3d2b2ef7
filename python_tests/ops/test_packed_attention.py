"""packed_attention alone; what all ops have in common is in test_families.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_cases.packed_attention import PackedAttention
from op_checks import identical

from case_fast.ops import packed_attention


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e12])
def test_gradients_of_huge_scores_stay_of_the_size_of_grad_out(native, magnitude):
    """The softmax is saturated; what is recomputed in backward is off by the rounding of the scores, and no more."""
    case = PackedAttention.made([9, 5], [7, 20], dim=8, number=3, magnitude=magnitude)
    case = replace(case, grad_out=case.grad_out / magnitude)
    found, exact = case.results(), case.value.double() / magnitude
    assert found["out"].double().div(magnitude).abs().max() <= exact.abs().max() * 1.0001
    assert found["grad_value"].abs().max() <= case.grad_out.abs().sum(0).max()
    assert all(x.isfinite().all() for x in found.values())


def test_causal_attention_aligns_the_ends():
    value = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1)
    query = torch.zeros(5, 1, 1)
    found = packed_attention(query[:2], value, value, torch.tensor([0, 2]), torch.tensor([0, 3]), causal=True, scale=0.0)
    assert found.flatten().tolist() == [1.5, 3.0]
    found = packed_attention(query, value, value, torch.tensor([0, 5]), torch.tensor([0, 3]), causal=True, scale=0.0)
    assert found.flatten().tolist() == [0.0, 0.0, 1.0, 1.5, 3.0]


# ---- arguments


def test_one_tensor_may_be_query_key_and_value(runs):
    x = PackedAttention.made([3, 4], dtype=torch.float64).query
    cu = torch.tensor([0, 3, 7])
    assert torch.autograd.gradcheck(lambda x: packed_attention(x, x, x, cu, cu, causal=True), x.requires_grad_())


def test_rows_apart_are_read_in_place(native):
    """Queries, keys and values that lie side by side, as one projection gives them."""
    side_by_side = torch.randn(7, 3, 2, 5)
    query, key, value = side_by_side.unbind(1)
    module = PackedAttention.kernels()
    assert all(module.rows_apart(x) is x and module.row_stride(x) == 30 for x in (query, key, value))
    cu = torch.tensor([0, 3, 7])
    found = packed_attention(query, key, value, cu, cu)
    assert identical(found, packed_attention(query.contiguous(), key.contiguous(), value.contiguous(), cu, cu))


def test_only_rows_and_one_number_a_row_and_head_are_kept(native):
    case = PackedAttention.made([50, 20], [200, 300], heads=3, dim=40)
    out = case.having({name: x.requires_grad_() for name, x in case.floats().items()}).call()["out"]
    own = {x.data_ptr() for x in case.arguments().values() if isinstance(x, torch.Tensor)} | {out.data_ptr()}
    (lse,) = [x for x in out.grad_fn.saved_tensors if x is not None and x.data_ptr() not in own]
    assert lse.shape == (70, 3)
