"""graph_attention on a GPU: every backend, plan and dtype against equations.py in float64. Needs only torch, numpy and pytest."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from itertools import product

import pytest
import torch
from torch import Tensor
from triton_worker import SEED, inputs, truth

from case_fast import equations, ops
from case_fast.ops import native_report
from case_fast.ops.device_flag import raise_pending

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

MODULE = sys.modules["case_fast.ops.graph_attention"]  # `ops.graph_attention` is the function
PLANS = {"native": 0, "native, graphs": 1, "native, rows": 2}
native = pytest.mark.skipif(not native_report().get("cuda"), reason="the native module was built without CUDA")
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
BACKENDS = [*(pytest.param(name, marks=native) for name in PLANS), pytest.param("triton", marks=triton)]

SHAPES = {
    # name: vertices, edges, heads, dim, relations
    "the paper's batch": (1344, 5376, 2, 150, 7),
    "plain": (1344, 5376, 2, 150, 0),
    "odd head": (301, 997, 3, 75, 5),
    "largest head": (64, 500, 1, 256, 3),
    "one vertex": (1, 3, 1, 1, 1),
    "no edges": (5, 0, 2, 8, 3),
    "no vertices": (0, 0, 2, 8, 3),
    "more relations than lanes": (50, 600, 2, 6, 70),
    "dense": (80, 6000, 2, 32, 4),
    "one long row and column": (7000, 20000, 1, 16, 3),
    "large": (20011, 80000, 2, 150, 7),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CASE_FAST_BACKEND", "triton" if request.param == "triton" else "native")
    monkeypatch.setattr(MODULE, "PLAN_AUTO", PLANS.get(request.param, 0))
    torch.manual_seed(0)
    yield request.param
    torch.cuda.synchronize()
    raise_pending()


def graph(name: str, dtype: str = "float32", index: str = "int32") -> dict[str, Tensor]:
    vertices, edges, heads, dim, relations = SHAPES[name]
    made = inputs(vertices, edges, heads, dim, relations, dtype, index)
    if name == "one long row and column":
        made["indptr"][1:] = torch.linspace(6000, edges, vertices).to(made["indptr"].dtype)
        made["indices"][6000:12000] = 1
    if name in ("the paper's batch", "plain"):  # blocks on the diagonal, so that the graphs plan has graphs
        row = equations.segment_ids(made["indptr"], edges)
        made["indices"] = (row // 84 * 84 + made["indices"].long() % 84).to(made["indices"].dtype)
    return made


def on_gpu(made: dict[str, Tensor], scale: float, dropout_p: float) -> list[Tensor]:
    there = {name: x.cuda() for name, x in made.items()}
    grad_out = there.pop("grad_out")
    floats = {name: x.requires_grad_() for name, x in there.items() if x.is_floating_point()}
    out = ops.graph_attention(**there, scale=scale, dropout_p=dropout_p, seed=SEED)
    order = ["query", "key", "value", "relation_query", "relation_key"]
    return [out, *torch.autograd.grad(out, [floats[name] for name in order if name in floats], grad_out)]


def forward(made: dict[str, Tensor]) -> Tensor:
    """Output alone: backward would raise what forward has found."""
    out = ops.graph_attention(**{name: x.cuda() for name, x in made.items() if name != "grad_out"})
    torch.cuda.synchronize()
    return out


@functools.cache
def known(shape: str, dtype: str) -> tuple[dict[str, Tensor], float, float, list[Tensor], list[Tensor]]:
    """Inputs, scale and dropout; the equation in float64, and as plain torch has it in this dtype."""
    torch.manual_seed(0)
    made = graph(shape, dtype, "int64" if dtype == "float64" else "int32")
    numbers = (SHAPES[shape][3] ** -0.5, 0.2 if SHAPES[shape][4] else 0.0)
    return made, *numbers, truth(made, *numbers), truth(made, *numbers, getattr(torch, dtype))


COMBINATIONS = [
    pytest.param(name, shape, dtype, marks=triton if name == "triton" else native)
    for name, shape, dtype in product([*PLANS, "triton"], SHAPES, ["float32", "bfloat16", "float16", "float64"])
    if name != "triton" or dtype == "float32" or shape in ("the paper's batch", "odd head")  # it compiles for seconds each
]


@pytest.mark.parametrize("backend, shape, dtype", COMBINATIONS, indirect=["backend"])
def test_against_float64(backend, shape, dtype):
    made, scale, dropout_p, expected, plain = known(shape, dtype)
    for found, right, usual in zip(on_gpu(made, scale, dropout_p), expected, plain, strict=True):
        assert found.dtype == getattr(torch, dtype) and found.shape == right.shape
        if not right.numel():
            continue
        error, usual_error = (found.cpu().double() - right).abs().max(), (usual.double() - right).abs().max()
        assert error <= 2 * usual_error + 1e-5


def test_the_same_bits_every_time(backend):
    made = graph("large")

    def digest() -> str:
        return hashlib.sha256(b"".join(x.detach().cpu().numpy().tobytes() for x in on_gpu(made, 0.1, 0.2))).hexdigest()

    assert len({digest() for _ in range(10)}) == 1


@pytest.mark.parametrize("shape", ["the paper's batch", "large"])
def test_nothing_is_read_that_was_not_written(backend, shape, monkeypatch):
    """Memory that torch hands out holds NaN: outputs and workspaces."""
    made = graph(shape)
    before = on_gpu(made, 0.1, 0.1)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        after = on_gpu(made, 0.1, 0.1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name, wrong, error", [("indices", 1344, IndexError), ("indices", -1, IndexError),
                                                ("relation", 7, IndexError), ("indptr", -5, IndexError)])
def test_a_bad_index_is_raised_at_the_next_call_and_the_device_stays_usable(backend, name, wrong, error):
    made = graph("the paper's batch")
    made[name][5] = wrong
    forward(made)
    with pytest.raises(error, match=name):
        raise_pending()
    raise_pending()
    assert on_gpu(graph("plain"), 0.1, 0.0)[0].isfinite().all()


def test_a_bad_index_makes_its_own_row_nan_alone(backend):
    made = graph("the paper's batch")
    made["indices"][int(made["indptr"][9])] = 99999
    rows = forward(made).isnan().any(dim=(1, 2)).nonzero().flatten().tolist()
    with pytest.raises(IndexError):
        raise_pending()
    assert rows == [9]


def test_nan_in_one_graph_stays_there(backend):
    made = graph("the paper's batch")
    clean = on_gpu(made, 0.1, 0.0)
    for name in ("query", "key", "value", "grad_out"):
        made[name][84:168] = float("nan")
    for a, b in zip(on_gpu(made, 0.1, 0.0)[:4], clean[:4], strict=True):
        others = torch.cat([torch.arange(84), torch.arange(168, 1344)])
        assert torch.equal(a[others], b[others])


def test_replayed_from_a_cuda_graph(backend):
    made = {name: x.cuda() for name, x in graph("the paper's batch").items()}
    grad_out = made.pop("grad_out")
    leaves = [x.requires_grad_() for x in made.values() if x.is_floating_point()]

    def step() -> tuple[Tensor, ...]:
        out = ops.graph_attention(**made)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=side):
        found = step()
    for x in found:
        x.fill_(float("nan"))
    captured.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradcheck_in_double(backend):
    made = {name: x.cuda() for name, x in inputs(7, 23, 2, 5, 3, "float64", "int64").items() if name != "grad_out"}
    floats = [x.requires_grad_() for x in made.values() if x.is_floating_point()]
    assert torch.autograd.gradcheck(lambda *_: ops.graph_attention(**made, dropout_p=0.3, seed=SEED), floats, nondet_tol=0.0)


def test_opcheck(backend):
    made = {name: x.cuda() for name, x in inputs(9, 40, 2, 6, 3, "float32", "int32").items()}
    runs = "triton" if backend == "triton" else "native"
    order = ["query", "key", "value", "indptr", "indices", "relation", "relation_query", "relation_key"]
    arguments = [made[name] for name in order]
    torch.library.opcheck(torch.ops.case_fast.graph_attention_forward.default, (runs, *arguments, 0.5, 0.2, 7))
    weights = torch.ops.case_fast.graph_attention_forward(runs, *arguments, 0.5, 0.2, 7)[1]
    backward = torch.ops.case_fast.graph_attention_backward.default
    torch.library.opcheck(backward, (runs, made["grad_out"], *arguments, weights, 0.5, 0.2, 7))


def test_compiled_without_breaks(backend):
    made = {name: x.cuda() for name, x in graph("the paper's batch").items() if name != "grad_out"}
    compiled = torch.compile(lambda **x: ops.graph_attention(**x) * 2, fullgraph=True)
    assert torch.equal(compiled(**made), ops.graph_attention(**made) * 2)


def test_autocast_computes_in_its_dtype(backend):
    made = {name: x.cuda() for name, x in graph("the paper's batch").items() if name != "grad_out"}
    with torch.autocast("cuda", torch.bfloat16):
        assert ops.graph_attention(**made).dtype == torch.bfloat16
