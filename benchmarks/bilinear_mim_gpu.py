"""bilinear_mim on a GPU, for `benchmarks.gpu`: tiles of several sizes, the peers, and every kernel on small batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from benchmarks.bilinear_mim_peers import PEERS
from benchmarks.measure import OURS
from benchmarks.on_gpu import DTYPES, OnGpu, backend
from benchmarks.pairs import case_of
from case_fast import equations, ops


@contextmanager
def tiles(rows_of_x: int, rows_of_y: int) -> Iterator[None]:
    """The largest tile of scores, of every dtype."""
    from case_fast.ops import bilinear_mim_triton as module

    before = dict(module.TILES)
    module.TILES.update(dict.fromkeys(before, (rows_of_x, rows_of_y)))
    try:
        with backend("triton"):
            yield
    finally:
        module.TILES.update(before)


@contextmanager
def atomics() -> Iterator[None]:
    """Sums by atomics: the op's ``deterministic=False``."""
    from case_fast.ops import bilinear_mim_triton as module

    before = module.forward
    module.forward = lambda *given: before(*given[:7], False)
    try:
        with backend("triton"):
            yield
    finally:
        module.forward = before


def small() -> None:
    """A few rows through every kernel: in-batch, with more blocks than one, and sampled; both scores; each dtype."""
    usual = product(("70", "150x40", "40:5"), DTYPES.values(), equations.SCORES, [True])
    for size, dtype, score, deterministic in (*usual, ("70", torch.float32, equations.SCORES[0], False)):
        case = case_of(size, device="cuda", dtype=dtype, dimension=70)
        leaves = [x.detach().requires_grad_() for x in case.inputs[: 2 if score == "dot" else 3]]
        weight = leaves[2] if len(leaves) > 2 else None
        with backend("triton"):
            loss = ops.bilinear_mim(*leaves[:2], weight, case.positive, case.negatives, 5, "none", score,
                                    deterministic=deterministic)
            torch.autograd.grad(loss, leaves, case.grad_out)


ON_GPU = OnGpu(
    ours={
        "case_fast, Triton": lambda: backend("triton"),
        "case_fast, Triton, sums by atomics": atomics,
        "case_fast, Triton, tiles 64 x 128": lambda: tiles(64, 128),
        "case_fast, Triton, tiles 128 x 64": lambda: tiles(128, 64),
        "case_fast, Triton, tiles 128 x 256": lambda: tiles(128, 256),
    },
    peers=[name for name in PEERS if name != OURS],
    sizes=["fine", "sampled", "8192", "65536"],
    small=small,
)
