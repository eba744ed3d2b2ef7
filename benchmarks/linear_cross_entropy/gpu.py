"""linear_cross_entropy and top_words on a GPU: tiles of several sizes, the peers, and every kernel on small batches."""

from __future__ import annotations

from itertools import product

import torch

from benchmarks.family import DTYPES
from benchmarks.linear_cross_entropy import peers
from benchmarks.linear_cross_entropy.cases import case_of
from benchmarks.measure import OURS
from benchmarks.switches import backend, tiles
from case_fast import ops

TRITON = "linear_cross_entropy_triton"
PEERS = [name for name in peers.PEERS if name != OURS]
SIZES = ["480x24000", "480x24000:recomputed", "4096x24000", "bow16", "80x24000:top5"]
WAYS = {
    "case_fast": lambda: backend("triton"),
    "case_fast, tiles 64 x 128": lambda: tiles(TRITON, 64, 128),
    "case_fast, tiles 128 x 64": lambda: tiles(TRITON, 128, 64),
    "case_fast, tiles 128 x 128": lambda: tiles(TRITON, 128, 128),
}


def small() -> None:
    """A few rows through every kernel: one target a row and several, scores kept and made again, each dtype; and the most
    probable words."""
    for size, dtype, keep_bytes in product(("70x331", "1x17", "40x200:bow"), DTYPES["cuda"], (1 << 30, 0)):
        case = case_of(size, device="cuda", dtype=getattr(torch, dtype), dimension=70)
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        with backend("triton"):
            nll, _ = ops.linear_cross_entropy(*leaves, case.target, keep_bytes, case.cu_target)
            torch.autograd.grad(nll.sum(), leaves)
            ops.top_words(*leaves, 5)
