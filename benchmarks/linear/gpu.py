"""linear on a GPU: no kernel of ours, but torch's products, as every peer calls them; and each form of the op once."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product

import torch

from benchmarks.linear import peers
from benchmarks.linear.cases import NAMED, case_of
from benchmarks.measure import OURS
from case_fast import ops

PEERS = [name for name in peers.PEERS if name != OURS and "oneDNN" not in name and "bfloat16" not in name]
SIZES = [*NAMED]
WAYS = {"case_fast": nullcontext}


def small() -> None:
    """A few rows through each form: activations, several weights, each dtype; and groups."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, size in product(dtypes, ("30x20:10", "16x40:9+5:gelu", "16x40:9:relu", "16x40:9:tanh")):
        case = case_of(size, device="cuda", dtype=dtype)
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        torch.autograd.grad(ops.linear(*case.parts(*leaves), case.activation), leaves, case.grad_out)
    x, weight = torch.randn(5, 2, 8, device="cuda", requires_grad=True), torch.randn(2, 3, 8, device="cuda", requires_grad=True)
    torch.autograd.grad(ops.linear(x, weight).sum(), (x, weight))
