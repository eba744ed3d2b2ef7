"""Run by test_triton_linear_cross_entropy.py: every case in Triton's interpreter against equations.py in float64."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from triton_worker import print_lines, same_bits, worst

from case_fast import equations

NAN, INF = float("nan"), float("inf")
CASES = {
    # name: rows, words, dim, whether a row has several targets, dtype
    "prime sizes": (37, 101, 13, False, "float32"),
    "more tiles than one": (70, 150, 300, False, "float32"),
    "one row": (1, 67, 5, False, "float32"),
    "one word": (3, 1, 4, False, "float32"),
    "no rows": (0, 7, 4, False, "float32"),
    "float64": (20, 70, 10, False, "float64"),
    "float16": (33, 70, 20, False, "float16"),  # the interpreter cuts what it stores as bfloat16
    "several targets": (9, 101, 13, True, "float32"),
    "several targets, one row": (1, 67, 5, True, "float32"),
    "several targets, one word": (3, 1, 4, True, "float32"),
    "several targets, no rows": (0, 7, 4, True, "float32"),
    "several targets, float64": (5, 70, 10, True, "float64"),
    "several targets, float16": (5, 70, 20, True, "float16"),
}
BEST = {
    # name: rows, words, dim, k, dtype
    "prime sizes": (7, 101, 13, 5, "float32"),
    "one row, one word": (1, 1, 1, 1, "float32"),
    "all words": (2, 32, 4, 32, "float32"),
    "more than a tile has": (3, 70, 300, 30, "float32"),
    "more tiles than one of rows": (35, 150, 20, 2, "float32"),
    "no rows": (0, 7, 4, 3, "float32"),
    "float64": (5, 70, 10, 4, "float64"),
    "float16": (5, 70, 20, 4, "float16"),
}


def inputs(rows: int, words: int, dim: int, several: bool, dtype: str) -> dict[str, Tensor | None]:
    """Scores of deviation about 2. Of several targets, the second row has none, the last many, and some twice."""
    floats = getattr(torch, dtype)
    made: dict[str, Tensor | None] = {"hidden": torch.randn(rows, dim).to(floats), "cu_target": None}
    made["weight"], made["bias"] = (torch.randn(words, dim) * 2 * dim**-0.5).to(floats), torch.randn(words).to(floats)
    targets = rows
    if several:
        counts = torch.randint(0, 6, (rows,))
        counts[1:2], counts[-1:] = 0, 40
        made["cu_target"] = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        targets = int(counts.sum())
    made["target"] = torch.randint(0, words, (targets,))
    if several and rows:
        made["target"][-25:] = made["target"][-30].clone()
    made["grad_nll"] = torch.randn(targets, dtype=torch.float64 if dtype == "float64" else torch.float32)
    return made


def truth(made: dict[str, Tensor | None], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """nll and the gradients of hidden, weight and bias; and the words predicted."""
    leaves = [made[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")]
    nll, prediction = equations.linear_cross_entropy(*leaves, made["target"], made["cu_target"])
    grads = torch.autograd.grad(nll, leaves, made["grad_nll"].to(nll.dtype))
    return [nll.detach(), *grads, prediction]


def ours(made: dict[str, Tensor | None], keep: bool = False, wanted: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
    """As `truth`."""
    from case_fast.ops import linear_cross_entropy_triton as kernels

    given = [made[name] for name in ("hidden", "weight", "bias", "target", "cu_target")]
    nll, prediction, state, kept = kernels.forward(*given, keep)
    assert kept.numel() == (made["hidden"].shape[0] * made["weight"].shape[0] if keep else 0)
    return [nll, *kernels.backward(made["grad_nll"], *given, state, kept, list(wanted)), prediction]


def raised() -> str:
    """What an earlier kernel found."""
    from case_fast.ops.device_flag import raise_pending

    try:
        raise_pending()
    except IndexError as error:
        return str(error)
    return ""


@contextmanager
def replaced(**numbers):
    """Limits of the module for a while."""
    from case_fast.ops import linear_cross_entropy_triton as kernels

    before = {name: getattr(kernels, name) for name in numbers}
    for name, value in numbers.items():
        setattr(kernels, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)


def interpret(case: str) -> dict:
    torch.manual_seed(0)
    *_, dtype = CASES[case]
    made = inputs(*CASES[case])
    found, again, kept = ours(made), ours(made), ours(made, keep=True)
    expected, plain = truth(made), truth(made, getattr(torch, dtype))
    return {
        "case": case,
        "error": worst(found[:4], expected[:4]),
        "kept_error": worst(kept[:4], expected[:4]),
        "plain_error": worst(plain[:4], expected[:4]),
        "predicted": torch.equal(found[4], expected[4]) and torch.equal(kept[4], expected[4]),
        "dtypes": [str(x.dtype) for x in found],
        "repeatable": same_bits(found, again),
    }


def interpret_best(case: str) -> dict:
    from case_fast.ops import linear_cross_entropy_triton as kernels

    torch.manual_seed(1)
    rows, words, dim, k, dtype = BEST[case]
    made = inputs(rows, words, dim, False, dtype)
    given = [made[name] for name in ("hidden", "weight", "bias")]
    value, word = kernels.top_words(*given, k)
    right, right_word = equations.top_words(*(x.double() for x in given), k)
    plain, _ = equations.top_words(*given, k)
    return {
        "case": f"best: {case}",
        "error": worst([value], [right])[0],
        "plain_error": worst([plain], [right])[0],
        "words": torch.equal(word, right_word),
        "dtypes": [str(value.dtype), str(word.dtype)],
    }


def in_small_blocks() -> dict:
    """The same with rows and words cut in several blocks; and each gradient alone, of fewer rows."""
    errors = {}
    for several in (False, True):
        torch.manual_seed(0)
        made = inputs(66, 203, 20, several, "float32")  # forward takes 64 rows and 2
        expected = truth(made)
        with replaced(BLOCK_ROWS=32, BLOCK_BYTES=32 * 4 * 128):
            for keep in (False, True):
                found = ours(made, keep)
                predicted = float(not found[4].equal(expected[4]))
                errors[f"several {several}, keep {keep}"] = [*worst(found[:4], expected[:4]), predicted]
        made = inputs(9, 101, 20, several, "float32")
        expected = truth(made)
        for place in range(3):
            wanted = tuple(i == place for i in range(3))
            _, gradient, _ = ours(made, wanted=wanted)
            errors[f"several {several}, gradient {place}"] = worst([gradient], [expected[1 + place]])
    made = inputs(5, 30, 20, False, "float16")
    with replaced(BLOCK_ROWS=2):
        found, expected, plain = ours(made), truth(made), truth(made, torch.float16)
    for place, (error, usual) in enumerate(zip(worst(found[:4], expected[:4]), worst(plain[:4], expected[:4]), strict=True)):
        errors[f"float16, {place}"] = [max(0.0, error - 2 * usual)]
    return {"case": "small blocks", "error": errors}


def hard() -> dict:
    """Ties, forbidden words, NaN: whether all is as the equation has it."""
    from case_fast.ops import linear_cross_entropy_triton as kernels

    said: dict[str, bool] = {}

    def check(name: str, made: dict, k: int = 5) -> list[Tensor]:
        found, expected = ours(made), truth(made)
        said[f"{name}: nll"] = bool(torch.allclose(found[0].double(), expected[0], rtol=1e-5, atol=1e-5, equal_nan=True))
        said[f"{name}: prediction"] = torch.equal(found[4], expected[4])
        given = [made[part] for part in ("hidden", "weight", "bias")]
        value, word = kernels.top_words(*given, k)
        right, right_word = equations.top_words(*given, k)
        if "a row of NaN" in name:
            right_word[3] = torch.arange(k)  # torch leaves the order of NaN open
        said[f"{name}: best"] = bool(torch.allclose(value, right, rtol=1e-5, atol=1e-5, equal_nan=True))
        said[f"{name}: best words"] = torch.equal(word, right_word)
        return found

    def fresh(several: bool = False) -> dict:
        torch.manual_seed(2)
        return inputs(6, 203, 8, several, "float32")

    for several in (False, True):
        also = ", several" if several else ""
        made = fresh(several)  # whole numbers, so that equal scores are equal; each word comes seven times
        made["hidden"], made["weight"] = made["hidden"].round(), made["weight"].round()[:29].repeat(7, 1)
        made["bias"] = torch.where(torch.arange(203) % 2 == 0, 0.0, -0.0)
        check(f"ties{also}", made, 30)
        made["weight"] = torch.zeros(203, 8)
        check(f"all equal{also}", made, 30)

        made = fresh(several)
        made["bias"][torch.randperm(203)[:190]] = -INF
        found = check(f"forbidden{also}", made, 20)
        gradients = found[1:4]
        said[f"forbidden{also}: gradients"] = max(worst(gradients, truth(made)[1:4])) < 1e-5
        made["bias"][:] = -INF
        check(f"all forbidden{also}", made)
        made = fresh(several)
        made["hidden"][3] *= 1e4
        said[f"large{also}: finite"] = all(bool(x.isfinite().all()) for x in ours(made))

        made = fresh(several)
        made["hidden"][3] = NAN
        said[f"a row of NaN{also}: seen"] = bool(check(f"a row of NaN{also}", made)[0].isnan().any())
        # without gradient it takes no part; nor does a NaN of weight reach such a row
        row_of = equations.segment_ids(made["cu_target"], made["target"].numel()) if several else torch.arange(6)
        made["grad_nll"][row_of == 3] = 0
        clean = dict(made, hidden=made["hidden"].nan_to_num(0.0))
        pairs = zip(ours(made)[1:4], ours(clean)[1:4], strict=True)
        said[f"a row of NaN{also}: no gradient"] = all(torch.equal(a, b) for a, b in pairs)
        made = fresh(several)
        made["weight"][150] = NAN
        made["weight"][190] = NAN
        said[f"a word of NaN{also}: predicted"] = check(f"a word of NaN{also}", made)[4].tolist() == [150] * 6
        made["grad_nll"][row_of == 3] = 0
        grad_hidden = ours(made)[1]
        said[f"a word of NaN{also}: no gradient"] = not grad_hidden[3].any() and bool(grad_hidden[0].isnan().all())
        made["grad_nll"][:] = 0
        said[f"no gradients{also}"] = not any(x.any() for x in ours(made)[1:4])
    made = fresh()
    made["bias"][77] = INF
    found = ours(made)
    said["infinite"] = bool(found[0].isnan().all()) and found[4].tolist() == [77] * 6
    made = fresh(True)  # of a row whose gradients cancel, those of its words stay
    begin = int(made["cu_target"][-2])
    made["grad_nll"][begin:] = torch.tensor([1.0, -1.0] * 20)
    said["cancelled"] = max(worst(ours(made)[1:4], truth(made)[1:4])) < 1e-5
    return {"case": "hard", "said": said}


def damaged() -> dict:
    """Targets and offsets out of range: what the flag says, and which losses are NaN."""
    said = {}
    for several in (False, True):
        for wrong in (203, -1, 2**33 + 5):
            torch.manual_seed(3)
            made = inputs(6, 203, 8, several, "float32")
            made["target"][4] = wrong
            said[f"target {wrong}, several {several}"] = [ours(made)[0].isnan().nonzero().flatten().tolist(), raised()]
    for place, wrong in ((0, 1), (0, -1), (1, -(2**33)), (3, 1000), (-1, 3), (-1, 2**33)):
        torch.manual_seed(3)
        made = inputs(6, 203, 8, True, "float32")
        made["cu_target"][place] = wrong
        said[f"cu_target {place} {wrong}"] = [ours(made)[0].isnan().nonzero().flatten().tolist(), raised()]
    return {"case": "damaged", "said": said, "again": raised()}


def public() -> dict:
    """Through the ops: views that are not contiguous, int32, the choice of what is kept, and a k that plain torch serves."""
    import os

    from case_fast import ops
    from case_fast.ops import linear_cross_entropy_triton as kernels

    os.environ["CASE_FAST_BACKEND"] = "triton"
    calls: list = []
    forward, top = kernels.forward, kernels.top_words
    kernels.forward = lambda *given: calls.append(given[-1]) or forward(*given)
    kernels.top_words = lambda *given: calls.append(given[-1]) or top(*given)
    torch.manual_seed(4)
    made = inputs(12, 40, 10, False, "float32")
    hidden, weight = made["hidden"].T.contiguous().T.requires_grad_(), made["weight"].T.contiguous().T.requires_grad_()
    bias = made["bias"].repeat_interleave(2)[::2].requires_grad_()
    said = []
    for keep_bytes in (12 * 40 * 4, 12 * 40 * 4 - 1):
        nll, _ = ops.linear_cross_entropy(hidden, weight, bias, made["target"].int(), keep_bytes)
        found = [nll, *torch.autograd.grad(nll, (hidden, weight, bias), made["grad_nll"])]
        said.append(max(worst([x.detach() for x in found], truth(made)[:4])) < 1e-5)
    for k in (3, 32, 33):
        expected = equations.top_words(hidden, weight, bias, k)
        found = ops.top_words(hidden, weight, bias, k)
        said.append(torch.equal(found[1], expected[1]) and max(worst([found[0]], [expected[0].detach()])) < 1e-5)
    return {"case": "public", "right": said, "calls": calls}


def main() -> None:
    from case_fast.ops import linear_cross_entropy_triton as kernels

    kernels.SPREAD = 2  # an interpreted program takes some milliseconds, with or without targets
    print_lines((*map(interpret, CASES), *map(interpret_best, BEST), in_small_blocks(), hard(), damaged(), public()))


if __name__ == "__main__":
    main()
