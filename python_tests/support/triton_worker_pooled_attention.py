"""Run by test_triton_pooled_attention.py: every case of `CASES` in Triton's interpreter against reference.py in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from triton_worker import SEED, SEED_AT, print_lines, same_bits, worst

from case_fast.ops import reference

CASES = {
    # name: rows of each sequence, heads, d, dropout, dtype, index dtype
    "texts": ([5, 6, 1, 0, 9], 2, 300, 0.2, "float32", "int64"),
    "longer than a block": ([70, 3, 33], 2, 13, 0.1, "float32", "int32"),
    "longer than a block of wide rows": ([40], 1, 300, 0.0, "float32", "int32"),
    "one row": ([1], 1, 1, 0.0, "float32", "int64"),
    "five heads": ([7, 2], 5, 17, 0.3, "float32", "int64"),
    "no rows": ([0, 0], 2, 8, 0.1, "float32", "int64"),
    "no sequences": ([], 2, 8, 0.1, "float32", "int64"),
    "more sequences than are looked at at once": ([1, 2, *[0] * 254, 3, 1], 1, 2, 0.4, "float32", "int64"),
    "widest": ([9], 1, 1024, 0.0, "float32", "int64"),
    "all dropped but few": ([30, 12], 2, 4, 0.95, "float32", "int64"),
    "float64": ([6, 30], 3, 10, 0.25, "float64", "int64"),
    "float16": ([6, 30], 2, 10, 0.25, "float16", "int64"),
    "bfloat16": ([6, 30], 2, 10, 0.25, "bfloat16", "int64"),
}


def inputs(rows: list[int], heads: int, width: int, dtype: str, index: str) -> tuple[Tensor, ...]:
    """query, rows, cu, grad_out."""
    cu = torch.tensor([0, *rows]).cumsum(0).to(getattr(torch, index))
    shapes = ((len(rows), heads, width), (sum(rows), width), (len(rows), heads, width))
    query, shared, grad_out = (torch.randn(shape, dtype=torch.float64).to(getattr(torch, dtype)) for shape in shapes)
    return query, shared, cu, grad_out


def truth(query: Tensor, rows: Tensor, cu: Tensor, grad_out: Tensor, scale: float, dropout_p: float, dtype: torch.dtype
          ) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in (query, rows)]
    out = reference.pooled_attention(*leaves, cu, scale, dropout_p, SEED)
    return [out, *torch.autograd.grad(out, leaves, grad_out.to(dtype), allow_unused=True, materialize_grads=True)]


def results(query: Tensor, rows: Tensor, cu: Tensor, grad_out: Tensor, scale: float, dropout_p: float, *seed: int | Tensor
            ) -> list[Tensor]:
    """The kernels' output, gradients and lse."""
    from case_fast.ops import pooled_attention_triton as kernels

    numbers = (scale, dropout_p, *seed)
    out, lse = kernels.forward(query, rows, cu, *numbers)
    return [out, *kernels.backward(grad_out, query, rows, cu, out, lse, *numbers), lse]


def interpret(case: str) -> dict:
    torch.manual_seed(0)
    rows, heads, width, dropout_p, dtype, index = CASES[case]
    query, shared, cu, grad_out = given = inputs(rows, heads, width, dtype, index)
    scale = width**-0.5
    *found, lse = results(*given, scale, dropout_p, SEED)
    # heads first, rows apart: read without a copy
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, grad_out)]
    apart = torch.stack([shared, torch.full_like(shared, torch.nan)], 1)[:, 0]
    again = results(turned[0], apart, cu, turned[1], scale, dropout_p, SEED)[:-1]
    expected, plain = (truth(*given, scale, dropout_p, kind) for kind in (torch.float64, query.dtype))
    return {"case": case, "error": worst(found, expected), "plain_error": worst(plain, expected),
            "dtypes": [str(x.dtype) for x in found], "repeatable": same_bits(found, again),
            "lse": [list(lse.shape), str(lse.dtype)]}


def damaged() -> dict:
    """Offsets out of range: what the flag says, forward and backward."""
    from case_fast.ops import pooled_attention_triton as kernels
    from case_fast.ops.device_flag import raise_pending

    said = {}
    for place, wrong in ((0, 1), (0, -3), (1, 99), (1, -(2**31)), (2, 4), (3, 8), (3, 10), (3, 2**40)):
        torch.manual_seed(0)
        query, rows, cu, grad_out = inputs([5, 1, 3], 2, 4, "float32", "int64")
        cu[place] = wrong
        errors = []
        out, lse = kernels.forward(query, rows, cu, 0.5, 0.0, 0)
        for backward in (False, True):
            if backward:
                kernels.backward(grad_out, query, rows, cu, out, lse, 0.5, 0.0, 0)
            for _ in range(2):
                try:
                    raise_pending()
                    errors.append("")
                except IndexError as error:
                    errors.append(str(error))
        said[f"[{place}] = {wrong}"] = errors
    return said


def seeded() -> dict:
    """Whether a seed on the device draws as the number that it stands for, forward and backward."""
    torch.manual_seed(0)
    given = inputs([6, 30], 2, 10, "float32", "int64")
    stands_for = (SEED ^ SEED_AT) % 2**63
    ours = [results(*given, 0.5, 0.4, *seed) for seed in ((stands_for,), (SEED, torch.tensor([SEED_AT])), (SEED,))]
    return {"case": "seeded", "equal": same_bits(*ours[:2]), "other": not same_bits(ours[0], ours[2])}


if __name__ == "__main__":
    print_lines((*map(interpret, CASES), {"case": "damaged", "said": damaged()}, seeded()))
