"""Run by test_triton_residual_norm.py: every case of `CASES` in Triton's interpreter against reference.py in float64."""

from __future__ import annotations

import importlib

import torch
from triton_worker import SEED, SEED_AT, print_lines, same_bits, worst
from triton_worker_segment_sum import narrowed

from case_fast.ops import reference

CASES = {
    # name: rows, width, dtype, dropout, whether anything is added, whether total has a gradient, whether the seed is a tensor
    "added": (9, 300, "float32", 0.0, True, True, False),
    "dropped": (9, 300, "float32", 0.3, True, True, False),
    "dropped by a tensor": (9, 37, "float32", 0.3, True, True, True),
    "nothing added": (7, 37, "float32", 0.0, False, True, False),
    "no gradient of total": (7, 37, "float32", 0.3, True, False, False),
    "nothing added, no gradient of total": (7, 16, "float32", 0.0, False, False, False),
    "a row for each program": (3, 5, "float32", 0.5, True, True, False),
    "one of all": (1, 1, "float32", 0.5, True, True, False),
    "no rows": (0, 8, "float32", 0.5, True, True, False),
    "wide": (3, 999, "float32", 0.1, True, True, False),
    "float64": (11, 70, "float64", 0.3, True, True, True),
    "float16": (11, 70, "float16", 0.3, True, True, False),
    "bfloat16": (11, 70, "bfloat16", 0.3, True, True, False),
}
EPS = 0.1  # above the variance of rows of one column, which would all be normalised to the same, sharply


def of_reference(given: list, grads: list, dropout_p: float, seed: int | torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """total, normed, and the gradients of x, update, weight and bias, in a dtype."""
    leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in given]
    out = reference.residual_norm(*leaves, EPS, dropout_p, seed)
    kept = [x for x in leaves if x is not None]
    grads = [torch.zeros_like(out[0]) if x is None else x.to(dtype) for x in grads]
    found = torch.autograd.grad(out, kept, grads)
    return [x.detach() for x in out] + list(found)


def interpret(case: str) -> dict:
    op, kernels = (importlib.import_module(f"case_fast.ops.residual_norm{of}") for of in ("", "_triton"))
    kernels.MOST_SHARES = 4  # so that rows share a program of backward
    rows, width, dtype, dropout_p, adds, of_total, by_tensor = CASES[case]
    kind, g = getattr(torch, dtype), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(kind)

    x, update, grad_total, grad_normed = (normal(rows, width) for _ in range(4))
    weight, bias = normal(width), normal(width)
    update, grad_total = update if adds else None, grad_total if of_total else None
    seed_at = torch.tensor(SEED_AT) if by_tensor else None
    draws, seed = (dropout_p, SEED, seed_at), reference.seed_of(SEED, seed_at)

    def run() -> list[torch.Tensor]:
        total, normed, stats = op._forward("triton", x, update, weight, bias, EPS, *draws)
        total = x if update is None else total
        found = op._backward("triton", grad_total, grad_normed, total, stats, weight, *draws)
        return [total, normed, *(found if dropout_p > 0 or not adds else [found[0], *found])]

    runs, full = [run(), run()], torch.float64 if kind == torch.float64 else torch.float32
    given, grads = [x, update, weight, bias], [grad_total, grad_normed]
    expected, plain = (of_reference(given, grads, dropout_p, seed, of) for of in (torch.float64, full))
    alike = True
    if adds and dropout_p > 0:
        kept = op._drop("triton", torch.ones_like(x), None, *draws)
        alike = torch.equal(kept != 0, reference.residual_keep(rows, width, dropout_p, seed))
        alike &= torch.equal(op._drop("triton", update, x, *draws), runs[0][0])
    return {"case": case, "error": worst(runs[0], expected), "plain_error": worst([narrowed(y, kind) for y in plain], expected),
            "dtypes": [str(y.dtype) for y in runs[0]], "shapes": [list(y.shape) for y in runs[0]],
            "repeatable": same_bits(*runs), "alike": alike}


if __name__ == "__main__":
    print_lines(map(interpret, CASES))
