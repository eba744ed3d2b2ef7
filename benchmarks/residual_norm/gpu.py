"""residual_norm on a GPU: the peers, and every kernel on small inputs."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch

from benchmarks.measure import is_ours
from benchmarks.residual_norm import peers
from benchmarks.residual_norm.cases import case_of
from benchmarks.switches import backend
from case_fast import ops

PEERS = [name for name in peers.PEERS if not is_ours(name)]
SIZES = ["words", "replies", "graphs", "texts", "graphs-norm", "100000x300"]
WAYS = {"case_fast": partial(backend, "triton")}


def small() -> None:
    """A few rows through every kernel: with and without what may be absent, in each dtype."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, size, dropout_p in product(dtypes, ("70x130", "70x130:norm", "300x1"), (0.0, 0.3)):
        case = case_of(size, device="cuda", dtype=dtype)
        for seed in (3, torch.tensor(3, device="cuda")):
            with backend("triton"):
                leaves = tuple(x.detach().requires_grad_() for x in case.inputs)
                x, update, weight, bias = case.arguments(leaves)
                out = ops.residual_norm(x, update, weight, bias, dropout_p=dropout_p, seed=seed)
                torch.autograd.grad(out, leaves, (case.grad_total, case.grad_normed))
                if update is not None:
                    ops.residual(x, update, dropout_p, seed).sum().backward()
