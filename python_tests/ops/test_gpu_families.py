"""The ops of all families on a GPU: each backend, plan and dtype against the equations in float64, and what a GPU adds. What one
of them says alone is in the file of its name. Needs only torch, numpy and pytest."""

from __future__ import annotations

from dataclasses import replace

import gpu
import pytest
import torch
from gpu import case_of
from op_cases import FAMILIES
from op_checks import check_opcheck, counted, nan_filled

from case_fast.ops import backend_name

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WAYS = [  # family, backend, plan
    *(("graph_attention", "native", plan) for plan in (0, 1, 2)),  # chosen, by graphs, by rows
    *(("packed_attention", "native", plan) for plan in (0, 1, 2, 3)),  # chosen, by rows, by tiles, by warps
    ("cross_attention", "native", 0),
    ("graph_attention", "triton", 0),
    ("bilinear_mim", "triton", 0),
    ("linear_cross_entropy", "triton", 0),
    ("segment_sum", "triton", 0),
    ("pooled_attention", "triton", 0),
    ("residual_norm", "triton", 0),
]
EVERY_DTYPE = ("the paper's batch", "odd head", "dot", "sampled, shared", "prime sizes", "prime sizes, several", "texts")


def ways(*backends: str, of: tuple[str, ...] = tuple(FAMILIES)):
    """Parameters of the fixture `family`."""
    return [pytest.param((FAMILIES[name], backend, plan), id=f"{name}-{backend}-{plan}", marks=gpu.NEEDS[backend])
            for name, backend, plan in WAYS if backend in backends and name in of]


ALL = ways("native", "triton")
QUICK_TO_COMPILE = ("graph_attention", "packed_attention", "cross_attention", "segment_sum", "pooled_attention",
                    "residual_norm")


@pytest.fixture
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    kind, backend, plan = request.param
    with gpu.running(monkeypatch, kind, backend, plan):
        yield kind


def taken(name: str, backend: str, shape: str, dtype: torch.dtype) -> bool:
    """Triton compiles for seconds each."""
    few = [torch.float32] if name == "graph_attention" else [torch.float32, torch.bfloat16]
    return backend == "native" or dtype in few or shape in EVERY_DTYPE


@pytest.mark.parametrize("family, shape, dtype", [
    pytest.param(*way.values, shape, dtype, id=f"{way.id}-{shape}-{dtype}", marks=way.marks)
    for way in ALL for shape in way.values[0][0].ON_GPU for dtype in DTYPES
    if taken(way.values[0][0].family, way.values[0][1], shape, dtype)
], indirect=["family"])
def test_results_and_gradients_keep_the_rule(family, shape, dtype):
    with counted(family) as calls:
        for variant in family.VARIANTS:
            case_of(family, shape, dtype=dtype, **variant).close_to_truth()
    if backend_name(family.family, gpu.DEVICE) == "native" and family.family != "cross_attention":  # which composes its training
        assert calls[f"{family.family}_forward_cuda"] == calls[f"{family.family}_backward_cuda"] == len(family.VARIANTS)


@pytest.mark.parametrize("family", ALL, indirect=True)
def test_the_same_bits_every_time(family):
    for shape in family.ON_GPU:
        for variant in family.VARIANTS:
            case = case_of(family, shape, **variant)
            first = case.results()
            assert all(gpu.same_bits(case.results(), first) for _ in range(9)), shape


@pytest.mark.parametrize("family", ALL, indirect=True)
def test_nothing_is_read_that_was_not_written(family):
    for shape in family.ON_GPU:
        for variant in family.VARIANTS:
            case = case_of(family, shape, **variant)
            clean = case.results()
            with nan_filled() as asked:
                assert gpu.same_bits(case.results(), clean), shape
            assert asked["empty_like"] or family.LINEAR and asked["new_empty"]


@pytest.mark.parametrize("family", ALL, indirect=True)
@pytest.mark.parametrize("place", range(3))
def test_a_cuda_graph_replays_the_same_bits(family, place):
    shape = list(family.ON_GPU)[place]
    for variant in family.VARIANTS:
        assert gpu.replayed_is_launched(case_of(family, shape, **variant).results), shape


@pytest.mark.parametrize("family", [way for way in ALL if way.values[0][0].DRAWN], indirect=True)
def test_a_captured_call_draws_by_the_seed_that_its_replay_finds(family):
    """Forward and backward in one graph; and forward alone, which for cross_attention is another kernel."""
    for recipe in family.DRAWN:
        case = family.made(device=gpu.DEVICE, seed=3, **recipe)
        given = case.seeded_by_tensor()
        for way in ("results", "call"):
            replay, found = gpu.captured(getattr(given, way))
            for seed in (4, 2**62 + 5, 3):
                given.seed.fill_(seed)
                replay()
                assert gpu.same_bits(found, getattr(replace(case, seed=seed), way)()), f"{way}, seed {seed}"


@pytest.mark.parametrize("family", ways("native") + ways("triton", of=QUICK_TO_COMPILE), indirect=True)
def test_gradients_are_the_numerical_ones_in_double(family):
    for recipe in family.GRADCHECK[8:15:3]:
        family.made(dtype=torch.float64, device=gpu.DEVICE, **recipe).gradcheck()


@pytest.mark.parametrize("family", ways("native") + ways("triton", of=QUICK_TO_COMPILE), indirect=True)
def test_the_registered_ops_pass_opcheck(family):
    assert check_opcheck(family, 3, gpu.DEVICE) >= 6


@pytest.mark.parametrize("family", ALL, indirect=True)
def test_autocast_computes_in_its_dtype(family):
    """Sums are float32 there too."""
    found = case_of(family, next(iter(family.ON_GPU))).results(autocast=True)
    assert {found[name].dtype for name in family.GRADIENTS} == {torch.float32 if family.SUMS else torch.bfloat16}
