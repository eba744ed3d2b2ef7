"""Run by test_triton_bilinear_mim.py: every case of `CASES` in Triton's interpreter against equations.py in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from triton_worker import SEED, SEED_AT, print_lines, same_bits, worst

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
    *sides, logit = equations.mim_sides(*arguments, positive, negatives, SEED, score, made.get("sizes"))
    grads = torch.autograd.grad(sides, leaves, [made[name].to(sides[0].dtype) for name in ("grad_side_y", "grad_side_x")])
    return [*(side.detach() for side in sides), logit.detach(), *grads]


def ours(made: dict[str, Tensor | None], negatives: int | None, score: str, deterministic: bool = True, seed: int = SEED,
         seed_at: Tensor | None = None) -> list[Tensor]:
    from case_fast.ops import bilinear_mim_triton as kernels

    given = [made[name] for name in ("x", "y", "weight", "positive")]
    numbers = (negatives, seed, seed_at, score, deterministic, made.get("sizes"))
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
        "repeatable": again is None or same_bits(found, again),
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
        _, over_y, over_x = kernels._drawn(x, None if positive is None else pair.int(), rows, 21, SEED, None, None)
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
        made = inputs(7, 7, 6, True, score, "float32")
        made["y"][3] = torch.nan
        sides, expected = (call(made, negatives, score)[:2] for call in (ours, truth))
        said["nan"][name] = [[a.isnan().tolist(), b.isnan().tolist()] for a, b in zip(sides, expected, strict=True)]
        made = inputs(7, 7, 6, False, score, "float32")
        made["x"], made["y"] = made["x"].sign() * 100, made["y"].sign() * 100 / (6 if score == DOT else 1)
        if score == SIGMOID:
            made["weight"] = torch.eye(6) / 6
        found = ours(made, negatives, score)
        said["finite"][name] = [bool(x.isfinite().all()) for x in found] + [float(found[2].abs().max()) > 1e3]
        for wrong in (7, -1, 2**31):
            made = inputs(7, 7, 6, False, score, "float32")
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


def not_all_exist() -> dict:
    """Pairs and rows beyond those that exist, by each way through the kernels; a positive there may be no row."""
    from case_fast.ops import bilinear_mim_triton as kernels
    from case_fast.ops.device_flag import raise_pending

    torch.manual_seed(0)
    errors, beyond = {}, {}
    before = kernels.BLOCK_ROWS, kernels.BLOCK_BYTES
    kernels.BLOCK_ROWS, kernels.BLOCK_BYTES = 32, 32 * 4 * 20
    for score, (name, negatives, deterministic), one_to_one in itertools.product(
            equations.SCORES, (("all", None, True), ("atomics", None, False), ("sampled", 5, True)), (False, True)):
        (pairs, real), (rows, real_rows) = ((70, 41), (50, 33)) if negatives is None else ((20, 11), (14, 9))
        if one_to_one:
            rows, real_rows = pairs, real
        made = inputs(pairs, rows, 20, one_to_one, score, "float32")
        made["sizes"] = torch.tensor([real, real_rows])
        if not one_to_one:
            made["positive"] %= real_rows
        expected = truth(made, negatives, score)
        if not one_to_one:
            made["positive"][real:] = 2**31
        found = ours(made, negatives, score, deterministic)
        raise_pending()
        case = f"{score}, {name}, {'one to one' if one_to_one else 'shared'}"
        errors[case] = worst(found, expected)
        beyond[case] = [bool(x[real if len(x) == pairs else real_rows :].any()) for x in found[:5]]
    kernels.BLOCK_ROWS, kernels.BLOCK_BYTES = before
    return {"case": "not all exist", "error": errors, "beyond": beyond}


def seeded() -> dict:
    """Whether a seed on the device draws as the number that it stands for, forward and backward."""
    torch.manual_seed(0)
    made = inputs(7, 5, 13, False, SIGMOID, "float32")
    found = [ours(made, 3, SIGMOID, seed=seed, seed_at=seed_at) for seed, seed_at in (
        ((SEED ^ SEED_AT) % 2**63, None), (SEED, torch.tensor([SEED_AT])), (SEED, None))]
    return {"case": "seeded", "equal": same_bits(*found[:2]), "other": not same_bits(found[0], found[2])}


if __name__ == "__main__":
    print_lines((*map(interpret, CASES), in_small_blocks(), draws(), hard(), not_all_exist(), seeded()))
