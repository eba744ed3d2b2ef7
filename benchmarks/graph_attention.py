"""`case-fast bench graph_attention`: the op against its peers, forward and with gradients, time and memory."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.graph_attention_peers import PEERS, QUICK
from benchmarks.graphs import REAL_GRAPHS, REAL_KINDS, GraphCase, case_of
from benchmarks.measure import Truth
from benchmarks.run import Family
from case_fast import equations

SIZES = ("paper", *REAL_KINDS, "1190x84", "1e3", "1e4", "1e5")
_CHUNK = 4096  # rows at once: the truth of a large graph in little memory


def truth(case: GraphCase) -> Truth:
    """Output and gradients by equations.py in float64; limits by how far the same in the case's dtype is off."""
    names = ("out", "grad_query", "grad_key", "grad_value", "grad_relation_query", "grad_relation_key")
    return Truth.of(names[: 1 + len(case.inputs)], _by_rows(case, torch.float64), _by_rows(case, case.query.dtype))


def _by_rows(case: GraphCase, dtype: torch.dtype) -> list[Tensor]:
    """Rows do not need each other: a few at a time."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs]
    query, *others = leaves
    outs = []
    for start in range(0, case.vertices, _CHUNK):
        rows = slice(start, min(start + _CHUNK, case.vertices))
        indptr = case.graphs.indptr[rows.start : rows.stop + 1]
        edges = slice(int(indptr[0]), int(indptr[-1]))
        relation = None if case.relation is None else case.relation[edges]
        out = equations.graph_attention(query[rows], *others[:2], indptr - indptr[0], case.graphs.indices[edges], relation,
                                        *others[2:])
        out.backward(case.grad_out[rows].to(dtype))
        outs.append(out.detach())
    return [torch.cat(outs), *(x.grad for x in leaves)]


FAMILY = Family(
    name="graph_attention",
    case_of=case_of,
    truth=truth,
    peers=PEERS,
    quick=QUICK,
    sizes=[size for size in SIZES if size not in REAL_KINDS or REAL_GRAPHS.is_file()],
    quick_sizes=["100"],
    axis="vertices of one graph, 4 edges each",
)
