"""packed_attention on a GPU: both plans, every dtype, against equations.py in float64. Needs only torch, numpy and pytest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_checks import close_to_truth, digests, gradcheck, kernels, results
from op_checks import counted, identical, nan_filled
from packed_attention_cases import FLOATS, INDEX, Case, make_case
from torch import Tensor

from case_fast import ops
from case_fast.ops import native_report
from case_fast.ops.device_flag import raise_pending

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if not native_report().get("cuda"):
    pytest.skip("the native module was built without CUDA", allow_module_level=True)

FAMILY = "packed_attention"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {
    "the paper's encoder": {"rows": [70, 31, 84, 55] * 4, "heads": 2, "dim": 150},
    "the paper's decoder": {"rows": [16, 9, 23, 12] * 4, "heads": 2, "dim": 150, "causal": True},
    "one row a sequence": {"rows": [1] * 16, "keys": [100, 80, 0, 120] * 4, "heads": 2, "dim": 150},
    "primes": {"rows": [1, 13, 7, 0, 19], "keys": [11, 3, 0, 5, 67], "heads": 3, "dim": 13},
    "causal, more keys and fewer": {"rows": [4, 37, 6], "keys": [50, 20, 0], "heads": 1, "dim": 7, "causal": True},
    "largest head": {"rows": [40, 3], "keys": [34, 90], "heads": 1, "dim": 256},
    "largest head of pairs": {"rows": [40, 3], "keys": [34, 90], "heads": 1, "dim": 192},
    "shared keys": {"rows": [2, 1, 0, 5, 35, 1], "keys": [33, 6, 4], "share": True, "dim": 6},
    "room in the cache": {"rows": [1, 4, 1, 40], "keys": [9, 64, 5, 70], "room": True, "dim": 8},
    "rows apart": {"rows": [3, 21], "keys": [9, 40], "layout": 1, "dim": 10},
    "any strides": {"rows": [3, 21], "keys": [9, 40], "layout": 2, "dim": 10},
    "no rows": {"rows": [0, 0], "keys": [3, 2]},
    "no keys": {"rows": [3, 2], "keys": [0, 0]},
    "no sequences": {"rows": [], "keys": []},
    "one key": {"rows": [1, 18], "keys": [1, 1], "heads": 1, "dim": 1},
    "many sequences": {"rows": [1, 2, 0, 5] * 500, "keys": [3, 0, 17, 6] * 500, "heads": 2, "dim": 32, "long": 15},
}


@pytest.fixture(autouse=True, params=[0, 1, 2], ids=["auto", "rows", "tiles"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("CASE_FAST_BACKEND", "native")
    monkeypatch.setattr(kernels(FAMILY), "PLAN_AUTO", request.param)
    yield request.param
    torch.cuda.synchronize()
    raise_pending()


def case_of(shape: str, **more: object) -> Case:
    return make_case(**({"device": "cuda"} | SHAPES[shape] | more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype):
    with counted(FAMILY) as calls:
        close_to_truth(case_of(shape, dtype=dtype))
        close_to_truth(case_of(shape, dtype=dtype, dropout_p=0.2, seed=2**40 + 3))
    assert calls[f"{FAMILY}_forward_cuda"] == calls[f"{FAMILY}_backward_cuda"] == 2


def test_the_same_bits_every_time():
    cases = [case_of(name, dropout_p=0.1) for name in ("the paper's encoder", "many sequences", "shared keys")]
    assert len({tuple(digests(cases)) for _ in range(10)}) == 1


def test_nothing_is_read_that_was_not_written():
    for name in SHAPES:
        case = case_of(name, dropout_p=0.1)
        clean = results(case)
        with nan_filled(kernels(FAMILY)):
            assert all(identical(x, clean[name]) for name, x in results(case).items())


def test_dropout_is_the_cpu_s():
    case = case_of("primes", dtype=torch.float64, dropout_p=0.4, seed=2**63 - 1)
    there = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in case.arguments().items()}
    assert (ops.packed_attention(**case.arguments()).cpu() - ops.packed_attention(**there)).abs().max() < 1e-12


@pytest.mark.parametrize("name, place, wrong", [("cu_query", 2, 10**6), ("cu_query", -1, 3), ("cu_key", 1, -5), ("key_of", 0, 3),
                                                ("key_of", 2, -1), ("key_length", 1, 65)])
def test_a_bad_entry_is_raised_at_the_next_call_and_the_device_stays_usable(name, place, wrong):
    case = make_case([3, 20, 5], [9, 64, 5], device="cuda", share=True, room=True, dim=10)
    index = getattr(case, name).clone()
    index[place] = wrong
    ops.packed_attention(**(case.arguments() | {name: index}))
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=name if name != "cu_key" else "cu_key|key_length"):
        raise_pending()
    raise_pending()
    with pytest.raises(IndexError, match=name):
        ops.packed_attention(**(case.arguments() | {name: index, "validate": True}))
    assert ops.packed_attention(**case.arguments()).isfinite().all()


def test_nan_in_one_sequence_stays_there():
    case = case_of("the paper's decoder")
    clean = results(case)
    span, keys = (slice(int(cu[1]), int(cu[2])) for cu in (case.cu_query, case.cu_key))
    broken = {name: getattr(case, name).clone() for name in (*FLOATS, "grad_out")}
    for name, x in broken.items():
        x[keys if name in ("key", "value") else span] = torch.nan
    found = results(replace(case, **broken))
    for name, x in found.items():
        own = keys if name in ("key", "value") else span
        x[own] = clean[name][own]
        assert identical(x, clean[name]), name


def test_replayed_from_a_cuda_graph():
    case = case_of("the paper's decoder", dropout_p=0.1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = results(case)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=side):
        found = results(case)
    for x in found.values():
        x.fill_(torch.nan)
    captured.replay()
    torch.cuda.synchronize()
    assert all(identical(x, expected[name]) for name, x in found.items())


def test_gradcheck_in_double():
    for name in ("primes", "shared keys"):
        gradcheck(case_of(name, dtype=torch.float64, dim=3, heads=1, dropout_p=0.3, seed=5))


def test_opcheck():
    module = kernels(FAMILY)
    for case in (case_of("primes"), case_of("room in the cache", dropout_p=0.3)):
        tensors = [getattr(case, name) for name in (*FLOATS, *INDEX)]
        numbers = (case.causal, 0.4, case.dropout_p, case.seed)
        torch.library.opcheck(module._forward_op, ("native", *tensors, *numbers))
        out, lse = module._forward_op("native", *tensors, *numbers)
        torch.library.opcheck(module._backward_op, ("native", case.grad_out, *tensors, out, lse, *numbers))


def test_autocast_computes_in_its_dtype():
    case = case_of("the paper's decoder")
    with torch.autocast("cuda", torch.bfloat16):
        assert ops.packed_attention(**case.arguments()).dtype == torch.bfloat16
