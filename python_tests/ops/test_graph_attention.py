"""graph_attention alone; what all ops have in common is in test_families.py."""

from __future__ import annotations

import torch
from op_cases.graph_attention import GraphAttention

from case_fast.ops import graph_attention


def test_zero_scale_is_the_mean_of_the_neighbours():
    value = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1)
    indptr, indices = torch.tensor([0, 3, 3, 4]), torch.tensor([0, 1, 2, 1])
    query = torch.full_like(value, 7.0)
    assert graph_attention(query, query, value, indptr, indices, scale=0.0).flatten().tolist() == [3.0, 0.0, 2.0]


# ---- arguments


def test_nothing_but_inputs_and_weights_is_kept(native):
    case = GraphAttention.made(50, 200, heads=3, dim=40)
    saved = case.having({name: x.requires_grad_() for name, x in case.floats().items()}).call()["out"].grad_fn.saved_tensors
    own = {x.data_ptr() for x in case.arguments().values() if isinstance(x, torch.Tensor)}
    (weights,) = [x for x in saved if x is not None and x.data_ptr() not in own]
    assert weights.shape == (200, 3)
