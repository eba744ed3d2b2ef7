"""cross_attention on a GPU: the kernels of decoding and what training composes, every dtype, against equations.py in float64.
Needs only torch, numpy and pytest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from attention_checks import close_to_truth, digests, gradcheck, kernels, results
from cross_attention_cases import Case, make_case
from op_checks import counted, identical, nan_filled
from torch import Tensor

from case_fast import equations, ops
from case_fast.ops import native_report
from case_fast.ops.device_flag import raise_pending

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if not native_report().get("cuda"):
    pytest.skip("the native module was built without CUDA", allow_module_level=True)

FAMILY = "cross_attention"
MODULE = kernels(FAMILY)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {
    "the paper's step": {"rows": [1] * 16, "keys": [[100, 80, 0, 120] * 4] * 3, "width": 300, "heads": 2, "dim": 150},
    "beams": {"rows": [5] * 4, "keys": [[100, 80, 0, 120]] * 3, "width": 300, "heads": 2, "dim": 150},
    "the paper's training": {"rows": [16, 9, 23, 12] * 4, "keys": [[90, 80, 0, 120] * 4] * 3, "width": 300, "dim": 150},
    "primes": {"rows": [1, 13, 0, 7], "keys": [[11, 3, 5, 67], [0, 0, 0, 1]], "width": 31, "heads": 3, "dim": 13},
    "largest head": {"rows": [3, 2], "keys": [[34, 50]], "width": 700, "heads": 1, "dim": 256},
    "shared keys": {"rows": [1, 2, 1], "keys": [[9, 3], [2, 0]], "width": 14, "share": True},
    "any strides": {"rows": [3, 2], "keys": [[9, 40]], "layout": 2, "width": 12, "dim": 10},
    "no rows": {"rows": [0, 0], "keys": [[3, 2]]},
    "no keys": {"rows": [3, 2], "keys": [[0, 0]]},
    "no sequences": {"rows": [], "keys": [[]]},
    "one of all": {"rows": [1], "keys": [[1]], "width": 1, "heads": 1, "dim": 1},
}


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASE_FAST_BACKEND", "native")
    yield
    torch.cuda.synchronize()
    raise_pending()


def case_of(shape: str, **more: object) -> Case:
    dropout = {"dropout_p": 0.2, "output_dropout_p": 0.1, "seed": 2**40 + 3} if more.pop("dropout", False) else {}
    # eps above the variance of rows of one column, which would all be normalised to the same, sharply
    return make_case(**({"device": "cuda", "eps": 0.1 if shape == "one of all" else 1e-5} | SHAPES[shape] | dropout | more))


def within_rule(found: Tensor, case: Case) -> None:
    """The house's rule for output alone."""
    with torch.no_grad():
        plain = equations.cross_attention(**case.arguments())
        true = equations.cross_attention(**case.to(torch.float64).arguments())
    assert found.dtype == plain.dtype and found.shape == true.shape
    if true.numel():
        assert (found.double() - true).abs().max() <= 2 * (plain.double() - true).abs().max() + 1e-5


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_trained_against_float64(shape, dtype, dropout):
    close_to_truth(case_of(shape, dtype=dtype, dropout=dropout))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoded_against_float64(shape, dtype, dropout, fused, monkeypatch):
    monkeypatch.setattr(MODULE, "FEW_ROWS", 256 if fused else -1)
    case = case_of(shape, dtype=dtype, dropout=dropout)
    with counted(FAMILY) as calls, torch.no_grad():
        found = ops.cross_attention(**case.arguments())
    assert calls[f"{FAMILY}_forward_cuda"] == fused
    within_rule(found, case)


def test_the_same_bits_every_time():
    cases = [case_of(name, dropout=True) for name in ("the paper's training", "shared keys", "primes")]
    assert len({tuple(digests(cases)) for _ in range(10)}) == 1
    step = case_of("the paper's step").arguments()
    first = ops.cross_attention(**step)
    assert all(identical(ops.cross_attention(**step), first) for _ in range(10))


def test_nothing_is_read_that_was_not_written():
    for name in SHAPES:
        case = case_of(name, dropout=True)
        clean, step = results(case), ops.cross_attention(**case.arguments())
        with nan_filled(MODULE), nan_filled(kernels("packed_attention")):
            assert all(identical(x, clean[name]) for name, x in results(case).items())
            assert identical(ops.cross_attention(**case.arguments()), step)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name, place, wrong", [("cu_hidden", 2, 10**6), ("cu_keys", 1, -5), ("key_of", 0, 2)])
def test_a_bad_entry_is_raised_at_the_next_call_and_the_device_stays_usable(name, place, wrong, trained):
    case = case_of("shared keys")
    index = (case.cu_hidden if name == "cu_hidden" else getattr(case.sources[1], name)).clone()
    index[place] = wrong
    changed = {"cu_hidden": index}
    if name != "cu_hidden":
        changed = {"sources": [case.sources[0], replace(case.sources[1], **{name: index})]}
    with pytest.raises(IndexError, match=name):
        ops.cross_attention(**(case.arguments() | changed | {"hidden": case.hidden.detach().requires_grad_(trained)}))
        torch.cuda.synchronize()
        raise_pending()  # where no launch of the same call has seen it
    torch.cuda.synchronize()
    with suppress(IndexError):  # what launches after the first have found
        raise_pending()
    raise_pending()
    assert ops.cross_attention(**case.arguments()).isfinite().all()


@pytest.mark.parametrize("trained", [False, True])
def test_replayed_from_a_cuda_graph(trained):
    case = case_of("the paper's training" if trained else "the paper's step", dropout=trained)

    def step() -> dict[str, Tensor]:
        return results(case) if trained else {"out": ops.cross_attention(**case.arguments())}

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=side):
        found = step()
    for x in found.values():
        x.fill_(torch.nan)
    captured.replay()
    torch.cuda.synchronize()
    assert all(identical(x, expected[name]) for name, x in found.items())


def test_gradcheck_in_double():
    for name in ("shared keys", "no keys"):
        gradcheck(case_of(name, dtype=torch.float64, width=4, heads=1, dim=3, dropout=True, eps=0.1))


def test_opcheck():
    for case in (case_of("shared keys", dropout=True), case_of("the paper's step")):
        floats = [x for name, x in case.floats().items() if name != "hidden"]
        tensors = (floats, [s.cu_keys for s in case.sources], [s.key_of for s in case.sources])
        numbers = (case.eps, case.dropout_p, case.output_dropout_p, case.seed)
        arguments = ("native", case.hidden, case.cu_hidden, *tensors, *numbers)
        for keep in (True, False):
            torch.library.opcheck(MODULE._forward_op, (*arguments, keep))
        saved = MODULE._forward_op(*arguments, True)[1]
        torch.library.opcheck(MODULE._backward_op, ("native", case.grad_out, *arguments[1:6], saved, *numbers))


def test_autocast_computes_in_its_dtype():
    case = case_of("the paper's training")
    with torch.autocast("cuda", torch.bfloat16):
        assert results(case)["out"].dtype == torch.bfloat16
        assert ops.cross_attention(**case.arguments()).dtype == torch.bfloat16
