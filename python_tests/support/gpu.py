"""What the test files of a GPU share; where there is none, importing this skips them. Needs only torch, numpy and pytest."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from op_case import Case
from op_checks import identical
from torch import Tensor

from case_fast.ops import backend_name, native_report
from case_fast.ops.device_flag import raise_pending

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

DEVICE = "cuda"
NEEDS = {
    "native": pytest.mark.skipif(not native_report().get("cuda"), reason="the native module was built without CUDA"),
    "triton": pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
}


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch, family: type[Case], backend: str, plan: int = 0) -> Iterator[None]:
    """With this backend, and of its kernels this plan (0: theirs to choose); at the end what they have found is raised."""
    monkeypatch.setenv("CASE_FAST_BACKEND", backend)
    if hasattr(family.kernels(), "PLAN_AUTO"):
        monkeypatch.setattr(family.kernels(), "PLAN_AUTO", plan)
    assert backend_name(family.family, DEVICE) == backend
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()
    raise_pending()


def case_of(family: type[Case], shape: str, **more: object) -> Case:
    return family.made(**({"device": DEVICE} | family.ON_GPU[shape] | more))


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(identical(x, expected[name]) for name, x in found.items())


def captured(step: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """What replays a step from a CUDA graph, and where its results then lie, which hold NaN until it has run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # what is made and compiled at the first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = step()
    for x in found.values():
        x.fill_(torch.nan if x.is_floating_point() else -7)
    return graph.replay, found


def replayed_is_launched(step: Callable[[], dict[str, Tensor]]) -> bool:
    """Whether a step gives the same bits launched, and replayed from a CUDA graph into memory full of NaN."""
    replay, found = captured(step)
    expected = step()
    replay()
    torch.cuda.synchronize()
    return same_bits(found, expected)
