"""The inputs of the graph_attention benchmarks: batches of graphs, what attends over them, and what it gives in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.measure import Case, Truth
from case_fast import equations
from case_fast.batch import Graphs
from case_fast.errors import ConfigError

HEADS, DIMENSION, RELATIONS = 2, 150, 7  # of the paper: d = 300 in two heads; five relations, temporal order, self loop
REAL_GRAPHS = Path(__file__).parents[1] / "data" / "graphs.safetensors"  # made by real_graphs.py
REAL_KINDS = ("cognition", "concept")
FIELDS = ("indptr", "indices", "relation", "cu_vertices")
SIZES = ["paper", *(REAL_KINDS if REAL_GRAPHS.is_file() else ()), "1190x84", "1e3", "1e4", "1e5"]
QUICK_SIZES = ["100"]
AXIS = "vertices of one graph, 4 edges each"
_CHUNK = 4096  # rows at once: the truth of a large graph in little memory


@dataclass(frozen=True)
class GraphCase(Case):
    """query, key, value, grad_out: (V, H, D); relation_query, relation_key: (R, H, D) or None: plain attention."""

    graphs: Graphs
    query: Tensor
    key: Tensor
    value: Tensor
    relation_query: Tensor | None
    relation_key: Tensor | None
    grad_out: Tensor

    @property
    def vertices(self) -> int:
        return self.query.shape[0]

    @property
    def edges(self) -> int:
        return self.graphs.indices.numel()

    @property
    def shape(self) -> dict[str, int]:
        relations = 0 if self.relation_query is None else self.relation_query.shape[0]
        return {"V": self.vertices, "E": self.edges, "H": self.query.shape[1], "D": self.query.shape[2], "relations": relations}

    @property
    def size(self) -> int | None:
        return self.vertices if re.fullmatch(r"[\de]+", self.name) else None  # one graph

    @property
    def least(self) -> tuple[tuple[float, float], ...]:
        (rows, heads, dimension), edges = self.query.shape, self.edges
        relations = 0 if self.relation_query is None else self.relation_query.shape[0]
        products, tables = 2 * edges * heads * dimension, 2 * rows * relations * heads * dimension  # q . k of edges; of relations
        row, indices = rows * heads * dimension * self.query.element_size(), 4 * (rows + (2 if relations else 1) * edges)
        return (2 * products + 2 * tables, 4 * row + indices), (4 * products + 4 * tables, 7 * row + indices)

    @property
    def relation(self) -> Tensor | None:
        return None if self.relation_query is None else self.graphs.relation

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        floats = (self.query, self.key, self.value, self.relation_query, self.relation_key)
        return tuple(x for x in floats if x is not None)


def random_graphs(count: int, vertices: int, edges: int, generator: torch.Generator) -> Graphs:
    """``count`` graphs of equal size: a self loop at each vertex, as in CASE, and distinct random edges, ``edges`` in all."""
    start = vertices * torch.arange(count)
    rows, columns = [], []
    for first in start.tolist():
        own = torch.arange(vertices) * (vertices + 1)  # a cell of the matrix: row * vertices + column
        others = torch.empty(0, dtype=torch.int64)
        while others.numel() < edges - vertices:
            drawn = torch.randint(vertices**2, (2 * edges,), generator=generator)
            others = torch.cat([others, drawn[drawn % (vertices + 1) != 0]]).unique()
        others = others[torch.randperm(others.numel(), generator=generator)[: edges - vertices]]
        cell = torch.cat([own, others]).sort().values
        rows.append(cell // vertices + first)
        columns.append(cell % vertices + first)
    row, column = torch.cat(rows), torch.cat(columns)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=count * vertices).cumsum(0)])
    relation = torch.randint(RELATIONS, (row.numel(),), generator=generator)
    cu_vertices = vertices * torch.arange(count + 1)
    return Graphs(indptr.int(), column.int(), relation.int(), cu_vertices, torch.arange(count).repeat_interleave(vertices))


def make_case(name: str, what: str, graphs: Graphs, relations: int | None = RELATIONS, heads: int = HEADS, seed: int = 0,
              dimension: int = DIMENSION, device: str = "cpu", dtype: torch.dtype = torch.float32) -> GraphCase:
    """Normal queries, keys, values and relations over these graphs; the same numbers for one seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, heads, dimension, generator=generator).to(device, dtype)

    vertices = graphs.indptr.numel() - 1
    q, k, v, g = (normal(vertices) for _ in range(4))
    relation = (None, None) if relations is None else (normal(relations), normal(relations))
    return GraphCase(name, what, graphs.to(device), q, k, v, *relation, g)


def read_real_graphs(kind: str, path: Path = REAL_GRAPHS) -> list[Graphs]:
    """The batches of 16 dialogues' graphs that `benchmarks.graph_attention.real_graphs` wrote."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing; make it from a store: python -m benchmarks.graph_attention.real_graphs STORE "
                          f"--out {path}")
    stored = load_file(path)
    batches = []
    while f"{kind}.{len(batches)}.indptr" in stored:
        parts = {field: stored[f"{kind}.{len(batches)}.{field}"] for field in FIELDS}
        sizes = parts["cu_vertices"].diff()
        batches.append(Graphs(**parts, dialogue=torch.arange(sizes.numel()).repeat_interleave(sizes)))
    if not batches:
        raise ConfigError(f"{path} holds no graphs of the kind {kind!r}; "
                          "make it again with python -m benchmarks.graph_attention.real_graphs")
    return batches


def median_batch(batches: list[Graphs]) -> Graphs:
    """The batch with the median number of edges."""
    return sorted(batches, key=lambda graphs: graphs.indices.numel())[len(batches) // 2]


def case_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, real: Path = REAL_GRAPHS) -> GraphCase:
    """The case of a name: paper (16x84), cognition, concept, graphs x vertices as 1190x84, or vertices of one graph as 1e4."""
    if batch := re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,3})", "16x84" if name == "paper" else name):
        count, vertices = int(batch[1]), int(batch[2])
        if vertices < 8:
            raise ConfigError(f"size {name!r} has graphs of {vertices} vertices; they need at least 8")
        graphs = random_graphs(count, vertices, 4 * vertices, torch.Generator().manual_seed(0))
        what = f"{count:,} graphs of {vertices:,} vertices, 4 edges a vertex"
        return make_case(name, what, graphs, device=device, dtype=dtype)
    if name in REAL_KINDS:
        graphs = median_batch(read_real_graphs(name, real))
        kind, relations = ("G_CS", RELATIONS) if name == "cognition" else ("G_EC (no relations)", None)
        what = f"{kind} of {graphs.cu_vertices.numel() - 1} EmpatheticDialogues"
        return make_case(name, what, graphs, relations, device=device, dtype=dtype)
    if not re.fullmatch(r"[1-9]\d*(e\d)?", name) or not 8 <= float(name) <= 1e7:
        raise ConfigError(f"size {name!r} is unknown; one of paper, {', '.join(REAL_KINDS)}, "
                          "graphs x vertices such as 1190x84, or a number of vertices, 8 to 1e7")
    vertices = int(float(name))
    graphs = random_graphs(1, vertices, 4 * vertices, torch.Generator().manual_seed(0))
    return make_case(name, f"one graph of {vertices:,} vertices, 4 edges a vertex", graphs, device=device, dtype=dtype)


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
