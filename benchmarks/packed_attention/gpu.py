"""packed_attention on a GPU: our plans, the peers, and every kernel on small sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from benchmarks.measure import OURS
from benchmarks.packed_attention import peers
from benchmarks.packed_attention.cases import case_of
from benchmarks.switches import backend, setting
from case_fast import ops

PEERS = [name for name in peers.PEERS if name != OURS]
SIZES = ["contexts", "replies", "64x100:skewed", "4x1024:causal"]


@contextmanager
def kernels(plan: int = 0) -> Iterator[None]:
    """Which of our kernels run."""
    with backend("native"), setting("packed_attention", PLAN_AUTO=plan):
        yield


WAYS = {
    "case_fast": kernels,
    "case_fast, plan rows": lambda: kernels(1),
    "case_fast, plan tiles": lambda: kernels(2),
    "case_fast, plan warps": lambda: kernels(3),
}


def small() -> None:
    """A few rows through every kernel: all plans, causal or not, keys shared by sequences, pairs of numbers and single ones,
    each dtype."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, (heads, dimension), size, plan in product(dtypes, ((2, 150), (3, 5)), ("4x14", "4x14:causal"), (1, 2, 3)):
        case = case_of(size, device="cuda", dtype=dtype, heads=heads, dimension=dimension)
        for key_of in (None, torch.tensor([1, 0, 3, 1], device="cuda")):
            with kernels(plan):
                leaves = [x.detach().requires_grad_() for x in case.inputs]
                out = ops.packed_attention(*leaves, case.cu, case.cu, case.causal, key_of=key_of)
                torch.autograd.grad(out, leaves, case.grad_out)
