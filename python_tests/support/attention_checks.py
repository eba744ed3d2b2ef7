"""What the checks of packed_attention and of cross_attention share.

A case knows the float arguments of its call by name (``floats()``), makes the call with others in their place (``call``),
and gives itself in another dtype (``to``).
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Protocol, Self

import torch
from op_checks import digest
from torch import Tensor


class Case(Protocol):
    grad_out: Tensor

    def floats(self) -> dict[str, Tensor]: ...

    def call(self, floats: dict[str, Tensor], plain: bool = False) -> Tensor:
        """The op, or with ``plain`` its equation, on these floats."""
        ...

    def to(self, dtype: torch.dtype) -> Self: ...


def kernels(family: str) -> ModuleType:
    """The module of an op; `ops.packed_attention` is the function."""
    return importlib.import_module(f"case_fast.ops.{family}")


def strided(x: Tensor, layout: int) -> Tensor:
    """The same values in memory laid out otherwise: 0 as it is; of rows of heads, 1 rows apart, 2 transposed, 3 heads apart."""
    if layout == 0:
        return x
    if x.dim() < 3:
        return torch.stack([x, torch.full_like(x, torch.nan if x.is_floating_point() else -7)], dim=-1)[..., 0]
    if layout == 1:
        return torch.stack([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], dim=1)[:, 1]
    if layout == 2:
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    return torch.cat([torch.full_like(x, torch.nan), x], dim=2)[:, :, x.shape[2] :]


def offsets(lengths: list[int], long: bool, layout: int, device: str) -> Tensor:
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return strided(cu if long else cu.int(), layout).to(device)


def results(case: Case, plain: bool = False) -> dict[str, Tensor]:
    """out, and the gradient of every floating-point input."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.floats().items()}
    out = case.call(leaves, plain)
    found = torch.autograd.grad(out, list(leaves.values()), case.grad_out, allow_unused=True, materialize_grads=True)
    return {"out": out.detach()} | dict(zip(leaves, found, strict=True))


def close_to_truth(case: Case) -> float:
    """The house's rule for output and gradients; returns the largest share of the allowed error."""
    dtype = case.grad_out.dtype
    found, plain, truth = results(case), results(case, plain=True), results(case.to(torch.float64), plain=True)
    floor, worst = 1e-11 if dtype == torch.float64 else 1e-5, 0.0
    for name, true in truth.items():
        assert found[name].shape == true.shape and found[name].dtype == dtype, name
        if not true.numel():
            continue
        ours, theirs = ((x[name].double() - true).abs().max().item() for x in (found, plain))
        if dtype == torch.float64:
            theirs = floor * true.abs().max().item()
        assert ours <= 2 * theirs + floor, f"{name}: error {ours:.3g}, plain torch's {theirs:.3g}"
        worst = max(worst, ours / (2 * theirs + floor))
    return worst


def mean_errors(made: Callable[[int], Case], number: int) -> dict[str, float]:
    """Root mean square error over `number` cases, of output and gradients, over plain torch's."""
    ours, theirs = Counter(), Counter()
    for place in range(number):
        case = made(place)
        found, plain = results(case), results(case, plain=True)
        for name, true in results(case.to(torch.float64), plain=True).items():
            ours[name] += (found[name].double() - true).square().mean().item()
            theirs[name] += (plain[name].double() - true).square().mean().item()
    return {name: (ours[name] / theirs[name]) ** 0.5 for name in ours if ours[name]}


def gradcheck(case: Case) -> None:
    """Analytic against numerical gradients of a case in float64."""
    names = list(case.floats())
    leaves = [x.detach().requires_grad_() for x in case.floats().values()]

    def call(*leaves: Tensor) -> Tensor:
        return case.call(dict(zip(names, leaves, strict=True)))

    if case.grad_out.numel():
        assert torch.autograd.gradcheck(call, leaves)
    found = torch.autograd.grad(call(*leaves).sum(), leaves)
    assert all(x.shape == leaf.shape and x.isfinite().all() for x, leaf in zip(found, leaves, strict=True))


def digests(cases: list[Case]) -> list[str]:
    return [digest(results(case)) for case in cases]
