"""bilinear_mim on a GPU: tiles of several sizes, the peers, and every kernel on small batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from benchmarks.bilinear_mim import peers
from benchmarks.bilinear_mim.cases import case_of
from benchmarks.family import DTYPES
from benchmarks.measure import OURS
from benchmarks.switches import backend, setting, tiles
from case_fast import equations, ops

TRITON = "bilinear_mim_triton"
PEERS = [name for name in peers.PEERS if name != OURS]
SIZES = ["fine", "sampled", "8192", "65536"]


@contextmanager
def atomics() -> Iterator[None]:
    """Sums by atomics: the op's ``deterministic=False``."""
    from case_fast.ops.bilinear_mim_triton import forward

    with backend("triton"), setting(TRITON, forward=lambda *given: forward(*given[:8], False)):
        yield


@contextmanager
def large_blocks() -> Iterator[None]:
    """Backward writes the scores' gradient 16 384 rows of x at once, in 256 MiB: of bfloat16 with 8 192 rows of y."""
    with backend("triton"), setting(TRITON, BLOCK_ROWS=16384, BLOCK_BYTES=256 << 20):
        yield


WAYS = {
    "case_fast": lambda: backend("triton"),
    "case_fast, sums by atomics": atomics,
    "case_fast, tiles 64 x 128": lambda: tiles(TRITON, 64, 128),
    "case_fast, tiles 128 x 64": lambda: tiles(TRITON, 128, 64),
    "case_fast, tiles 128 x 128": lambda: tiles(TRITON, 128, 128),
    "case_fast, blocks of 256 MiB": large_blocks,
}


def small() -> None:
    """A few rows through every kernel: in-batch, with more blocks than one, and sampled; both scores; each dtype."""
    usual = product(("70", "150x40", "40:5"), DTYPES["cuda"], equations.SCORES, [True])
    for size, dtype, score, deterministic in (*usual, ("70", "float32", equations.SCORES[0], False)):
        case = case_of(size, device="cuda", dtype=getattr(torch, dtype), dimension=70)
        leaves = [x.detach().requires_grad_() for x in case.inputs[: 2 if score == "dot" else 3]]
        weight = leaves[2] if len(leaves) > 2 else None
        with backend("triton"):
            loss = ops.bilinear_mim(*leaves[:2], weight, case.positive, case.negatives, 5, "none", score,
                                    deterministic=deterministic)
            torch.autograd.grad(loss, leaves, case.grad_out)
