"""What a layer adds to its rows, with dropout, and the layer norm that follows, with gradients, on CPU and GPU.

The equations in plain torch are `residual_norm` and `residual` of `case_fast.ops.reference`: the oracle of the tests, and what
runs where there is no kernel. The registered ops `case_fast::residual_norm_forward` and `_backward` call the kernels, as does
`case_fast::residual_norm_drop`, which is `residual` and its own gradient; autograd stands outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from case_fast.ops import backend, common, reference

FAMILY = "residual_norm"


def residual_norm(x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, dropout_p: float = 0.0,
                  seed: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """total = x + dropout(update), normed = layer_norm(total) * weight + bias.

    Replaces ``total = x + F.dropout(update, dropout_p)``, ``normed = F.layer_norm(total, (d,), weight, bias, eps)``: the end of
    one layer and the beginning of the next in one pass over the rows. Neither a mask nor the normalised rows are kept.

    Args:
        x: (n, d), d above 0. float32 and float64; float16 and bfloat16 are computed in float32. Any strides.
        update: (n, d) as x, or None: nothing is added, and total is x.
        weight, bias: (d,) as x; for half precision on GPU also float32.
        eps: of the layer norm.
        dropout_p, seed: probability in [0, 1) that an element of update is dropped; the others are divided by 1 - p. Which ones
            is a function of (seed, row, column) alone, the same on every backend. seed: in [0, 2^63), or an int64 tensor of one
            element on the device of x, whose value, modulo 2^63, is read when the kernels run.

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
    _check(x, update, dropout_p)
    for name, of in (("weight", weight), ("bias", bias)):
        if of.shape != x.shape[1:] or of.dtype != x.dtype or of.device != x.device:  # asked here too: before every call
            _check_norm(name, of, x)
    common.check_finite("eps", eps)
    common.seed_pair(seed, x.device)
    backend.choose(FAMILY, device)
    with torch.autocast(device, enabled=False):
        total, normed = reference.residual_norm(x, update, weight, bias, eps, dropout_p, seed)
    return common.restored(total, given), common.restored(normed, given)


def residual(x: Tensor, update: Tensor, dropout_p: float = 0.0, seed: int | Tensor = 0) -> Tensor:
    """(n, d): x + dropout(update), where no norm follows; see `residual_norm`. Differentiable any number of times."""
    device, given = common.device_type(x), x.dtype
    compute, differs = common.compute_dtype(x)
    if differs:
        x, update = common.cast(compute, x, update)
    _check(x, update, dropout_p)
    common.seed_pair(seed, x.device)
    if dropout_p == 0:
        return common.restored(x + update, given)
    backend.choose(FAMILY, device)
    return common.restored(reference.residual(x, update, dropout_p, seed), given)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(x: Tensor, update: Tensor | None, dropout_p: float) -> None:
    common.check_dtype("x", x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be (n, d) with d above 0, not {tuple(x.shape)}")
    if update is not None:
        common.check_like("update", update, x.dtype, x.device, "x")
        if update.shape != x.shape:
            raise ValueError(f"update must be {tuple(x.shape)} as x, not {tuple(update.shape)}")
    common.check_dropout("dropout_p", dropout_p)


def _check_norm(name: str, x: Tensor, like: Tensor) -> None:
    """Of weight or bias, as like."""
    if x.shape != like.shape[1:]:
        raise ValueError(f"{name} must be (d,) = ({like.shape[1]},) as x, not {tuple(x.shape)}")
    half = like.dtype in common.HALF and x.dtype == torch.float32
    common.check_like(name, x, x.dtype if half else like.dtype, like.device, "x")
