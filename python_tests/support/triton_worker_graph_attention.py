"""Run by test_triton_graph_attention.py: every case of `CASES` in Triton's interpreter against equations.py in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from triton_worker import SEED, SEED_AT, print_lines, same_bits, worst

from case_fast import equations

CASES = {
    # name: vertices, edges, heads, dim, relations (0: plain), dropout, dtype, index dtype
    "prime sizes": (7, 23, 3, 13, 5, 0.3, "float32", "int64"),
    "plain, int32": (7, 40, 3, 13, 0, 0.0, "float32", "int32"),
    "the paper's head": (5, 20, 2, 150, 10, 0.2, "float32", "int32"),
    "largest head": (3, 9, 1, 256, 2, 0.0, "float32", "int64"),
    "one vertex": (1, 3, 1, 1, 1, 0.5, "float32", "int64"),
    "no edges": (4, 0, 2, 8, 3, 0.1, "float32", "int64"),
    "no vertices": (0, 0, 2, 8, 3, 0.1, "float32", "int64"),
    "rows longer than a block": (3, 120, 1, 5, 4, 0.1, "float32", "int64"),
    "more relations than a block": (5, 60, 2, 6, 37, 0.0, "float32", "int32"),
    "more vertices than a chunk": (70, 90, 1, 3, 2, 0.0, "float32", "int64"),
    "all dropped but few": (5, 40, 2, 4, 3, 0.95, "float32", "int64"),
    "float64": (6, 30, 2, 10, 3, 0.25, "float64", "int64"),
    "float64, plain": (6, 30, 1, 33, 0, 0.25, "float64", "int32"),
    "float16": (6, 30, 2, 10, 3, 0.25, "float16", "int64"),
    "bfloat16": (6, 30, 2, 10, 3, 0.25, "bfloat16", "int64"),
}


def inputs(vertices: int, edges: int, heads: int, dim: int, relations: int, dtype: str, index: str) -> dict[str, Tensor]:
    """A random multigraph whose last two rows are empty (where there are more than two); parallel edges happen."""
    floats, integers = getattr(torch, dtype), getattr(torch, index)
    row = torch.randint(0, max(vertices - 2, 1), (edges,)).sort().values
    made = {"indptr": torch.zeros(vertices + 1, dtype=integers)}
    made["indptr"][1:] = torch.bincount(row, minlength=vertices).cumsum(0)
    made["indices"] = torch.randint(0, max(vertices, 1), (edges,)).to(integers)
    for name in ("query", "key", "value", "grad_out"):
        made[name] = torch.randn(vertices, heads, dim, dtype=torch.float64).to(floats)
    if relations:
        made["relation"] = torch.randint(0, relations, (edges,)).to(integers)
        for name in ("relation_query", "relation_key"):
            made[name] = torch.randn(relations, heads, dim, dtype=torch.float64).to(floats)
    return made


def truth(made: dict[str, Tensor], scale: float, dropout_p: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output and gradients of equations.graph_attention."""
    floats = {name: x.to(dtype).requires_grad_() for name, x in made.items() if x.is_floating_point() and name != "grad_out"}
    integers = {name: x for name, x in made.items() if not x.is_floating_point()}
    out = equations.graph_attention(**floats, **integers, scale=scale, dropout_p=dropout_p, seed=SEED)
    order = ["query", "key", "value", "relation_query", "relation_key"]
    wanted = [floats[name] for name in order if name in floats]
    grads = torch.autograd.grad(out, wanted, made["grad_out"].to(dtype), allow_unused=True)
    return [out, *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True))]


def arguments(made: dict[str, Tensor]) -> list[Tensor | None]:
    order = "query key value indptr indices relation relation_query relation_key".split()
    return [made.get(name) for name in order]


def results(made: dict[str, Tensor], scale: float, dropout_p: float, *seed: int | Tensor) -> list[Tensor]:
    """The kernels' output, gradients and weights."""
    from case_fast.ops import graph_attention_triton as kernels

    given, numbers = arguments(made), (scale, dropout_p, *seed)
    out, weights = kernels.forward(*given, *numbers)
    grads = kernels.backward(made["grad_out"], *given, weights, *numbers)
    return [out, *(g for g in grads if g is not None), weights]


def interpret(case: str) -> dict:
    torch.manual_seed(0)
    vertices, edges, heads, dim, relations, dropout_p, dtype, index = CASES[case]
    made = inputs(vertices, edges, heads, dim, relations, dtype, index)
    scale = dim**-0.5
    *found, weights = results(made, scale, dropout_p, SEED)
    again = results(made, scale, dropout_p, SEED)[:-1] if edges < 30 else found
    expected = truth(made, scale, dropout_p)
    plain = truth(made, scale, dropout_p, getattr(torch, dtype))
    return {
        "case": case,
        "error": worst(found, expected),
        "plain_error": worst(plain, expected),
        "dtypes": [str(x.dtype) for x in found],
        "repeatable": same_bits(found, again),
        "weights": [list(weights.shape), str(weights.dtype)],
    }


def damaged() -> dict:
    """Indices out of range: what the flag says, and which rows are NaN."""
    from case_fast.ops import graph_attention_triton as kernels
    from case_fast.ops.device_flag import raise_pending

    torch.manual_seed(0)
    said = {}
    for name, place, wrong in (("indices", 0, 6), ("indices", 0, -1), ("relation", 0, 3), ("relation", 0, -7),
                               ("indptr", 6, 99), ("indptr", 1, -4)):
        made = inputs(6, 12, 2, 4, 3, "float32", "int64")
        made[name][place] = wrong
        query, key, value, *rest = arguments(made)
        out, weights = kernels.forward(query, key, value, *rest, 0.5, 0.0, 0)
        kernels.backward(made["grad_out"], query, key, value, *rest, weights, 0.5, 0.0, 0)
        try:
            raise_pending()
            error = ""
        except (ValueError, IndexError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        try:
            raise_pending()
        except (ValueError, IndexError):
            error += " (and again)"
        said[f"{name} {wrong}"] = [error, out.isnan().any(dim=(1, 2)).tolist()]
    return said


def mask_of_kept(edges: int, heads: int, dropout_p: float) -> bool:
    """Whether the kernels drop exactly the edges that equations.dropout_keep drops: rows of one neighbour, values of 1."""
    from case_fast.ops import graph_attention_triton as kernels

    one = torch.ones(edges, heads, 1)
    places = torch.arange(edges + 1)
    out, _ = kernels.forward(one, one, one, places, places[:-1], None, None, None, 1.0, dropout_p, SEED)
    return torch.equal(out[:, :, 0] != 0, equations.dropout_keep(edges, heads, dropout_p, SEED, one.device))


def seeded() -> dict:
    """Whether a seed on the device draws as the number that it stands for, forward and backward."""
    torch.manual_seed(0)
    made = inputs(6, 12, 2, 10, 3, "float32", "int64")
    stands_for = (SEED ^ SEED_AT) % 2**63
    ours = [results(made, 0.5, 0.4, *seed) for seed in ((stands_for,), (SEED, torch.tensor([SEED_AT])), (SEED,))]
    return {"case": "seeded", "equal": same_bits(*ours[:2]), "other": not same_bits(ours[0], ours[2])}


if __name__ == "__main__":
    kept = {"case": "kept", "equal": [mask_of_kept(20, 3, p) for p in (0.1, 0.5, 0.9)]}
    print_lines((*map(interpret, CASES), {"case": "damaged", "said": damaged()}, kept, seeded()))
