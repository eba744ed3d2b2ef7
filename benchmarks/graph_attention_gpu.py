"""graph_attention on a GPU, for `benchmarks.gpu`: our backends and plans, the peers, and every kernel on small graphs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.graphs import make_case, random_graphs
from benchmarks.on_gpu import DTYPES, OnGpu, backend
from case_fast import ops


@contextmanager
def kernels(name: str, plan: int = 0) -> Iterator[None]:
    """Which of our kernels run."""
    module = sys.modules["case_fast.ops.graph_attention"]  # `ops.graph_attention` is the function
    before = module.PLAN_AUTO
    module.PLAN_AUTO = plan
    try:
        with backend(name):
            yield
    finally:
        module.PLAN_AUTO = before


def small() -> None:
    """A few hundred edges through every kernel: both plans, graphs that fit and do not, long rows and columns, each dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 20, 70, 150, 3), (2, 30, 90, 7, None), (1, 700, 1400, 150, 40), (1, 40, 1300, 6, 2))
    for count, vertices, edges, dimension, relations in shapes:
        graphs = random_graphs(count, vertices, edges, generator)
        if vertices == 40:
            graphs.indptr[1:] = torch.linspace(900, edges, vertices).int()  # one long row, and
            graphs.indices[200:800] = 3  # one long column
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            case = make_case("small", "", graphs, relations, dimension=dimension, device="cuda", dtype=dtype)
            for name, plan in (("native", 1), ("native", 2), ("triton", 0)):
                if name == "triton" and dtype not in DTYPES.values():
                    continue  # each takes seconds to compile
                with kernels(name, plan):
                    leaves = [x.detach().requires_grad_() for x in case.inputs]
                    out = ops.graph_attention(*leaves[:3], case.graphs.indptr, case.graphs.indices, case.relation, *leaves[3:],
                                              dropout_p=0.1, seed=5)
                    torch.autograd.grad(out, leaves, case.grad_out)


ON_GPU = OnGpu(
    ours={
        "case_fast": lambda: kernels("native"),
        "case_fast, plan graphs": lambda: kernels("native", 1),
        "case_fast, plan rows": lambda: kernels("native", 2),
        "case_fast, Triton": lambda: kernels("triton"),
    },
    peers=["gather/scatter, relation tables, eager", "gather/scatter, relation tables, torch.compile",
           "dense products, edge bias, torch.compile", "FlexAttention, torch.compile"],
    sizes=["paper", "1e5"],
    small=small,
)
