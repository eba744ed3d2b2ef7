"""Checks of case_fast.ops.graph_attention, each of any size: the tests run a share of them, the scorecard all.

A check takes the number of cases and a device, returns how many cases it looked at, and raises AssertionError on a failure.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import op_checks
import torch
from helpers import generator, random_csr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import digest, identical, strided
from torch import Tensor

from case_fast import equations, ops

KERNELS = sys.modules["case_fast.ops.graph_attention"]  # the module; `ops.graph_attention` is the function
FLOATS = ("query", "key", "value", "relation_query", "relation_key")
INDEX = ("indptr", "indices", "relation")


@dataclass(frozen=True)
class Case:
    """One call's arguments, and the gradient of its output."""

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
    seed: int = 0

    def arguments(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "grad_out"}

    def floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FLOATS if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, grad_out=self.grad_out.to(dtype), **{name: x.to(dtype) for name, x in self.floats().items()})


def make_case(vertices: int, edges: int, heads: int = 2, dim: int = 5, relations: int | None = 3, number: int = 0,
              dtype: torch.dtype = torch.float32, device: str = "cpu", isolated: float = 0.2, magnitude: float = 1.0,
              layout: int = 0, long: int = 0, **more: object) -> Case:
    """Random arguments, the `number`-th; relations None: plain attention. ``layout``: strides other
    than contiguous. ``long``: bits that say which of indptr, indices and relation are int64."""
    g = generator(number)
    index = random_csr(vertices, edges, g, relations or 1, isolated)
    indptr, indices, relation = (
        strided(x.long() if long >> place & 1 else x, layout).to(device) for place, x in enumerate(index)
    )

    def normal(rows: int) -> Tensor:
        return (torch.randn(rows, heads, dim, generator=g, dtype=torch.float64) * magnitude).to(dtype)

    query, key, value, grad_out = (strided(normal(vertices), layout + place).to(device) for place in range(4))
    tables = (None, None)
    if relations is not None:
        tables = tuple(strided(normal(relations), layout + place).to(device) for place in range(2))
    return Case(query, key, value, indptr, indices, relation if relations is not None else None, *tables, grad_out, **more)


def results(case: Case, function: Callable[..., Tensor] = ops.graph_attention) -> dict[str, Tensor]:
    """out, and the gradient of every floating-point input."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.floats().items()}
    out = function(**(case.arguments() | leaves))
    if not out.requires_grad:
        out = out + sum(x.sum() for x in leaves.values()) * 0
    found = torch.autograd.grad(out, list(leaves.values()), case.grad_out, allow_unused=True, materialize_grads=True)
    return {"out": out.detach()} | dict(zip(leaves, found, strict=True))


def counted() -> AbstractContextManager[Counter]:
    """How often each native function of the family is called within."""
    return op_checks.counted("graph_attention")


# ------------------------------------------------------------------------------------------------------------ the checks


def check_opcheck(size: int, device: str) -> int:
    """Row 1: torch.library.opcheck of both registered ops."""
    runs = ops.backend_name(device=device)
    assert runs != "reference", "the registered ops call kernels, and there is none here"
    made = [
        make_case(7, 19, device=device),
        make_case(7, 19, relations=None, device=device),
        make_case(9, 30, relations=4, dropout_p=0.3, seed=5, device=device),
        make_case(5, 0, device=device),
        make_case(0, 0, relations=None, device=device),
        make_case(6, 20, heads=1, dim=3, long=7, device=device),
        make_case(6, 20, dtype=torch.float64, device=device),
        make_case(6, 20, layout=1, device=device),
    ]
    for case in made[:size]:
        tensors = [getattr(case, name) for name in (*FLOATS[:3], *INDEX, *FLOATS[3:])]
        numbers = (0.4, case.dropout_p, case.seed)
        torch.library.opcheck(KERNELS._forward_op, (runs, *tensors, *numbers))
        weights = KERNELS._forward_op(runs, *tensors, *numbers)[1]
        torch.library.opcheck(KERNELS._backward_op, (runs, case.grad_out, *tensors, weights, *numbers))
    return 2 * len(made[:size])


SHAPES = [  # vertices, edges, heads, dim, relations, isolated
    (1, 0, 1, 1, None, 0.0), (1, 1, 1, 1, 1, 0.0), (1, 7, 2, 3, 2, 0.0), (2, 1, 1, 2, None, 0.0), (2, 9, 3, 1, 4, 0.0),
    (3, 3, 1, 5, 3, 0.3), (3, 20, 1, 2, 1, 0.0), (4, 6, 2, 2, None, 0.5), (5, 0, 2, 3, 2, 0.0), (5, 11, 2, 3, 7, 0.4),
    (6, 13, 1, 7, 2, 0.2), (7, 7, 2, 4, None, 0.0), (7, 17, 1, 3, 10, 0.3), (8, 5, 2, 2, 3, 0.6), (9, 31, 1, 2, 2, 0.2),
    (11, 12, 1, 4, None, 0.1), (11, 37, 2, 1, 5, 0.5), (13, 29, 1, 2, 3, 0.2), (17, 8, 1, 1, 2, 0.0), (3, 41, 2, 2, 4, 0.0),
    (0, 0, 2, 3, None, 0.0), (0, 0, 1, 2, 3, 0.0), (4, 9, 1, 17, 2, 0.0), (2, 5, 1, 33, None, 0.0),
]


def check_gradcheck(size: int, device: str) -> int:
    """Row 2: analytic against numerical gradients in float64, with and without dropout."""
    for place, (vertices, edges, heads, dim, relations, isolated) in enumerate(SHAPES[:size]):
        case = make_case(vertices, edges, heads, dim, relations, place, torch.float64, device, isolated)
        case = replace(case, dropout_p=0.3 * (place % 3 == 2), seed=2**40 + place)
        names = list(case.floats())
        leaves = [x.requires_grad_() for x in case.floats().values()]

        def call(*leaves: Tensor, case: Case = case, names: list[str] = names) -> Tensor:
            return ops.graph_attention(**(case.arguments() | dict(zip(names, leaves, strict=True))))

        if vertices:
            assert torch.autograd.gradcheck(call, leaves)
        else:
            found = torch.autograd.grad(call(*leaves).sum(), leaves)
            assert all(x.shape == leaf.shape and not x.any() for x, leaf in zip(found, leaves, strict=True))
    return len(SHAPES[:size])


def close_to_truth(case: Case) -> float:
    """The house's rule for output and gradients; returns the largest share of the allowed error."""
    dtype = case.query.dtype
    found, plain = results(case), results(case, equations.graph_attention)
    truth = results(case.to(torch.float64), equations.graph_attention)
    floor = 1e-11 if dtype == torch.float64 else 1e-5
    worst = 0.0
    for name, true in truth.items():
        assert found[name].shape == true.shape and found[name].dtype == dtype, name
        if not true.numel():
            continue
        ours, theirs = ((x[name].double() - true).abs().max().item() for x in (found, plain))
        if dtype == torch.float64:
            theirs = floor * true.abs().max().item()
        assert ours <= 2 * theirs + floor, f"{name}: error {ours:.3g}, plain torch's {theirs:.3g}"
        worst = max(worst, ours / (2 * theirs + floor))
    return worst


def mean_errors(recipe: dict, number: int) -> dict[str, float]:
    """Root mean square error over `number` cases, of output and gradients, over plain torch's."""
    ours, theirs = Counter(), Counter()
    for place in range(number):
        case = make_case(**recipe, number=place)
        found, plain = results(case), results(case, equations.graph_attention)
        for name, true in results(case.to(torch.float64), equations.graph_attention).items():
            ours[name] += (found[name].double() - true).square().mean().item()
            theirs[name] += (plain[name].double() - true).square().mean().item()
    return {name: (ours[name] / theirs[name]) ** 0.5 for name in ours}


@st.composite
def recipes(draw: Callable, device: str = "cpu") -> dict:
    """Arguments of `make_case`. Values are kept of order 1: with scores in the tens, one rounding of one score is above the
    rule's 1e-5, and which of two equally good sums it hits is luck; `mean_errors` compares those on average."""
    vertices = draw(st.integers(0, 64))
    kinds = [torch.float32] * 4 + [torch.float64, torch.bfloat16] + [torch.float16] * (device != "cpu")
    choices = {
        "edges": st.integers(0, 6 * vertices),
        "heads": st.integers(1, 3),
        "dim": st.one_of(st.integers(1, 40), st.just(150)),
        "relations": st.one_of(st.none(), st.integers(1, 10)),
        "number": st.integers(0, 2**31),
        "dtype": st.sampled_from(kinds),
        "isolated": st.sampled_from([0.0, 0.3, 0.9]),
        "magnitude": st.sampled_from([0.1, 0.5, 1.0]),
        "layout": st.integers(0, 3),
        "long": st.integers(0, 7),
        "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
        "seed": st.integers(0, 2**63 - 1),
    }
    found = {"vertices": vertices, "device": device} | {name: draw(choice) for name, choice in choices.items()}
    found["scale"] = draw(st.sampled_from([None, 0.0, 0.5 * found["dim"] ** -0.5, 1.5 * found["dim"] ** -0.5]))
    return found


def check_fuzz(size: int, device: str) -> int:
    """Row 3: output and all gradients against float64, on whatever hypothesis thinks of."""
    seen = 0

    @settings(max_examples=size, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(recipes(device))
    def compare(recipe: dict) -> None:
        nonlocal seen
        seen += 1
        close_to_truth(make_case(**recipe))

    compare()
    return seen


def check_bad_indices(size: int, device: str) -> int:
    """Row 4: an entry that names nothing is an IndexError that names the argument, before anything is computed; the next
    good call gives the same bits as ever."""
    g = generator(4)
    wide = [-(2**63), -(2**32), -1, 2**31, 2**32, 2**40, 2**63 - 1]  # 2^32 + i would be i in 32 bits

    def pick(values: list[int]) -> int:
        return values[int(torch.randint(len(values), (), generator=g))]

    for number in range(size):
        case = make_case(5 + number % 40, 8 + number % 150, 1 + number % 2, 1 + number % 9, 1 + number % 6, number,
                         device=device, isolated=0.1, long=7 * (number % 2))
        expected = ops.graph_attention(**case.arguments())
        name = INDEX[number % 3]
        index = getattr(case, name).clone()
        limit = {"indptr": case.indices.numel(), "indices": case.query.shape[0], "relation": len(case.relation_query)}[name]
        place = int(torch.randint(index.numel(), (), generator=g))
        if index.dtype == torch.int64:
            good = int(index[place])
            bad = pick([*wide, limit + 1, 2**32 + good, good - 2**32] + [limit] * (name != "indptr"))
        else:
            bad = pick([-(2**31), -1, limit + 1, 2**31 - 1] + [limit] * (name != "indptr"))
        index[place] = bad
        broken = case.arguments() | {name: index, "validate": True}
        if number % 5 == 0:
            broken |= {leaf: x.clone().requires_grad_() for leaf, x in case.floats().items()}
        try:
            ops.graph_attention(**broken)
        except IndexError as error:
            assert str(error).startswith(name), f"{name}[{place}] = {bad} gave: {error}"
        else:
            raise AssertionError(f"{name}[{place}] = {bad} was taken, limit {limit}")
        assert identical(ops.graph_attention(**case.arguments()), expected)
    return size


def check_nan_isolation(size: int, device: str) -> int:
    """Row 5: NaN or Inf in one graph of a batch leaves all outputs and gradients of the others' vertices as they were."""
    for number in range(size):
        g = generator(number)
        counts = torch.randint(1, 9, (2 + number % 6,), generator=g).tolist()
        parts = [random_csr(n, int(torch.randint(3 * n + 1, (), generator=g)), g, 4) for n in counts]
        start = torch.tensor([0, *counts]).cumsum(0).tolist()
        edge = [0]
        for part in parts:
            edge.append(edge[-1] + part[1].numel())
        indptr = torch.cat([torch.zeros(1, dtype=torch.int32), *(p[0][1:] + e for p, e in zip(parts, edge, strict=False))])
        indices = torch.cat([p[1] + s for p, s in zip(parts, start, strict=False)])
        case = make_case(start[-1], 0, 2, 3 + number % 20, 4, number, device=device, dropout_p=0.2 * (number % 2), seed=number)
        case = replace(case, indptr=indptr.int().to(device), indices=indices.int().to(device),
                       relation=torch.cat([p[2] for p in parts]).to(device))
        clean = results(case)
        graph = int(torch.randint(len(counts), (), generator=g))
        rows = slice(start[graph], start[graph + 1])
        name = ("query", "key", "value", "grad_out")[number % 4]
        poisoned = getattr(case, name).clone()
        poison = (torch.nan, torch.inf, -torch.inf)[number % 3]
        if number % 5:
            poisoned[rows] = poison
        else:
            poisoned[start[graph], 0, 0] = poison
        found = results(replace(case, **{name: poisoned}))
        others = torch.ones(start[-1], dtype=torch.bool, device=device)
        others[rows] = False
        for field in ("out", "query", "key", "value"):
            assert identical(found[field][others], clean[field][others]), f"{name} with {poison} reached others' {field}"
        if name == "value" and number % 5 and number % 2 == 0:
            reached = (indptr[1:] > indptr[:-1]).to(device) & ~others
            assert not found["out"][reached].isfinite().any(), "NaN or Inf was hidden"
    return size


VARIED = [  # one block, many blocks, one large block, no relation, empty rows; chosen to reach each way through a kernel
    {"vertices": 64, "edges": 300},
    {"vertices": 63, "edges": 300, "relations": None, "dim": 150},
    {"vertices": 900, "edges": 700, "dim": 16, "relations": 10},
    {"vertices": 5000, "edges": 21000, "dim": 7, "isolated": 0.3},
    {"vertices": 5000, "edges": 9000, "dim": 33, "heads": 1, "relations": None},
    {"vertices": 200, "edges": 6000, "dim": 12, "dropout_p": 0.3, "relations": 5},
    {"vertices": 40, "edges": 0},
    {"vertices": 300, "edges": 1300, "dtype": torch.float64, "long": 7},
]


def batch_of_graphs(device: str) -> Case:
    """16 graphs of 84 vertices with 4 edges a vertex, H = 2, D = 150, 4 relations: the paper's batch."""
    g = generator(16)
    case = make_case(1344, 0, 2, 150, 4, 16, device=device)
    indices = torch.randint(84, (16, 336), generator=g) + 84 * torch.arange(16)[:, None]
    indptr = torch.arange(1345, dtype=torch.int32) * 4
    relation = torch.randint(4, (5376,), generator=g)
    return replace(case, indptr=indptr.to(device), indices=indices.flatten().int().to(device), relation=relation.int().to(device))


def varied(device: str) -> list[Case]:
    return [*(make_case(number=place, device=device, **kind) for place, kind in enumerate(VARIED)), batch_of_graphs(device)]


def digests(device: str) -> list[str]:
    return [digest(results(case)) for case in varied(device)]


def check_prefilled(size: int, device: str) -> int:
    """Row 6."""
    return op_checks.prefilled(__name__, KERNELS, size, device)


def check_determinism(size: int, device: str) -> int:
    """Row 11."""
    return op_checks.deterministic(digests, size, device)


CHECKS: dict[int, tuple[Callable[[int, str], int], int]] = {  # row of the scorecard: check, full size
    1: (check_opcheck, 8),
    2: (check_gradcheck, len(SHAPES)),
    3: (check_fuzz, 10_000),
    4: (check_bad_indices, 1_000),
    5: (check_nan_isolation, 500),
    6: (check_prefilled, 3),
    11: (check_determinism, 10),
}
