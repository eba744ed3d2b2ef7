"""Every way to multiply rows with weights that we measure ourselves against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.linear.cases import LinearCase
from benchmarks.measure import MODES, OURS, Unfit, Work, Yardstick
from case_fast import ops
from case_fast.ops import reference
from case_fast.training.process import matmul_precision

_ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


def _work(case: LinearCase, function: Callable[..., Tensor], compiled: bool = False, **more: object) -> Work:
    function = torch.compile(function, dynamic=False) if compiled else function
    told = partial(matmul_precision, case.precision)
    return Work(lambda *leaves: function(*case.parts(*leaves)), case.inputs, case.grad_out, switch=told, **more)


def ours(case: LinearCase) -> Work:
    return _work(case, lambda x, weights, bias: ops.linear(x, weights, bias, case.activation))


def joined(case: LinearCase, compiled: bool = False) -> Work:
    """One product, of the weights end to end."""
    return _work(case, lambda x, weights, bias: reference.linear(x, weights, bias, case.activation), compiled)


def each(case: LinearCase, compiled: bool = False) -> Work:
    """A product a weight, as layers of several projections are usually written."""
    if len(case.weights) == 1:
        raise Unfit("is the same with one weight")
    widths, after = [len(w) for w in case.weights], _ACTIVATIONS[case.activation]

    def products(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
        biases = [None] * len(weights) if bias is None else bias.split(widths)
        return torch.cat([after(F.linear(x, w, b)) for w, b in zip(weights, biases, strict=True)], 1)

    return _work(case, products, compiled)


def in_bfloat16(case: LinearCase) -> Work:
    """Inputs cast to bfloat16 and the result back: torch's own way to oneDNN's products of such numbers. Its "medium" leads to
    oneDNN too, which rounds nothing there on a CPU without AMX."""
    if case.precision != "medium":
        raise Unfit("rounds what this case does not let round")

    def product(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
        halves = [y if y is None else y.bfloat16() for y in (x, *weights, bias)]
        return reference.linear(halves[0], halves[1:-1], halves[-1], case.activation).float()

    return _work(case, product)


def onednn(case: LinearCase) -> Work:
    """oneDNN, which torch calls for compiled inference: forward alone. Its own activations."""
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if op is None or case.x.device.type != "cpu":
        raise Unfit("oneDNN is not in this torch, or not for this device")
    name, algorithm = (case.activation or "none"), "none" if case.activation == "gelu" else ""

    def product(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        return op(x, whole, bias, name, [], algorithm)

    return _work(case, product, trains=False, note="has no gradient")


def products(case: LinearCase) -> Yardstick:
    """The products alone, by torch's library: one forward, two backward."""
    x, whole, out = case.x, torch.cat(case.weights), torch.empty_like(case.grad_out)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(whole)

    def forward() -> None:
        torch.mm(x, whole.T, out=out)

    def both() -> None:
        forward()
        torch.mm(case.grad_out, whole, out=grad_x)
        torch.mm(case.grad_out.T, x, out=grad_weight)

    return Yardstick(dict(zip(MODES, (forward, both), strict=True)))


PEERS: dict[str, Callable[[LinearCase], Work | Yardstick]] = {
    OURS: ours,
    "F.linear, eager": joined,
    "F.linear, torch.compile": lambda case: joined(case, compiled=True),
    "F.linear of each weight, eager": each,
    "F.linear of each weight, torch.compile": lambda case: each(case, compiled=True),
    "F.linear in bfloat16, eager": in_bfloat16,
    "oneDNN _linear_pointwise, eager": onednn,
    "three bare matrix products (1 forward)": products,
}
