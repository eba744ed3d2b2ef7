"""What a layer adds to its rows, with dropout, and the layer norm that follows, with gradients, on CPU and GPU.

The equations in plain torch are `residual_norm` and `residual` of `case_fast.ops.reference`: the oracle of the tests, and what
runs where there is no kernel. The registered ops `case_fast::residual_norm_forward` and `_backward` call the kernels, as does
`case_fast::residual_norm_drop`, which is `residual` and its own gradient; autograd stands outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from case_fast.ops import backend, common, reference, transforms

FAMILY = "residual_norm"
MAX_WIDTH = 1024  # of a row on GPU, where one program holds it


@common.public
def residual_norm(x: Tensor, update: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5,
                  dropout_p: float = 0.0, seed: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """total = x + dropout(update), normed = layer_norm(total) * weight + bias.

    Replaces ``total = x + F.dropout(update, dropout_p)``, ``normed = F.layer_norm(total, (d,), weight, bias, eps)``: the end of
    one layer and the beginning of the next in one pass over the rows. Neither a mask nor the normalised rows are kept.

    Args:
        x: (n, d), d above 0. float32 and float64; float16 and bfloat16 are computed in float32. Any strides. On GPU rows of
            d > 1024 run on the reference backend.
        update: (n, d) as x, or None: nothing is added, and total is x.
        weight, bias: (d,) as x; for half precision on GPU also float32. None stands for ones and for zeros.
        eps: of the layer norm.
        dropout_p, seed: probability in [0, 1) that an element of update is dropped, rounded down to a multiple of 2^-16; the
            others are divided by 1 - p. Which ones is a function of (seed, row, column) alone, the same on every backend
            (`case_fast.ops.reference.residual_keep`). seed: in [0, 2^63), or an int64 tensor of one element on the device of x,
            whose value, modulo 2^63, is read when the kernels run.

    Returns:
        total and normed, (n, d) each, in the dtype of x. Under autocast: in autocast's dtype on GPU, in float32 on CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call.

    Deterministic: equal inputs give equal bits, forward and backward, whatever the number of threads; a row's bits depend on no
    other row. No second derivative but on the reference backend.
    """
    device, given = common.device_type(x), x.dtype
    compute, differs = common.compute_dtype(x)
    if differs:
        x, update = common.cast(compute, x, update)
        if device == "cpu":
            weight, bias = common.cast(compute, weight, bias)
    _check(x, update)
    weight = x.new_ones(x.shape[1:]) if weight is None else weight
    bias = x.new_zeros(x.shape[1:]) if bias is None else bias
    for name, of in (("weight", weight), ("bias", bias)):
        if of.shape != x.shape[1:] or of.dtype != x.dtype or of.device != x.device:  # asked here too: before every call
            _check_norm(name, of, x)
    eps, dropout_p = common.finite("eps", eps), common.probability("dropout_p", dropout_p)
    numbers = (eps, dropout_p if update is not None else 0.0, *common.seed_pair(seed, x.device))
    runs = backend.choose(FAMILY, device, _beyond(x, device))
    if runs == "reference":
        with torch.autocast(device, enabled=False):
            total, normed = reference.residual_norm(x, update, weight, bias, *numbers[:2],
                                                    reference.seed_of(*numbers[2:]))
    elif torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or bias.requires_grad or (update is not None and update.requires_grad)
    ):
        total, normed = _ResidualNorm.apply(runs, x, update, weight, bias, *numbers)
    else:
        total, normed, _ = common.call(_forward_op, _forward, runs, x, update, weight, bias, *numbers)
        total = x if update is None else total
    return common.restored(total, given), common.restored(normed, given)


@common.public
def residual(x: Tensor, update: Tensor, dropout_p: float = 0.0, seed: int | Tensor = 0) -> Tensor:
    """(n, d): x + dropout(update), where no norm follows; see `residual_norm`. Differentiable any number of times."""
    device, given = common.device_type(x), x.dtype
    compute, differs = common.compute_dtype(x)
    if differs:
        x, update = common.cast(compute, x, update)
    _check(x, update)
    dropout_p = common.probability("dropout_p", dropout_p)
    number, seed_at = common.seed_pair(seed, x.device)
    if dropout_p == 0:
        return common.restored(x + update, given)
    runs = backend.choose(FAMILY, device, _beyond(x, device))
    if runs == "reference":
        return common.restored(reference.residual(x, update, dropout_p, reference.seed_of(number, seed_at)), given)
    return common.restored(_dropped(runs, update, x, dropout_p, number, seed_at), given)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(x: Tensor, update: Tensor | None) -> None:
    common.check_dtype("x", x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be (n, d) with d above 0, not {tuple(x.shape)}")
    if update is not None:
        common.check_like("update", update, x.dtype, x.device, "x")
        if update.shape != x.shape:
            raise ValueError(f"update must be {tuple(x.shape)} as x, not {tuple(update.shape)}")


def _beyond(x: Tensor, device: str) -> str:
    return f"rows of more than {MAX_WIDTH}" if device != "cpu" and x.shape[1] > MAX_WIDTH else ""


def _check_norm(name: str, x: Tensor, like: Tensor) -> None:
    """Of weight or bias, as like."""
    if x.shape != like.shape[1:]:
        raise ValueError(f"{name} must be (d,) = ({like.shape[1]},) as x, not {tuple(x.shape)}")
    half = like.dtype in common.HALF and x.dtype == torch.float32
    common.check_like(name, x, x.dtype if half else like.dtype, like.device, "x")


# ------------------------------------------------------------------------------------------------------------ registered ops


def _outputs(x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised total, which is empty where nothing is added, normed and stats, for x that is contiguous."""
    total = x.new_empty(0) if update is None else torch.empty_like(x)
    return total, torch.empty_like(x), x.new_empty((2, x.shape[0]), dtype=common.sum_dtype(x))


def _forward(runs: str, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: int,
             seed_at: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x, update, weight, bias = common.contiguous(x, update, weight, bias)
    out = _outputs(x, update)
    if runs == "triton":
        from case_fast.ops import residual_norm_triton as triton

        triton.forward(x, update, weight, bias, eps, dropout_p, seed, seed_at, *out)
    else:
        total, normed, stats = out
        total = None if update is None else total
        _run("forward", x, (eps, dropout_p, seed, seed_at), (x, update, weight, bias, total, normed, stats))
    return out


def _gradients(total: Tensor, weight: Tensor, dropout_p: float) -> list[Tensor]:
    """Uninitialised gradients of x, with dropout of update, else that is the same, of weight and of bias; all contiguous."""
    return [torch.empty_like(x) for x in ([total, total] if dropout_p > 0 else [total]) + [weight, weight]]


def _backward(runs: str, grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, stats: Tensor, weight: Tensor,
              dropout_p: float, seed: int, seed_at: Tensor | None) -> list[Tensor]:
    inputs = common.contiguous(total, stats, weight, grad_total, grad_normed)
    found = _gradients(inputs[0], inputs[2], dropout_p)
    grads = found if dropout_p > 0 else [found[0], None, *found[1:]]
    if runs == "triton":
        from case_fast.ops import residual_norm_triton as triton

        triton.backward(*inputs, dropout_p, seed, seed_at, *grads)
    else:
        _run("backward", total, (0.0, dropout_p, seed, seed_at), (*inputs, *grads))
    return found


def _drop(runs: str, update: Tensor, base: Tensor | None, dropout_p: float, seed: int, seed_at: Tensor | None) -> Tensor:
    update, base = common.contiguous(update, base)
    out = torch.empty_like(update)
    if runs == "triton":
        from case_fast.ops import residual_norm_triton as triton

        triton.drop(update, base, dropout_p, seed, seed_at, out)
    else:
        _run("drop", update, (0.0, dropout_p, seed, seed_at), (update, base, out))
    return out


def _run(name: str, like: Tensor, numbers: tuple, arguments: tuple[Tensor | None, ...]) -> None:
    """Runs the native kernel. numbers: eps to seed_at."""
    *numbers, seed_at = numbers
    call = (*like.shape, common.DTYPES[like.dtype], *numbers, 0 if seed_at is None else seed_at.data_ptr())
    status = common.run_native(f"{FAMILY}_{name}", like, call, common.pointers(*arguments))
    if status:
        common.refuse(FAMILY, status)


_DRAWS = "float dropout_p, SymInt seed, Tensor? seed_at"  # SymInt: a new seed does not compile again
# total, which is empty where nothing is added, normed and stats (2, n): mean and 1 / standard deviation of each row of total, in
# the dtype of sums.
_forward_op = common.register(
    f"{FAMILY}_forward(str backend, Tensor x, Tensor? update, Tensor weight, Tensor bias, float eps, {_DRAWS}) -> "
    "(Tensor, Tensor, Tensor)", _forward, lambda runs, x, update, *rest: _outputs(x.contiguous(), update),
)
# Gradients of x, of update where dropout_p > 0, of weight and of bias.
_backward_op = common.register(
    f"{FAMILY}_backward(str backend, Tensor? grad_total, Tensor grad_normed, Tensor total, Tensor stats, Tensor weight, {_DRAWS})"
    " -> Tensor[]", _backward,
    lambda runs, grad_total, grad_normed, total, stats, weight, dropout_p, *rest: _gradients(
        total.contiguous(), weight.contiguous(), dropout_p),
)
# base + dropout(update); without a base the gradient of update.
_drop_op = common.register(
    f"{FAMILY}_drop(str backend, Tensor update, Tensor? base, {_DRAWS}) -> Tensor", _drop,
    lambda runs, update, *rest: torch.empty_like(update, memory_format=torch.contiguous_format),
)


# --------------------------------------------------------------------------------------------------------------- autograd


class _ResidualNorm(torch.autograd.Function):
    """Keeps total, which goes on as the residual stream, and two numbers a row; draws again what was dropped."""

    @staticmethod
    def forward(ctx, runs, x, update, weight, bias, eps, dropout_p, seed, seed_at):
        given = (x, update, weight, bias, eps, dropout_p, seed, seed_at)
        total, normed, stats = common.call(_forward_op, _forward, runs, *given)
        if update is None:
            total = x.view_as(x)
        ctx.save_for_backward(total, stats, weight, seed_at)
        ctx.set_materialize_grads(False)
        ctx.runs, ctx.updates, ctx.numbers = runs, update is not None, (dropout_p, seed)
        return total, normed

    @staticmethod
    def backward(ctx, grad_total, grad_normed):
        runs, numbers, saved = ctx.runs, ctx.numbers, ctx.saved_tensors
        weight = bias = None
        if grad_normed is None:  # of the residual stream alone, and of nothing where grad_total is None too
            x = update = grad_total
            if grad_total is not None and numbers[0] > 0:
                update = _dropped(runs, grad_total, None, *numbers, saved[-1])
        else:
            def backward(*tensors):
                return common.call(_backward_op, _backward, runs, *tensors[:-1], *numbers, tensors[-1])

            x, *update, weight, bias = common.gradients(FAMILY, backward, (grad_total, grad_normed, *saved))
            update = update[0] if update else x
        return None, x, update if ctx.updates else None, weight, bias, None, None, None, None


def _dropped(runs: str, update: Tensor, base: Tensor | None, dropout_p: float, seed: int, seed_at: Tensor | None) -> Tensor:
    if transforms.beyond_kernels():
        base = torch.zeros_like(update) if base is None else base
        return reference.residual(base, update, dropout_p, reference.seed_of(seed, seed_at))
    if torch.is_grad_enabled() and (update.requires_grad or (base is not None and base.requires_grad)):
        return _Dropped.apply(runs, update, base, dropout_p, seed, seed_at)
    return common.call(_drop_op, _drop, runs, update, base, dropout_p, seed, seed_at)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, runs, update, base, dropout_p, seed, seed_at):
        ctx.save_for_backward(seed_at)
        ctx.runs, ctx.adds, ctx.numbers = runs, base is not None, (dropout_p, seed)
        return common.call(_drop_op, _drop, runs, update, base, dropout_p, seed, seed_at)

    @staticmethod
    def backward(ctx, grad_out):
        grad = _dropped(ctx.runs, grad_out, None, *ctx.numbers, *ctx.saved_tensors)
        return None, grad, grad_out if ctx.adds else None, None, None, None
