"""Run by test_triton_bilinear_mim.py in a process of its own, since Triton reads TRITON_INTERPRET on import.

    interpret    every case of `CASES` in Triton's interpreter against equations.py in float64: one JSON line a case
    compile      every kernel for sm_90, without a GPU: one JSON line a kernel
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from triton_worker import SEED, compiled, worst

from case_fast import equations

SIGMOID, DOT = equations.SCORES
CASES = {
    # name: pairs, rows, dim, one to one, negatives (None: all), score, dtype
    "prime sizes": (37, 23, 13, False, None, SIGMOID, "float32"),
    "more blocks than one": (70, 150, 300, False, None, SIGMOID, "float32"),
    "the coarse batch": (16, 16, 300, True, None, SIGMOID, "float32"),
    "one pair": (1, 1, 4, True, None, SIGMOID, "float32"),
    "one row of y": (5, 1, 4, False, None, SIGMOID, "float32"),
    "no pairs": (0, 3, 4, False, None, SIGMOID, "float32"),
    "float64": (20, 20, 10, True, None, SIGMOID, "float64"),
    "float16": (40, 33, 20, False, None, SIGMOID, "float16"),
    "dot": (37, 23, 13, False, None, DOT, "float32"),
    "dot, more blocks than one": (70, 150, 20, False, None, DOT, "float32"),
    "dot, one pair": (1, 1, 4, True, None, DOT, "float32"),
    "dot, one row of y": (5, 1, 4, False, None, DOT, "float32"),
    "dot, large scores": (37, 23, 13, False, None, DOT, "float32"),
    "dot, float64": (20, 20, 10, True, None, DOT, "float64"),
    "sampled": (13, 7, 13, False, 5, SIGMOID, "float32"),
    "sampled one to one": (11, 11, 300, True, 3, SIGMOID, "float32"),
    "sampled, more than a block": (5, 4, 3, False, 19, SIGMOID, "float32"),
    "sampled, one pair": (1, 1, 4, True, 5, SIGMOID, "float32"),
    "sampled, one row of y": (3, 1, 4, False, 5, SIGMOID, "float32"),
    "sampled, no pairs": (0, 3, 4, False, 5, SIGMOID, "float32"),
    "sampled, float64": (6, 9, 10, False, 4, SIGMOID, "float64"),
    "sampled, float16": (6, 9, 10, False, 4, SIGMOID, "float16"),  # the interpreter cuts what it stores as bfloat16
    "sampled, dot": (13, 7, 13, False, 5, DOT, "float32"),
    "sampled, dot, large scores": (13, 7, 13, False, 5, DOT, "float32"),
    "sampled, dot, one row of y": (3, 1, 4, False, 5, DOT, "float32"),
}


def inputs(pairs: int, rows: int, dim: int, one_to_one: bool, score: str, dtype: str) -> dict[str, Tensor | None]:
    """Rows whose scores spread over about -4 .. 4, some pairs sharing a row of y, and gradients of both sides."""
    scale = (2 / dim**0.5) ** 0.5
    floats = getattr(torch, dtype)
    made: dict[str, Tensor | None] = {name: (torch.randn(n, dim) * scale).to(floats) for name, n in (("x", pairs), ("y", rows))}
    made["weight"] = None if score == DOT else (torch.randn(dim, dim) * dim**-0.5).to(floats)
    made["positive"] = None if one_to_one else torch.randint(0, rows, (pairs,))
    full = torch.float64 if dtype == "float64" else torch.float32
    made |= {name: torch.randn(pairs, dtype=full) for name in ("grad_side_y", "grad_side_x")}
    return made


def truth(made: dict[str, Tensor | None], negatives: int | None, score: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Both sides, the logit and the gradients of x, y and weight by equations.mim_sides. In half precision, x W is rounded to it
    as torch's own product rounds it: the equation itself computes in float32."""
    leaves = [made[name].to(dtype).requires_grad_() for name in ("x", "y", "weight") if made[name] is not None]
    x, y, *weight = leaves
    pairs = x.shape[0]
    positive = torch.arange(pairs) if made["positive"] is None else made["positive"]
    arguments = (x, y, weight[0] if weight else None)
    if weight and dtype in (torch.float16, torch.bfloat16):
        arguments = (x @ weight[0], y, torch.eye(x.shape[1], dtype=dtype))
    *sides, logit = equations.mim_sides(*arguments, positive, negatives, SEED, score)
    grads = torch.autograd.grad(sides, leaves, [made[name].to(sides[0].dtype) for name in ("grad_side_y", "grad_side_x")])
    return [*(side.detach() for side in sides), logit.detach(), *grads]


def ours(made: dict[str, Tensor | None], negatives: int | None, score: str, deterministic: bool = True) -> list[Tensor]:
    from case_fast.ops import bilinear_mim_triton as kernels

    given = [made[name] for name in ("x", "y", "weight", "positive")]
    numbers = (negatives, SEED, score, deterministic)
    *found, saved = kernels.forward(*given, *numbers)
    assert saved.shape == (kernels.saved_elements(made["x"].shape[0], made["y"].shape[0], negatives),)
    grads = kernels.backward(made["grad_side_y"], made["grad_side_x"], *given, saved, *numbers)
    return [*found, *(g for g in grads if g is not None)]


def interpret(case: str) -> dict:
    torch.manual_seed(0)
    pairs, rows, dim, one_to_one, negatives, score, dtype = CASES[case]
    made = inputs(pairs, rows, dim, one_to_one, score, dtype)
    if "large" in case:  # near 1e4; whole numbers, so that the scores are exact and what is left is the sums' own error
        made["x"], made["y"] = (torch.cat([x[:, 1:].round(), torch.full_like(x[:, :1], 100)], 1) for x in (made["x"], made["y"]))
    found, again = ours(made, negatives, score), ours(made, negatives, score) if negatives is None else None
    expected, plain = truth(made, negatives, score), truth(made, negatives, score, getattr(torch, dtype))
    return {
        "case": case,
        "error": worst(found, expected),
        "plain_error": worst(plain, expected),
        "dtypes": [str(x.dtype) for x in found],
        "repeatable": again is None or all(torch.equal(a, b) for a, b in zip(found, again, strict=True)),
        "largest": [x.abs().max().item() if x.numel() else 0.0 for x in found],
    }


def in_small_blocks() -> dict:
    """The same with rows of x and columns of the gradient cut in several blocks, and with sums by atomics."""
    from case_fast.ops import bilinear_mim_triton as kernels

    torch.manual_seed(0)
    errors = {}
    for score in equations.SCORES:
        made = inputs(70, 50, 20, False, score, "float32")
        expected = truth(made, None, score)
        before = kernels.BLOCK_ROWS, kernels.BLOCK_BYTES
        kernels.BLOCK_ROWS, kernels.BLOCK_BYTES = 32, 32 * 4 * 20
        errors[score] = worst(ours(made, None, score), expected)
        kernels.BLOCK_ROWS, kernels.BLOCK_BYTES = before
        errors[f"{score}, atomics"] = worst(ours(made, None, score, deterministic=False), expected)
    return {"case": "small blocks", "error": errors}


def draws() -> dict:
    """Whether the rows drawn are those of equations.draw_negatives; -1 where there are none."""
    from case_fast.ops import bilinear_mim_triton as kernels

    equal = {}
    for name, positive, rows in (("one to one", None, 9), ("shared", [4, 0, 0, 2, 4, 4, 1], 6), ("one group", [2, 2, 2], 4),
                                 ("one row", [0, 0], 1)):
        pair = torch.arange(rows) if positive is None else torch.tensor(positive)
        x = torch.zeros(pair.numel(), 1)
        _, over_y, over_x = kernels._drawn(x, None if positive is None else pair.int(), rows, 21, SEED)
        expected_y, expected_x, found_y, found_x = equations.draw_negatives(pair, rows, 21, SEED)
        equal[name] = [torch.equal(over_y, expected_y.masked_fill(~found_y.unsqueeze(1), -1)),
                       torch.equal(over_x, expected_x.masked_fill(~found_x.unsqueeze(1), -1))]
    return {"case": "draws", "equal": equal}


def hard() -> dict:
    """A row of NaN, scores of 1e4, and a positive that names no row: which losses are NaN, what is finite, what is said."""
    from case_fast.ops.device_flag import raise_pending

    torch.manual_seed(0)
    said: dict = {"case": "hard", "nan": {}, "finite": {}, "wrong": {}}
    for name, negatives, score in (("all", None, SIGMOID), ("dot", None, DOT), ("sampled", 2, SIGMOID), ("sampled dot", 2, DOT)):
        made = inputs(12, 12, 6, True, score, "float32")
        made["y"][3] = torch.nan
        sides, expected = (call(made, negatives, score)[:2] for call in (ours, truth))
        said["nan"][name] = [[a.isnan().tolist(), b.isnan().tolist()] for a, b in zip(sides, expected, strict=True)]
        made = inputs(12, 12, 6, False, score, "float32")
        made["x"], made["y"] = made["x"].sign() * 100, made["y"].sign() * 100 / (6 if score == DOT else 1)
        if score == SIGMOID:
            made["weight"] = torch.eye(6) / 6
        found = ours(made, negatives, score)
        said["finite"][name] = [bool(x.isfinite().all()) for x in found] + [float(found[2].abs().max()) > 1e3]
        for wrong in (12, -1, 2**31):
            made = inputs(12, 12, 6, False, score, "float32")
            made["positive"][5] = wrong
            side_y, side_x, *_ = ours(made, negatives, score)
            try:
                raise_pending()
                error = ""
            except IndexError as raised:
                error = str(raised)
            nan = side_y.isnan() & side_x.isnan()
            said["wrong"][f"{name}, {wrong}"] = [error, bool(nan[5]), int(nan.sum())]
    return said


# ------------------------------------------------------------------------------------------------------------------ compile

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def types(dtype: str) -> dict[str, str]:
    full = "fp64" if dtype == "fp64" else "fp32"
    found = {name: f"*{dtype}" for name in ("xw", "y", "source")}
    found |= {name: f"*{full}" for name in (
        "logit", "row_sum", "row_peak", "column_sum", "column_peak", "row_weight", "column_weight",
        "own_gradient", "value", "gradient")}
    found |= {name: "*i64" for name in ("positive", "members", "start", "over_y", "over_x", "order", "other")}
    found |= {name: "i32" for name in ("pairs", "rows", "first", "all_rows", "negatives", "steps")}
    return found | {"flag": "*i32", "seed": "u64"}


def cross_compile() -> list[dict]:
    """Every kernel, at the sizes of large batches; tiles of one row, which Triton compiles apart."""
    from case_fast.ops import bilinear_mim_triton as kernels

    found = []

    def add(kernel: str, dtype: str, constants: dict, out: str, options: dict | None = None) -> None:
        known = types(dtype) | {"out": out}
        aligned = [name for name, of in known.items() if of[:1] == "*" or name in ("pairs", "rows")]
        multiples = tuple(name for name in aligned if name not in constants)
        line = compiled(getattr(kernels, kernel), known, constants, options or {"num_warps": 4}, multiples)
        said = {name: value for name, value in constants.items() if name in ("DOT", "ATOMIC", "PRECISION", "rows")}
        found.append(line | {"kernel": f"{kernel} {dtype} {said}", "dtype": dtype})

    for dtype, dot, atomic, precision in (("fp32", False, False, "ieee"), ("fp32", True, False, "ieee"),
                                          ("fp32", False, True, "tf32"), ("bf16", False, False, "ieee"),
                                          ("bf16", True, False, "ieee"), ("fp64", False, False, "ieee")):
        sizes = kernels.tiles(65536, 65536, 300, _DTYPES[dtype]) | {"DOT": dot, "ATOMIC": atomic, "PRECISION": precision}
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        add("sum_tiles", dtype, sizes, "", options)
        add("gradient_tiles", dtype, sizes, f"*{dtype}", options)
    sizes = kernels.tiles(16, 16, 300, torch.float32) | {"DOT": False, "ATOMIC": False}
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    add("sum_tiles", "fp32", sizes | {"rows": 1, "pairs": 1}, "", options)
    add("group_sums", "fp32", {"BLOCK": 64, "ACC": sizes["ACC"]}, "*fp32")
    for more in ({}, {"rows": 1, "pairs": 1, "negatives": 1}):
        add("draw_rows", "fp32", {"BLOCK": 64} | more, "")
    for dtype in ("fp32", "bf16"):
        sizes = kernels.row_options(300, _DTYPES[dtype])
        add("sampled_scores", dtype, sizes | {"BLOCK_S": 16}, "*fp32")
        add("collect_rows", dtype, sizes | {"BLOCK_E": 16}, f"*{dtype}")
    return found


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "interpret":
        lines = (*map(interpret, CASES), in_small_blocks(), draws(), hard())
    else:
        lines = cross_compile()
    for line in lines:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
