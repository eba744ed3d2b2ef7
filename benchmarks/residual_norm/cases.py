"""The inputs of the residual_norm benchmarks: the rows that a model's layers end with, and what comes out in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Case, Truth
from case_fast.errors import ConfigError
from case_fast.ops import reference

NAMED = {  # of real batches of 16 dialogues, the mean
    "words": "16x300", "replies": "233x300", "context": "569x300", "graphs": "754x300", "reactions": "1381x300",
    "texts": "2405x300", "graphs-norm": "754x300:norm",
}
SIZES = list(NAMED)
QUICK_SIZES = ["30x7", "30x7:norm"]
AXIS = "rows of 300"
DROPOUT = 0.1


@dataclass(frozen=True)
class ResidualCase(Case):
    """x, update, grad_total, grad_normed (n, d); weight, bias (d,). ``update`` None: the norm alone."""

    x: Tensor
    update: Tensor | None
    weight: Tensor
    bias: Tensor
    grad_total: Tensor
    grad_normed: Tensor

    @property
    def shape(self) -> dict[str, int]:
        return {"n": self.x.shape[0], "d": self.x.shape[1]}

    @property
    def size(self) -> int | None:
        return self.x.shape[0] if self.x.shape[1] == 300 and self.update is not None else None

    @property
    def least(self) -> tuple[tuple[float, float], ...]:
        elements, moved = self.x.numel(), self.x.numel() * self.x.element_size()
        forward, backward = (4, 5) if self.update is not None else (2, 4)  # arrays read and written
        return (8 * elements, forward * moved), (14 * elements, backward * moved)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return tuple(x for x in (self.x, self.update, self.weight, self.bias) if x is not None)

    def arguments(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """x, update, weight and bias from tensors as ``inputs``."""
        return leaves if self.update is not None else (leaves[0], None, *leaves[1:])


def case_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ResidualCase:
    """ROWSxWIDTH, with :norm where nothing is added. Or a name of NAMED.

    Raises:
        ConfigError: no such size.
    """
    shape = re.fullmatch(r"([1-9]\d{0,7})x([1-9]\d{0,4})(:norm)?", NAMED.get(name, name))
    if not shape:
        raise ConfigError(f"size {name!r} is unknown; rows x width, such as 754x300, perhaps with :norm; or one of "
                          f"{', '.join(NAMED)}")
    rows, width = int(shape[1]), int(shape[2])
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * scale).to(device, dtype)

    x, update, grad_total, grad_normed = (normal(rows, width) for _ in range(4))
    what = f"{rows:,} rows of {width:,}{', nothing added' if shape[3] else f', dropout {DROPOUT}'}"
    weight, bias = 1 + normal(width, scale=0.1), normal(width, scale=0.1)
    return ResidualCase(name, what, x, None if shape[3] else update, weight, bias, grad_total, grad_normed)


def truth(case: ResidualCase) -> Truth:
    """Results and gradients without dropout in float64; limits by how far the same in the case's dtype is off."""
    names = ["total", "normed", "grad_x", *(["grad_update"] if case.update is not None else []), "grad_weight", "grad_bias"]
    return Truth.of(names, _results(case, torch.float64), _results(case, case.x.dtype))


def _results(case: ResidualCase, dtype: torch.dtype) -> list[Tensor]:
    leaves = tuple(x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs)
    out = reference.residual_norm(*case.arguments(leaves))
    grads = torch.autograd.grad(out, leaves, (case.grad_total.to(dtype), case.grad_normed.to(dtype)))
    return [*(x.detach() for x in out), *grads]
