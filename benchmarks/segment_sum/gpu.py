"""segment_sum on a GPU: in one launch and sorted first, the peers, and every kernel on small inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from benchmarks.measure import is_ours
from benchmarks.segment_sum import peers
from benchmarks.segment_sum.cases import case_of
from benchmarks.switches import backend, setting
from case_fast import ops

PEERS = [name for name in peers.PEERS if not is_ours(name)]
SIZES = ["texts", "knowledge", "context-most", "targets", "200000x300:50000:mixed"]
LOOKS = 1 << 24  # as the kernels have it


@contextmanager
def kernels(most_looks: int = LOOKS) -> Iterator[None]:
    """Up to how many rows times segments nothing is sorted."""
    with backend("triton"), setting("segment_sum_triton", MOST_LOOKS=most_looks):
        yield


WAYS = {
    "case_fast": kernels,
    "case_fast, sorted first": lambda: kernels(-1),
}


def small() -> None:
    """A few rows through every kernel: wide and narrow ones, both ways, both kinds of index, each dtype."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, size, looks in product(dtypes, ("70x130:9", "70x130:9:mixed", "300x1:5"), (LOOKS, -1)):
        case = case_of(size, device="cuda", dtype=dtype)
        for segment in (case.segment, case.segment.int()):
            with kernels(looks):
                x = case.x.detach().requires_grad_()
                torch.autograd.grad(ops.segment_sum(x, segment, case.segments), x, case.grad_out)
