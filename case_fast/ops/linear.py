"""Products of rows with weights, with bias and activation, and their gradients.

The equation in plain torch is `case_fast.ops.reference.linear`: the oracle of the tests, and what runs where there is no kernel.
It is also what runs on every GPU, whose own library of products is the best there is: there is no kernel of ours for any. The
registered ops `case_fast::linear_forward` and `_backward` call the kernels of the CPU; autograd stands outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from case_fast.arguments import truth
from case_fast.ops import backend, common, reference
from case_fast.ops.reference import ACTIVATIONS

FAMILY = "linear"


@common.public
def linear(x: Tensor, weight: Tensor | Sequence[Tensor], bias: Tensor | None = None, activation: str | None = None,
           split: bool = False) -> Tensor | tuple[Tensor, ...]:
    """y = f(x W^T + b); y_ig = f(W_g x_ig + b_g) where there are groups.

    Replaces ``F.relu(F.linear(x, weight, bias))`` and its like, and with several weights
    ``F.linear(x, torch.cat(weight), bias)``: the queries, keys and values of one input are one product.

    Args:
        x: (n, K); or with groups (n, G, K). float32 and float64; float16 and bfloat16 are computed in float32 on CPU. Any
            strides; elements of a row that lie together are read where they lie.
        weight: (N, K), or several of them, whose outputs lie end to end; with groups (G, N, K) each, such as the heads of one
            matrix. Any strides: a transposed view is not copied, and its gradient has its strides.
        bias: of all outputs, (N,), with groups (G, N); or None.
        activation: f: "relu", "gelu" (exact: z Phi(z)) or "tanh", or None.
        split: a result for each weight, in place of all end to end: without f each lies by itself, and neither they nor their
            gradients are ever copied together or apart.

    Returns:
        (n, N) or (n, G, N), contiguous, in the dtype of x; under autocast on CPU float32 for half precision. With ``split`` a
        tuple of these, whose N are those of the weights; contiguous without f.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; the message names it.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call on CPU.

    On CPU `torch.set_float32_matmul_precision("medium")` lets products of float32 round their factors to bfloat16, where the
    processor multiplies such numbers (AVX512_BF16); sums stay float32. It is asked for at each call, forward and backward.

    Deterministic on CPU: equal inputs give equal bits, forward and backward, whatever the number of threads, and a row's result
    and gradient do not depend on the other rows. On a GPU what torch's products give. No second derivative but on the reference
    backend.
    """
    weights, split = [weight] if isinstance(weight, Tensor) else list(weight), truth("split", split)
    if not x.is_cpu:
        _check(x, weights, bias, activation)
        return _parts(reference.linear(x, weights, bias, activation), weights, split)
    compute, differs = common.compute_dtype(x)
    given = x.dtype
    if differs:
        x, bias, *weights = common.cast(compute, x, bias, *weights)
    _check(x, weights, bias, activation)
    runs = backend.choose(FAMILY, "cpu")
    apart = split and activation is None and len(weights) > 1  # what is kept for f' lies end to end
    if runs == "reference":
        with torch.autocast("cpu", enabled=False):
            out = reference.linear(x, weights, bias, activation)
        apart = False
    elif torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad) or any([w.requires_grad for w in weights])
    ):
        out = _Linear.apply(runs, activation, apart, x, bias, *weights)
    else:
        found = common.call(_forward_op, _forward, runs, x, weights, bias, activation, False, apart)
        out = tuple(found) if apart else found[0]
    if differs:
        out = tuple([common.restored(y, given) for y in out]) if apart else common.restored(out, given)
    return out if apart else _parts(out, weights, split)


def _parts(y: Tensor, weights: list[Tensor], split: bool) -> Tensor | tuple[Tensor, ...]:
    return y.split([w.shape[-2] for w in weights], -1) if split else y


def _check(x: Tensor, weights: list[Tensor], bias: Tensor | None, activation: str | None) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    dtype, device, shape = x.dtype, x.device, x.shape
    common.check_dtype("x", x)
    dimensions = len(shape)
    if dimensions not in (2, 3):
        raise ValueError(f"x must be (n, K), or with groups (n, G, K), not {tuple(shape)}")
    if not weights:
        raise ValueError("weight must be a tensor or several, not none")
    depth, outputs = shape[-1], 0
    for place, w in enumerate(weights):
        found = w.shape
        differs = len(found) != dimensions or found[-1] != depth or (dimensions == 3 and found[0] != shape[1])
        if differs or w.dtype != dtype or w.device != device:
            name = "weight" if len(weights) == 1 else f"weight[{place}]"
            common.check_like(name, w, dtype, device, "x")
            wanted = ", ".join([*map(str, shape[1:-1]), "N", str(depth)])
            raise ValueError(f"{name} must be ({wanted}) as x, not {tuple(found)}")
        outputs += found[-2]
    if bias is not None:
        common.check_like("bias", bias, dtype, device, "x")
        if bias.shape != (*shape[1:-1], outputs):
            raise ValueError(f"bias must be {(*shape[1:-1], outputs)} as the outputs of weight, not {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be {', '.join(str(name) for name in ACTIVATIONS)}, not {activation!r}")


# ------------------------------------------------------------------------------------------------------------ registered ops


def _outputs(x: Tensor, weights: list[Tensor], activation: str | None, keep: bool, apart: bool) -> list[Tensor]:
    """Uninitialised y, whole or of each weight; and to keep for the Gaussian unit's gradient, what it is applied to."""
    of = x.shape[:-1]
    if apart:
        return [x.new_empty(*of, w.shape[-2]) for w in weights]
    y = x.new_empty(*of, _width(weights))
    return [y, torch.empty_like(y)] if keep and activation == "gelu" else [y]


def _width(weights: list[Tensor]) -> int:
    """Outputs of all."""
    return weights[0].shape[-2] if len(weights) == 1 else sum([w.shape[-2] for w in weights])


def _gradients(x: Tensor, weights: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """Uninitialised gradients of x, bias and weights; None where not wanted."""
    of_x, of_bias, *of_weights = wanted
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else None,
        x.new_empty(*x.shape[1:-1], _width(weights)) if of_bias else None,
        *[_gradient(w) if wants else None for w, wants in zip(weights, of_weights, strict=True)],
    ]


def _gradient(weight: Tensor) -> Tensor:
    """Uninitialised, with the strides of a weight whose rows or columns are dense."""
    dense = weight.is_contiguous() or 1 in weight.stride()[-2:]
    return torch.empty_like(weight) if dense else weight.new_empty(weight.shape)


def _rows(x: Tensor) -> Tensor:
    """x, or a copy, whose rows are dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _run(direction: str, x: Tensor, weights: list[Tensor], grads: Sequence[Tensor | None], results: Sequence[Tensor],
         activation: str | None, *others: Tensor | None) -> None:
    """Runs the native kernel. results: y or grad_y, whole or of each weight; others: what its arguments are beside these."""
    shape, strides, y = x.shape, x.stride(), results[0]
    grouped, element = len(shape) == 3, x.itemsize
    call = (  # struct case_fast_linear
        shape[0], shape[1] if grouped else 1, shape[-1], strides[0], strides[-2], len(weights), common.DTYPES[x.dtype],
        ACTIVATIONS.index(activation), common.bf16_products(),
    )
    sources, at, of_y = [], y.data_ptr(), y.stride()
    for place, w in enumerate(weights):  # struct case_fast_linear_weight
        if place > 0 and len(results) > 1:
            at, of_y = results[place].data_ptr(), results[place].stride()
        outputs, of_w, grad = w.shape[-2], w.stride(), _NOTHING
        if grads and grads[place] is not None:
            of_grad = grads[place].stride()
            grad = (grads[place].data_ptr(), of_grad[0] if grouped else 0, of_grad[-2], of_grad[-1])
        sources.append((outputs, of_w[0] if grouped else 0, of_w[-2], of_w[-1], w.data_ptr(), *grad, at, of_y[0], of_y[-2]))
        at += outputs * element
    status = getattr(backend.native, direction)(call, sources, *common.pointers(x, *others), torch.get_num_threads())
    if status:
        common.refuse(FAMILY, status)


_NOTHING = (0, 0, 0, 0)


def _forward(runs: str, x: Tensor, weights: list[Tensor], bias: Tensor | None, activation: str | None, keep: bool, apart: bool
             ) -> list[Tensor]:
    bias = None if bias is None else bias.contiguous()
    found = _outputs(x, weights, activation, keep, apart)
    results, z = (found, None) if apart else (found[:1], found[1] if len(found) > 1 else None)
    _run("linear_forward", _rows(x), weights, (), results, activation, bias, z)
    return found


def _backward(runs: str, grad_y: list[Tensor], x: Tensor, weights: list[Tensor], kept: Tensor | None, activation: str | None,
              wanted: list[bool]) -> list[Tensor]:
    grad_x, grad_bias, *grads = found = _gradients(x, weights, wanted)
    _run("linear_backward", _rows(x), weights, grads, [_rows(g) for g in grad_y], activation, kept, grad_x, grad_bias)
    return [gradient for gradient in found if gradient is not None]


_INPUTS = "Tensor x, Tensor[] weights"
# y, whole or of each weight; where it is to be kept, what the Gaussian unit is applied to
_forward_op = common.register(
    f"{FAMILY}_forward(str backend, {_INPUTS}, Tensor? bias, str? activation, bool keep, bool apart) -> Tensor[]", _forward,
    lambda runs, x, weights, bias, activation, keep, apart: _outputs(x, weights, activation, keep, apart),
)
# Gradients of those of x, bias and each weight that are wanted. kept: y where f is relu or tanh, what f is applied to where it is
# gelu, else None.
_backward_op = common.register(
    f"{FAMILY}_backward(str backend, Tensor[] grad_y, {_INPUTS}, Tensor? kept, str? activation, bool[] wanted) -> Tensor[]",
    _backward,
    lambda runs, grad_y, x, weights, kept, activation, wanted: [
        gradient for gradient in _gradients(x, weights, wanted) if gradient is not None
    ],
)


# --------------------------------------------------------------------------------------------------------------- autograd


class _Linear(torch.autograd.Function):
    """Keeps the inputs, and y, or what the Gaussian unit was applied to."""

    @staticmethod
    def forward(ctx, runs, activation, apart, x, bias, *weights):
        found = common.call(_forward_op, _forward, runs, x, [*weights], bias, activation, True, apart)
        ctx.save_for_backward(x, None if activation is None else found[-1], *weights)  # z is behind y
        ctx.runs, ctx.activation = runs, activation
        return tuple(found) if apart else found[0]

    @staticmethod
    def backward(ctx, *grad_y):
        wanted, results = list(ctx.needs_input_grad[3:]), len(grad_y)

        def call(*tensors):
            x, kept, *weights = tensors[results:]
            return common.call(
                _backward_op, _backward, ctx.runs, [*tensors[:results]], x, weights, kept, ctx.activation, wanted
            )

        found = common.gradients(FAMILY, call, (*grad_y, *ctx.saved_tensors))
        if len(found) < len(wanted):
            given = iter(found)
            found = [next(given) if w else None for w in wanted]
        return None, None, None, *found
