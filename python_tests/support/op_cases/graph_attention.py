"""case_fast.ops.graph_attention: random calls, and what is particular to checking them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from op_case import POISON, WRONG_SEEDS, Case, Damaged, Poisoned, generator, others, spoiled, strided, wrong_entry
from torch import Tensor

from case_fast import equations, ops

INDEX = ("indptr", "indices", "relation")
SHAPES = [  # vertices, edges, heads, dim, relations, isolated
    (1, 0, 1, 1, None, 0.0), (1, 1, 1, 1, 1, 0.0), (1, 7, 2, 3, 2, 0.0), (2, 1, 1, 2, None, 0.0), (2, 9, 3, 1, 4, 0.0),
    (3, 3, 1, 5, 3, 0.3), (3, 20, 1, 2, 1, 0.0), (4, 6, 2, 2, None, 0.5), (5, 0, 2, 3, 2, 0.0), (5, 11, 2, 3, 7, 0.4),
    (6, 13, 1, 7, 2, 0.2), (7, 7, 2, 4, None, 0.0), (7, 17, 1, 3, 10, 0.3), (8, 5, 2, 2, 3, 0.6), (9, 31, 1, 2, 2, 0.2),
    (11, 12, 1, 4, None, 0.1), (11, 37, 2, 1, 5, 0.5), (13, 29, 1, 2, 3, 0.2), (17, 8, 1, 1, 2, 0.0), (3, 41, 2, 2, 4, 0.0),
    (0, 0, 2, 3, None, 0.0), (0, 0, 1, 2, 3, 0.0), (4, 9, 1, 17, 2, 0.0), (2, 5, 1, 33, None, 0.0),
]
NAMES = ("vertices", "edges", "heads", "dim", "relations", "isolated")
CALLS = [{"vertices": 9, "edges": 31, "relations": 4, "seed": 3}, {"vertices": 12, "edges": 20, "relations": 6, "seed": 4},
         {"vertices": 30, "edges": 100, "relations": 5, "seed": 5}]
DROPPING = [call | {"dropout_p": 0.1} for call in CALLS]


@dataclass(frozen=True)
class GraphAttention(Case):
    query: Tensor
    key: Tensor
    value: Tensor
    indptr: Tensor
    indices: Tensor
    relation: Tensor | None
    relation_query: Tensor | None
    relation_key: Tensor | None
    grad_out: Tensor
    scale: float | None = None
    dropout_p: float = 0.0
    seed: int | Tensor = 0

    family = "graph_attention"
    op = staticmethod(ops.graph_attention)
    plain = staticmethod(equations.graph_attention)
    FLOATS = ("query", "key", "value", "relation_query", "relation_key")

    SMALL = [{"vertices": 20, "edges": 70}, {"vertices": 7, "edges": 25, "relations": None}]
    OPCHECK = [
        {"vertices": 7, "edges": 19},
        {"vertices": 7, "edges": 19, "relations": None},
        {"vertices": 9, "edges": 30, "relations": 4, "dropout_p": 0.3, "seed": 5},
        {"vertices": 5, "edges": 0},
        {"vertices": 0, "edges": 0, "relations": None},
        {"vertices": 6, "edges": 20, "heads": 1, "dim": 3, "long": 7},
        {"vertices": 6, "edges": 20, "dtype": torch.float64},
        {"vertices": 6, "edges": 20, "layout": 1},
    ]
    GRADCHECK = [
        dict(zip(NAMES, shape, strict=True)) | {"number": place, "dropout_p": 0.3 * (place % 3 == 2), "seed": 2**40 + place}
        for place, shape in enumerate(SHAPES)
    ]
    VARIED = [  # one block, many blocks, one large block, no relation, empty rows
        {"vertices": 64, "edges": 300},
        {"vertices": 63, "edges": 300, "relations": None, "dim": 150},
        {"vertices": 900, "edges": 700, "dim": 16, "relations": 10},
        {"vertices": 5000, "edges": 21000, "dim": 7, "isolated": 0.3},
        {"vertices": 5000, "edges": 9000, "dim": 33, "heads": 1, "relations": None},
        {"vertices": 200, "edges": 6000, "dim": 12, "dropout_p": 0.3, "relations": 5},
        {"vertices": 40, "edges": 0},
        {"vertices": 300, "edges": 1300, "dtype": torch.float64, "long": 7},
        {"vertices": 1344, "edges": 5376, "dim": 150, "relations": 4, "isolated": 0.0, "part": 84},  # the paper's batch
    ]
    AVERAGE = [
        ({"vertices": 32, "edges": 100, "dim": 150, "magnitude": 3.0}, 30, 1.3, 1.3),
        ({"vertices": 32, "edges": 100, "dim": 16, "magnitude": 5.0, "relations": None}, 30, 1.3, 1.3),
        ({"vertices": 8, "edges": 600, "dim": 40, "magnitude": 2.0}, 30, 1.3, 1.3),
    ]
    DRAWN = [{"vertices": 30, "edges": 200, "dropout_p": 0.4}]
    STATUSES = [(1, "indptr")]
    COMPILED = [
        ("native", "inductor", None, DROPPING),
        ("native", "aot_eager", True, DROPPING),
        ("reference", "aot_eager", True, CALLS),
    ]

    ON_GPU = {
        "the paper's batch": {"vertices": 1344, "edges": 5376, "dim": 150, "relations": 7, "part": 84, "dropout_p": 0.2},
        "plain": {"vertices": 1344, "edges": 5376, "dim": 150, "relations": None, "part": 84},
        "odd head": {"vertices": 301, "edges": 997, "heads": 3, "dim": 75, "relations": 5, "dropout_p": 0.2},
        "largest head": {"vertices": 64, "edges": 500, "heads": 1, "dim": 256, "dropout_p": 0.2},
        "one vertex": {"vertices": 1, "edges": 3, "heads": 1, "dim": 1, "relations": 1, "isolated": 0.0, "dropout_p": 0.2},
        "no edges": {"vertices": 5, "edges": 0, "dim": 8, "dropout_p": 0.2},
        "no vertices": {"vertices": 0, "edges": 0, "dim": 8, "dropout_p": 0.2},
        "more relations than lanes": {"vertices": 50, "edges": 600, "dim": 6, "relations": 70, "dropout_p": 0.2},
        "dense": {"vertices": 80, "edges": 6000, "dim": 32, "relations": 4, "dropout_p": 0.2},
        "one long row and column": {"vertices": 7000, "edges": 20000, "heads": 1, "dim": 16, "hub": 6000, "dropout_p": 0.2},
        "large": {"vertices": 20011, "edges": 80000, "dim": 150, "relations": 7, "dropout_p": 0.2, "long": 7},
    }

    @classmethod
    def made(cls, vertices: int, edges: int, heads: int = 2, dim: int = 5, relations: int | None = 3, number: int = 0,
             dtype: torch.dtype = torch.float32, device: str = "cpu", isolated: float = 0.2, magnitude: float = 1.0,
             layout: int = 0, long: int | None = None, part: int = 0, hub: int = 0, **more: object) -> GraphAttention:
        """relations None: plain attention. long: bits that say which of INDEX are int64; None: all, where floats are float64.
        part: a batch of graphs of so many vertices. hub: the first vertex has so many edges, and the second is at the end of
        as many."""
        g, long = generator(number), 7 * (dtype == torch.float64) if long is None else long
        indptr, indices, relation = random_csr(vertices, edges, g, relations or 1, isolated)
        if part:
            indices = equations.segment_ids(indptr, edges).int() // part * part + indices % part
        if hub:
            indptr[1:] = torch.linspace(hub, edges, vertices)
            indices[hub : 2 * hub] = 1
        indptr, indices, relation = (strided(x.long() if long >> place & 1 else x, layout).to(device)
                                     for place, x in enumerate((indptr, indices, relation)))

        def normal(rows: int, place: int) -> Tensor:
            x = (torch.randn(rows, heads, dim, generator=g, dtype=torch.float64) * magnitude).to(dtype)
            return strided(x, layout and layout + place).to(device)

        query, key, value, grad_out = (normal(vertices, place) for place in range(4))
        tables = (None, None, None)
        if relations is not None:
            tables = (relation, *(normal(relations, place) for place in range(2)))
        return cls(query, key, value, indptr, indices, *tables, grad_out, **more)

    @classmethod
    def recipe(cls, draw, st) -> dict:
        vertices = draw(st.integers(0, 64))
        choices = {
            "edges": st.integers(0, 6 * vertices),
            "heads": st.integers(1, 3),
            "dim": st.one_of(st.integers(1, 40), st.just(150)),
            "relations": st.one_of(st.none(), st.integers(1, 10)),
            "isolated": st.sampled_from([0.0, 0.3, 0.9]),
            "long": st.integers(0, 7),
            "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
            "seed": st.integers(0, 2**63 - 1),
        }
        found = {"vertices": vertices} | {name: draw(choice) for name, choice in choices.items()}
        size = found["dim"] ** -0.5
        return found | {"scale": draw(st.sampled_from([None, 0.0, 0.5 * size, 1.5 * size]))}

    @classmethod
    def damaged(cls, number: int, g: torch.Generator, device: str) -> Damaged:
        case = cls.made(5 + number % 40, 8 + number % 150, 1 + number % 2, 1 + number % 9, 1 + number % 6, number,
                        device=device, isolated=0.1, long=7 * (number % 2))
        name = INDEX[number % 3]
        index = getattr(case, name)
        limits = {"indptr": case.indices.numel() + 1, "indices": case.query.shape[0], "relation": len(case.relation_query)}
        index, said = wrong_entry(index, [limits[name]] * index.numel(), g)
        return Damaged(case, name, replace(case, **{name: index}), said)

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """One graph of a batch."""
        counts = torch.randint(1, 9, (2 + number % 6,), generator=g).tolist()
        parts = [random_csr(n, int(torch.randint(3 * n + 1, (), generator=g)), g, 4) for n in counts]
        start, edge = 0, 0
        indptr, indices = [torch.zeros(1, dtype=torch.int32)], []
        for vertices, part in zip(counts, parts, strict=True):
            indptr.append(part[0][1:] + edge)
            indices.append(part[1] + start)
            start, edge = start + vertices, edge + part[1].numel()
        case = cls.made(start, 0, 2, 3 + number % 20, 4, number, device=device, dropout_p=0.2 * (number % 2), seed=number)
        case = replace(case, indptr=torch.cat(indptr).int().to(device), indices=torch.cat(indices).int().to(device),
                       relation=torch.cat([part[2] for part in parts]).to(device))
        graph = int(torch.randint(len(counts), (), generator=g))
        start = sum(counts[:graph])
        rows = slice(start, start + counts[graph])
        name = ("query", "key", "value", "grad_out")[number % 4]
        broken = replace(case, **{name: spoiled(getattr(case, name), rows, number)})
        mask = others(sum(counts), rows, device)
        kept = dict.fromkeys(("out", "grad_query", "grad_key", "grad_value"), mask)
        shown = {}
        if name == "value" and number % 5 and number % 2 == 0:
            shown = {"out": (case.indptr[1:] > case.indptr[:-1]) & ~mask}
        return Poisoned(case, broken, POISON[number % 3], f"graph {graph} of {name}", kept, shown)

    def registered(self, runs: str):
        tensors = [getattr(self, name) for name in (*self.FLOATS[:3], *INDEX, *self.FLOATS[3:])]
        numbers, kernels = (0.4, self.dropout_p, *self.seeds()), self.kernels()
        yield kernels._forward_op, (runs, *tensors, *numbers)
        weights = kernels._forward_op(runs, *tensors, *numbers)[1]
        yield kernels._backward_op, (runs, self.grad_out, *tensors, weights, *numbers)


def random_csr(vertices: int, edges: int, generator: torch.Generator, relations: int = 3, isolated: float = 0.0
               ) -> tuple[Tensor, Tensor, Tensor]:
    """indptr, indices, relation (int32) of a random graph with parallel edges; a share of its vertices ``isolated``."""
    degree = torch.zeros(vertices, dtype=torch.int64)
    lonely = torch.rand(vertices, generator=generator) < isolated
    if vertices and edges and not lonely.all():
        allowed = (~lonely).nonzero().squeeze(1)
        rows = allowed[torch.randint(len(allowed), (edges,), generator=generator)]
        degree = torch.bincount(rows, minlength=vertices)
    else:
        edges = 0
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), degree.cumsum(0)])
    indices = torch.randint(max(vertices, 1), (edges,), generator=generator)
    relation = torch.randint(max(relations, 1), (edges,), generator=generator)
    return indptr.int(), indices.int(), relation.int()


def column(x: Tensor) -> Tensor:
    return x.unsqueeze(1)


def placed(x: Tensor, place: int, value: int) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


BASE = GraphAttention.BASE = GraphAttention.made(6, 20)
GraphAttention.WRONG = [
    ("query", {"query": BASE.query[0]}, ValueError),
    ("query", {"query": BASE.query.int()}, TypeError),
    ("query", {name: x[:, :, :0] for name, x in BASE.floats().items()}, ValueError),
    ("query", {name: x[:, :0] for name, x in BASE.floats().items()}, ValueError),
    ("query", {"query": BASE.query.to(torch.float8_e4m3fn)}, TypeError),
    ("key", {"key": BASE.key[:5]}, ValueError),
    ("key", {"key": BASE.key.double()}, TypeError),
    ("key", {"key": BASE.key.to("meta")}, ValueError),
    ("value", {"value": BASE.value[:, :1]}, ValueError),
    ("value", {"value": BASE.value.half()}, TypeError),
    ("indptr", {"indptr": BASE.indptr[:-1]}, ValueError),
    ("indptr", {"indptr": BASE.indptr.float()}, TypeError),
    ("indptr", {"indptr": BASE.indptr.to("meta")}, ValueError),
    ("indptr", {"indptr": column(BASE.indptr)}, ValueError),
    ("indptr", {"indptr": BASE.indptr + 1}, IndexError),
    ("indptr", {"indptr": BASE.indptr.flip(0)}, IndexError),
    ("indptr", {"indices": BASE.indices[:-1], "relation": BASE.relation[:-1]}, IndexError),
    ("indices", {"indices": BASE.indices.bool()}, TypeError),
    ("indices", {"indices": BASE.indices.short()}, TypeError),
    ("indices", {"indices": column(BASE.indices)}, ValueError),
    ("indices", {"indices": BASE.indices + 6}, IndexError),
    ("indices holds 99 at place 3; it must be in [0, 6)", {"indices": placed(BASE.indices, 3, 99)}, IndexError),
    ("relation must", {"relation": BASE.relation[1:]}, ValueError),
    ("relation must", {"relation": BASE.relation.double()}, TypeError),
    ("relation holds", {"relation": BASE.relation + 3}, IndexError),
    ("relation needs relation_query", {"relation_query": None}, ValueError),
    ("relation needs relation_key", {"relation_key": None}, ValueError),
    ("relation names", {"relation_query": BASE.relation_query[:0], "relation_key": BASE.relation_key[:0]}, IndexError),
    ("relation_query is given without relation", {"relation": None}, ValueError),
    ("relation_key is given without relation", {"relation": None, "relation_query": None}, ValueError),
    ("relation_query", {"relation_query": BASE.relation_query[:, :, 1:]}, ValueError),
    ("relation_query", {"relation_query": BASE.relation_query.double()}, TypeError),
    ("relation_key", {"relation_key": BASE.relation_key[1:]}, ValueError),
    ("scale", {"scale": -0.1}, ValueError),
    ("scale", {"scale": float("nan")}, ValueError),
    ("scale", {"scale": float("inf")}, ValueError),
    ("dropout_p", {"dropout_p": 1.0}, ValueError),
    ("dropout_p", {"dropout_p": -0.1}, ValueError),
    ("dropout_p", {"dropout_p": float("nan")}, ValueError),
    *WRONG_SEEDS,
]
