"""pooled_attention on a GPU: our kernels, the peers, and every kernel on small sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from benchmarks.measure import OURS
from benchmarks.pooled_attention import peers
from benchmarks.pooled_attention.cases import case_of
from benchmarks.switches import backend
from case_fast import ops

PEERS = [name for name in peers.PEERS if name != OURS]
SIZES = ["texts", "reactions", "replies", "texts:pool", "reactions:pool", "4096x6"]


@contextmanager
def kernels() -> Iterator[None]:
    with backend("triton"):
        yield


WAYS = {"case_fast": kernels}


def small() -> None:
    """A few rows through every kernel: rows of one block and of several, dropout or not, each dtype."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, (heads, dimension), size, dropout_p in product(dtypes, ((2, 150), (3, 5)), ("4x6:pool", "3x50:pool"), (0.0, 0.2)):
        case = case_of(size, device="cuda", dtype=dtype, heads=heads, dimension=dimension)
        for cu in (case.cu, case.cu.int()):
            with kernels():
                leaves = [x.detach().requires_grad_() for x in case.inputs]
                out = ops.pooled_attention(*leaves, cu, case.scale, dropout_p=dropout_p, seed=3)
                torch.autograd.grad(out, leaves, case.grad_out)
