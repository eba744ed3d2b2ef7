"""The inputs of the linear benchmarks: rows and weights in the shapes of a model's layers, and their products in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Case, Truth
from case_fast.errors import ConfigError
from case_fast.ops import reference

NAMED = {  # of a real batch of 16 dialogues: layers of its encoders and graphs, and the vocabulary's scores
    "projection": "750x300:300", "query-key-value": "2400x300:300+300+300", "wide": "2400x300:600:gelu", "narrow": "2400x600:300",
    "vocabulary": "250x300:8531",
}
MEDIUM = "@medium"  # behind a size: torch is told that factors may be bfloat16
SIZES = [*NAMED, *(f"{rows}x300:300" for rows in (16, 32, 250, 570, 1400, 2400)), "16x300:900", "250x300:300+300+300",
         "250x900:300", "670x300:600:relu", "570x300:300:tanh", *(name + MEDIUM for name in (*NAMED, "16x300:300"))]
QUICK_SIZES = ["30x20:10", "16x40:9+5:gelu", "30x20:10" + MEDIUM]
AXIS = "rows, 300 x 300"
_SHAPE = re.compile(r"([1-9]\d{0,6})x([1-9]\d{0,4}):([1-9]\d{0,5}(?:\+[1-9]\d{0,5})*)(?::(relu|gelu|tanh))?")


@dataclass(frozen=True)
class LinearCase(Case):
    """x (n, K), weights (N_s, K) each, bias of all their outputs where there is an activation, grad_out (n, sum of N_s).
    precision: of the products, as `torch.set_float32_matmul_precision` names it."""

    x: Tensor
    weights: tuple[Tensor, ...]
    bias: Tensor | None
    activation: str | None
    grad_out: Tensor
    precision: str = "highest"

    @property
    def shape(self) -> dict[str, int]:
        return {"n": self.x.shape[0], "K": self.x.shape[1], "N": self.grad_out.shape[1], "weights": len(self.weights)}

    @property
    def size(self) -> int | None:
        square = self.x.shape[1] == self.grad_out.shape[1] == 300
        return self.x.shape[0] if square and self.activation is None and self.precision == "highest" else None

    @property
    def least(self) -> tuple[tuple[float, float], ...]:
        (rows, depth), outputs = self.x.shape, self.grad_out.shape[1]
        products, element = 2 * rows * depth * outputs, self.x.element_size()
        read = element * (rows * depth + outputs * depth + rows * outputs)
        return (products, read), (2 * products, 2 * read - element * rows * outputs)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.x, *self.weights, *([] if self.bias is None else [self.bias])

    def parts(self, *leaves: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Of `inputs`: x, weights and bias."""
        x, *others = leaves
        count = len(self.weights)
        return x, others[:count], others[count] if others[count:] else None


def case_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LinearCase:
    """ROWSxDEPTH:OUTPUTS, outputs of several weights joined by +; with :relu, :gelu or :tanh, and then a bias. Or a name of
    NAMED. With MEDIUM behind it products may round their factors to bfloat16.

    Raises:
        ConfigError: no such size.
    """
    size, medium = name.removesuffix(MEDIUM), name.endswith(MEDIUM)
    shape = _SHAPE.fullmatch(NAMED.get(size, size))
    if not shape:
        raise ConfigError(f"size {name!r} is unknown; rows x depth : outputs, such as 750x300:300 or 750x300:300+300, perhaps "
                          f"with :relu, :gelu or :tanh; or one of {', '.join(NAMED)}; perhaps with '{MEDIUM}' behind it")
    rows, depth = int(shape[1]), int(shape[2])
    outputs = [int(n) for n in shape[3].split("+")]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    x, weights = normal(rows, depth), tuple(normal(n, depth, scale=depth**-0.5) for n in outputs)
    bias = normal(sum(outputs)) if shape[4] else None
    what = f"{rows:,} rows, {depth:,} to {' + '.join(f'{n:,}' for n in outputs)}"
    what += f", bias and {shape[4]}" if shape[4] else ""
    what += ", products of bfloat16" if medium else ""
    return LinearCase(name, what, x, weights, bias, shape[4], normal(rows, sum(outputs)), "medium" if medium else "highest")


def truth(case: LinearCase) -> Truth:
    """Products and gradients in float64; limits by how far the same in the case's dtype, or its factors', is off."""
    names = ["out", "grad_x", *(f"grad_weight_{place}" for place in range(len(case.weights)))]
    names += [] if case.bias is None else ["grad_bias"]
    of_factors = case.x.dtype if case.precision == "highest" else torch.bfloat16
    return Truth.of(names, _results(case, torch.float64), [x.to(case.x.dtype) for x in _results(case, of_factors)])


def _results(case: LinearCase, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs]
    out = reference.linear(*case.parts(*leaves), case.activation)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.to(dtype))]
