"""cross_attention on a GPU: the kernels of decoding, torch's products around our attention, the peers, and every kernel on small
replies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from benchmarks.cross_attention import peers
from benchmarks.cross_attention.cases import make_case
from benchmarks.measure import OURS
from benchmarks.switches import backend, setting
from case_fast import ops
from case_fast.ops.cross_attention import FEW_ROWS

PEERS = [name for name in peers.PEERS if name != OURS]
SIZES = ["step16", "beams16x5", "rows256", "rows1024"]


ALL_ROWS, NO_ROWS = 65535, -1  # of few_rows: the kernels of decoding wherever they can, or never


@contextmanager
def kernels(few_rows: int = FEW_ROWS, plan: int = 0) -> Iterator[None]:
    """Up to how many rows the kernels of decoding run, and the plan of packed_attention."""
    with backend("native"), setting("cross_attention", FEW_ROWS=few_rows), setting("packed_attention", PLAN_AUTO=plan):
        yield


WAYS = {
    "case_fast": kernels,
    "case_fast, the kernels of decoding": lambda: kernels(ALL_ROWS),
    "case_fast, torch's products around the attention": lambda: kernels(NO_ROWS),
    "case_fast, torch's products, one block a row": lambda: kernels(NO_ROWS, 1),
}


def small() -> None:
    """A few rows through every kernel: decoding and training, both plans, pairs of numbers and single ones, each dtype."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, (width, heads) in product(dtypes, ((300, 2), (15, 3))):
        keys = [[40, 5, 7, 0], [1, 33, 0, 9]]
        case = make_case("small", "", [3, 17, 0, 1], keys, device="cuda", dtype=dtype, width=width, heads=heads)
        dropout = {"dropout_p": 0.1, "output_dropout_p": 0.1, "seed": 5}
        for few_rows in (ALL_ROWS, NO_ROWS):
            with kernels(few_rows), torch.no_grad():
                ops.cross_attention(case.hidden, case.cu_hidden, case.sources, **dropout)
        for plan in (1, 2):
            with kernels(NO_ROWS, plan):
                leaves = [x.detach().requires_grad_() for x in case.inputs]
                out = ops.cross_attention(leaves[0], case.cu_hidden, case.sources_of(tuple(leaves[1:])), **dropout)
                torch.autograd.grad(out, leaves, case.grad_out)
