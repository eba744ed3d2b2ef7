"""graph_attention on a GPU: our backends and plans, the peers, and every kernel on small graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.family import DTYPES
from benchmarks.graph_attention.cases import make_case, random_graphs
from benchmarks.switches import backend, native_or_triton, setting
from case_fast import ops

PEERS = ["gather/scatter, relation tables, eager", "gather/scatter, relation tables, torch.compile",
         "dense products, edge bias, torch.compile", "FlexAttention, torch.compile",
         "FlexAttention, torch.compile, mask made beforehand"]
SIZES = ["paper", "1e5"]


@contextmanager
def kernels(name: str, plan: int = 0) -> Iterator[None]:
    """Which of our kernels run."""
    with backend(name), setting("graph_attention", PLAN_AUTO=plan):
        yield


WAYS = {
    "case_fast": lambda: kernels(native_or_triton()),
    "case_fast, plan graphs": lambda: kernels("native", 1),
    "case_fast, plan rows": lambda: kernels("native", 2),
    "case_fast, Triton": lambda: kernels("triton"),
}


def small() -> None:
    """A few hundred edges through every kernel: both plans, graphs that fit and do not, long rows and columns, each dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 20, 70, 150, 3), (2, 30, 90, 7, None), (1, 700, 1400, 150, 40), (1, 40, 1300, 6, 2))
    for count, vertices, edges, dimension, relations in shapes:
        graphs = random_graphs(count, vertices, edges, generator)
        if vertices == 40:
            graphs.indptr[1:] = torch.linspace(900, edges, vertices).int()  # one long row, and
            graphs.indices[200:800] = 3  # one long column
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            case = make_case("small", "", graphs, relations, dimension=dimension, device="cuda", dtype=getattr(torch, dtype))
            for name, plan in (("native", 1), ("native", 2), ("triton", 0)):
                if name == "native" != native_or_triton() or name == "triton" and dtype not in DTYPES["cuda"]:
                    continue  # it was not built; each takes seconds to compile
                with kernels(name, plan):
                    leaves = [x.detach().requires_grad_() for x in case.inputs]
                    out = ops.graph_attention(*leaves[:3], case.graphs.indptr, case.graphs.indices, case.relation, *leaves[3:],
                                              dropout_p=0.1, seed=5)
                    torch.autograd.grad(out, leaves, case.grad_out)
