"""Products of float32 whose factors are rounded to bfloat16: torch's "medium" precision on a CPU that multiplies such numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_cases.linear import ACTIVATIONS, SHAPES, Linear
from op_cases.linear_cross_entropy import KEEP, RECOMPUTE, LinearCrossEntropy
from op_checks import by_threads, identical
from torch import Tensor

from case_fast.ops import reference
from case_fast.training.process import matmul_precision

UGLY = [{"rows": rows, "depth": depth, "outputs": outputs, **more} for rows, depth, outputs, more in SHAPES]
VARIED = [{**recipe, "activation": None} for recipe in Linear.VARIED if recipe.get("dtype") is None]
ROUNDING = 2.0**-7 + 2.0**-16  # of a product, whose two factors of 8 bits are each off by at most 2^-8


@pytest.fixture
def rounds(native) -> None:
    if not native.report()["bf16"]:
        pytest.skip("this CPU has no AVX512_BF16")


def results(case, precision: str = "medium") -> dict[str, Tensor]:
    with matmul_precision(precision):
        return case.results()


def products(x: Tensor, weights: list[Tensor], bias: Tensor | None, grad_out: Tensor) -> list[Tensor]:
    """In float64: out, and the gradients of x and each weight."""
    x, *weights = [y.detach().double().requires_grad_() for y in (x, *weights)]
    out = reference.linear(x, weights, None if bias is None else bias.double(), None)
    return [out.detach(), *torch.autograd.grad(out, [x, *weights], grad_out.double())]


@pytest.mark.parametrize("recipe", UGLY + VARIED, ids=str)
def test_factors_are_rounded_and_nothing_else(rounds, recipe):
    case = Linear.made(**recipe)
    given = [x for x in (case.x, case.weight, case.second, case.grad_out) if x is not None]
    found = results(case)
    found = [found[name] for name in ("out", "grad_x", "grad_weight", "grad_second") if name in found]
    x, *weights, grad_out = [x.abs() for x in given]
    sizes = products(x, weights, None if case.bias is None else case.bias.abs(), grad_out)  # of the sums of |a| |b|
    for factors, tolerance in (([x.bfloat16() for x in given], 2e-6), (given, ROUNDING + 2e-6)):
        x, *weights, grad_out = factors
        expected = products(x, weights, case.bias, grad_out)
        for a, b, size in zip(found, expected, sizes, strict=True):
            assert ((a - b).abs() <= tolerance * size).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows, depth, outputs", [(16, 300, 300), (250, 301, 900), (670, 900, 300)])
def test_bits_depend_on_neither_threads_nor_other_rows(rounds, rows, depth, outputs, activation):
    case = Linear.made(rows, depth, outputs, second=31, activation=activation)
    found = by_threads(lambda: results(case))
    assert all(identical(x, found[0][name]) for one in found for name, x in one.items())
    for part in (slice(0, 1), slice(rows // 3, rows // 3 + 9)):
        few = results(replace(case, x=case.x[part], grad_out=case.grad_out[part]))
        assert identical(few["out"], found[0]["out"][part]) and identical(few["grad_x"], found[0]["grad_x"][part])


LOSSES = [{"rows": 60, "words": 400, "dim": 33, "most": 3, "layout": 1}, {"rows": 480, "words": 1003, "dim": 300, "still": 0.3},
          {"rows": 25, "words": 577, "dim": 1}]


@pytest.mark.parametrize("keep_bytes", [KEEP, RECOMPUTE])
@pytest.mark.parametrize("recipe", LOSSES, ids=str)
def test_the_loss_of_many_rows_is_that_of_rounded_factors(rounds, recipe, keep_bytes):
    case = LinearCrossEntropy.made(keep_bytes=keep_bytes, **recipe)
    found = by_threads(lambda: results(case))
    assert all(identical(x, found[0][name]) for one in found for name, x in one.items())
    exact = replace(case, hidden=case.hidden.bfloat16().double(), weight=case.weight.bfloat16().double(), bias=case.bias.double(),
                    grad_nll=case.grad_nll.double()).results()
    assert (found[0]["nll"] - exact["nll"]).abs().max() < 1e-5
    for name in ("grad_hidden", "grad_weight", "grad_bias"):  # of which the gradients of scores are rounded as well
        error = (found[0][name] - exact[name]).norm() / exact[name].norm()
        assert error < (ROUNDING if name != "grad_bias" else 1e-5)


def test_the_scores_of_few_rows_and_the_best_words_are_not_rounded(native):
    few, many = LinearCrossEntropy.made(24, 300, 40, k=3), LinearCrossEntropy.made(60, 300, 40, k=3)
    assert identical(results(few)["nll"], results(few, "highest")["nll"])
    for case in (few, many):
        assert identical(results(case)["log_probability"], results(case, "highest")["log_probability"])


CASES = [Linear.made(40, 30, 20), LinearCrossEntropy.made(40, 30)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_each_call_asks_torch_anew(rounds, case, monkeypatch):
    exact, rounded = results(case, "highest"), results(case)
    name = next(iter(exact))
    assert all(identical(x, exact[key]) for key, x in results(case, "high").items())
    assert not identical(rounded[name], exact[name])
    with matmul_precision("highest"):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # the other way to say it
        assert all(identical(x, rounded[key]) for key, x in case.results().items())
    assert torch.get_float32_matmul_precision() == "highest"
    assert all(identical(x, exact[key]) for key, x in case.results().items())
    monkeypatch.setenv("CASE_FAST_SIMD", "avx2")  # a machine that has not the instructions
    assert all(identical(x, results(case, "highest")[key]) for key, x in results(case).items())


@pytest.mark.parametrize("family", [Linear, LinearCrossEntropy], ids=lambda family: family.family)
def test_float64_is_never_rounded(native, family):
    case = family.made(40, 30, 20, dtype=torch.float64)
    assert all(identical(x, results(case, "highest")[name]) for name, x in results(case).items())
    with matmul_precision("medium"):
        family.made(dtype=torch.float64, **family.GRADCHECK[5]).gradcheck()
