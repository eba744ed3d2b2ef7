"""Run by test_triton_segment_sum.py: every case of `CASES` in Triton's interpreter against reference.py in float64."""

from __future__ import annotations

from itertools import product

import torch
from triton_worker import print_lines, same_bits, worst

from case_fast.ops import reference

CASES = {
    # name: rows, size, dims, dtype, index dtype, in order, sorted first
    "segments end to end": (75, 43, (70,), "float32", "int64", True, False),
    "in any order": (97, 11, (65,), "float32", "int32", False, False),
    "few long segments": (300, 3, (5,), "float32", "int32", True, False),
    "one number a row": (530, 16, (), "float32", "int64", False, False),
    "two dimensions": (40, 7, (3, 5), "float32", "int64", False, False),
    "no rows": (0, 5, (8,), "float32", "int64", False, False),
    "no segments": (0, 0, (8,), "float32", "int64", False, False),
    "sorted first": (97, 11, (65,), "float32", "int32", False, True),
    "sorted first, one number a row": (530, 16, (), "float32", "int64", False, True),
    "sorted first, no rows": (0, 5, (8,), "float32", "int64", False, True),
    "float64": (60, 9, (13,), "float64", "int64", False, False),
    "float16": (60, 9, (13,), "float16", "int32", False, False),
    "bfloat16": (60, 9, (13,), "bfloat16", "int32", False, True),
}


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 in that dtype as Triton's interpreter does it: to bfloat16 by cutting bits off, where a GPU rounds."""
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16() if dtype == torch.bfloat16 else x.to(dtype)


def interpret(case: str) -> dict:
    from case_fast.ops import segment_sum_triton as kernels

    rows, size, dims, dtype, index, ordered, sorts = CASES[case]
    kernels.MOST_LOOKS = -1 if sorts else 1 << 24
    g = torch.Generator().manual_seed(0)
    segment = torch.randint(max(size, 1), (rows,), generator=g).to(getattr(torch, index))
    segment = segment.sort().values if ordered else segment
    x, grad_out = (torch.randn(n, *dims, generator=g, dtype=torch.float64).to(getattr(torch, dtype)) for n in (rows, size))
    apart = torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]  # rows apart: read without a copy
    runs = [[kernels.forward(like, segment, size), kernels.backward(grad_out, segment)] for like in (x, apart)]
    expected = [reference.segment_sum(x.double(), segment, size), reference.take(grad_out.double(), segment)]
    plain = [narrowed(reference.segment_sum(x.float(), segment, size), x.dtype), reference.take(grad_out, segment)]
    return {"case": case, "error": worst(runs[0], expected), "plain_error": worst(plain, expected),
            "dtypes": [str(x.dtype) for x in runs[0]], "shapes": [list(x.shape) for x in runs[0]],
            "repeatable": same_bits(*runs)}


def damaged() -> dict:
    """Numbers out of range: what the flag says, whether others' sums stay, and which rows of the gradient are NaN."""
    from case_fast.ops import segment_sum_triton as kernels
    from case_fast.ops.device_flag import raise_pending

    said = {}
    for sorts, wrong in product((False, True), (7, -1, 2**31 + 3, -(2**40))):
        kernels.MOST_LOOKS = -1 if sorts else 1 << 24
        segment = torch.arange(70) % 7
        segment[5] = wrong
        x = torch.arange(140.0).view(70, 2)
        found = []
        for run, given in ((kernels.forward, (x, segment, 7)), (kernels.backward, (x[:7], segment))):
            result, errors = run(*given), []
            for _ in range(2):
                try:
                    raise_pending()
                    errors.append("")
                except IndexError as error:
                    errors.append(str(error))
            found.append((result, errors))
        good = segment != segment[5]
        same = torch.equal(found[0][0], reference.segment_sum(x[good], segment[good], 7))
        said[f"{wrong}{', sorted' if sorts else ''}"] = [found[0][1], found[1][1], same,
                                                        found[1][0].isnan().any(1).nonzero().flatten().tolist()]
    return said


if __name__ == "__main__":
    print_lines((*map(interpret, CASES), {"case": "damaged", "said": damaged()}))
