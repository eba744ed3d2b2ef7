"""The vocabulary loss and the most probable words on a GPU, for `benchmarks.gpu`: tiles of several sizes, the peers, and every
kernel on small batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from benchmarks.measure import OURS
from benchmarks.on_gpu import DTYPES, OnGpu, backend
from benchmarks.vocabulary_loss_peers import PEERS
from benchmarks.words import case_of
from case_fast import ops


@contextmanager
def tiles(rows: int, words: int) -> Iterator[None]:
    """The largest tile of scores, of every dtype."""
    from case_fast.ops import linear_cross_entropy_triton as module

    before = dict(module.TILES)
    module.TILES.update(dict.fromkeys(before, (rows, words)))
    try:
        with backend("triton"):
            yield
    finally:
        module.TILES.update(before)


def small() -> None:
    """A few rows through every kernel: one target a row and several, scores kept and made again, each dtype; and the most
    probable words."""
    for size, dtype, keep_bytes in product(("70x331", "1x17", "40x200:bow"), DTYPES.values(), (1 << 30, 0)):
        case = case_of(size, device="cuda", dtype=dtype, dimension=70)
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        with backend("triton"):
            nll, _ = ops.linear_cross_entropy(*leaves, case.target, keep_bytes, case.cu_target)
            torch.autograd.grad(nll.sum(), leaves)
            ops.top_words(*leaves, 5)


ON_GPU = OnGpu(
    ours={
        "case_fast, Triton": lambda: backend("triton"),
        "case_fast, Triton, tiles 64 x 128": lambda: tiles(64, 128),
        "case_fast, Triton, tiles 128 x 64": lambda: tiles(128, 64),
    },
    peers=[name for name in PEERS if name != OURS],
    sizes=["480x24000", "480x24000:recomputed", "4096x24000", "bow16", "80x24000:top5"],
    small=small,
)
