"""Mutual information maximisation over a score matrix that is never stored (Eq. 9-12), with gradients, on CPU and GPU.

The equation in plain torch is `case_fast.equations.mim_sides`: the oracle of the tests, and what runs where there is no
kernel. The registered ops `case_fast::bilinear_mim_forward` and `_backward` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from case_fast import equations
from case_fast.equations import SCORES
from case_fast.ops import backend, common
from case_fast.ops.common import pointer

FAMILY = "bilinear_mim"
PLAN_AUTO = 0  # enum case_fast_mim_plan
MOST_ROWS = 2**31  # a draw is a 32-bit word times the number of rows, in 64 bits


def bilinear_mim(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None = None, num_negatives: int | None = None,
                 seed: int = 0, reduction: str = "mean", score: str = "bilinear_sigmoid", validate: bool | None = None,
                 deterministic: bool = True) -> Tensor:
    """loss_p = -2 S[p, c] + log sum_q exp S[p, q] + log( exp S[p, c] + sum_{p': positive[p'] != c} exp S[p', c] )

    with c = positive[p] (CASE, Eq. 9-12, negated). Replaces, with S = sigmoid(x @ W @ y.T), own = positive[:, None] == arange(Q),
    ``S.exp().sum(1).log() + (S.exp().masked_fill(own, 0).sum(0)[positive] + paired.exp()).log() - 2 * paired`` with
    ``paired = S[arange(P), positive]``, by O((P + Q) d) memory: no (P, Q) matrix is kept, backward computes S again in tiles.
    The positive is part of both sums; without any other row the loss and its gradient are exactly 0. A NaN in a row shows in
    every loss whose sums hold that row.

    Args:
        x: (P, d), y: (Q, d), one dtype and device. float32 and float64; float16 and bfloat16 are accumulated in float32 on
            GPU, and computed in float32 on CPU. Any strides.
        weight: (d, d), W; None for score "dot".
        positive: (P,) int32 or int64 in [0, Q), the row of y that belongs to x_p; several x may share one. Default: x_p
            and y_p belong together, P == Q.
        num_negatives: each sum holds the positive and so many draws with replacement from its other rows, in place of all of
            them. Which ones is a function of (seed, p, side, draw) alone, the same on every backend
            (`case_fast.equations.draw_negatives`); 0 <= seed < 2^63, to be changed every step.
        reduction: "mean" (0 without pairs), "sum" or "none".
        score: "bilinear_sigmoid", S = sigmoid(x_p^T W y_q); or "dot", S = x_p . y_q, whose sums are taken from their maximum.
        validate: whether the contents of positive are checked. Default: on CPU always, elsewhere never, since reading the
            answer would stop the device's queue. The native CPU kernels always check.
        deterministic: False lets kernels on a GPU add gradients in any order, where that is faster, unless
            `torch.use_deterministic_algorithms` forbids it.

    Returns:
        A scalar, or (P,) for "none"; float64 for float64 inputs, else float32, under autocast too.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range, P != Q without positive, or a weight
            that the score has no use for; the message names the argument.
        IndexError: positive is out of range. All before any kernel runs.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call.

    Deterministic unless asked otherwise: equal inputs give equal bits, forward and backward, whatever the number of threads.
    No second derivative but on the reference backend.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
    side_y, side_x, _ = mim_sides(x, y, weight, positive, num_negatives, seed, score, validate, deterministic)
    return equations.reduced(side_y + side_x, reduction)


def mim_sides(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None = None, num_negatives: int | None = None,
              seed: int = 0, score: str = "bilinear_sigmoid", validate: bool | None = None, deterministic: bool = True
              ) -> tuple[Tensor, Tensor, Tensor]:
    """The two halves of `bilinear_mim`'s loss, log(sum over a set of exp S) - S[p, c] each, whose InfoNCE bounds Eq. 20 gives.

    Arguments and errors: as `bilinear_mim`.

    Returns:
        side_y (P,), over rows of y; side_x (P,), over rows of x; and without gradient x_p^T W y_c (or x_p . y_c), (P,).
    """
    device = x.device.type
    compute, differs = common.compute_dtype(x)
    if differs:
        x, y, weight = common.cast(compute, x, y, weight)
    _check(x, y, weight, positive, num_negatives, score)
    common.check_seed(seed)
    runs = backend.choose(FAMILY, device)
    if validate is None:
        validate = device == "cpu" and not torch.compiler.is_compiling()
    if validate and positive is not None and not (runs == "native" and device == "cpu"):
        _check_contents(positive, y.shape[0])
    if runs == "reference":
        positive = torch.arange(x.shape[0], device=x.device) if positive is None else positive
        with torch.autocast(device, enabled=False):
            side_y, side_x, logit = equations.mim_sides(x, y, weight, positive, num_negatives, seed, score)
        return side_y, side_x, logit.detach()
    numbers = (num_negatives, seed, score, deterministic or torch.are_deterministic_algorithms_enabled())
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or (weight is not None and weight.requires_grad)):
        return _BilinearMIM.apply(runs, x, y, weight, positive, *numbers)
    return common.call(_forward_op, _forward, runs, x, y, weight, positive, *numbers)[:3]


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None, num_negatives: int | None, score: str) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    dtype, device = x.dtype, x.device
    if dtype not in common.DTYPES:
        raise TypeError(f"x must be float32, float64, float16 or bfloat16, not {dtype}")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be (P, d) with d above 0, not {tuple(x.shape)}")
    dim = x.shape[1]
    if score not in SCORES:
        raise ValueError(f"score must be {' or '.join(SCORES)}, not {score!r}")
    if score == "dot" and weight is not None:
        raise ValueError("weight must be None for score dot, which has no use for it")
    if score != "dot" and weight is None:
        raise ValueError(f"weight must be ({dim}, {dim}) for score {score}, not None")
    for name, tensor, shape in (("y", y, None), ("weight", weight, (dim, dim))):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} as x, not {tensor.dtype}")
        if tensor.dim() != 2 or tensor.shape[1] != dim or (shape is not None and tensor.shape[0] != dim):
            raise ValueError(f"{name} must be {'(Q' if shape is None else f'({dim}'}, {dim}) as x, not {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} as x, not on {tensor.device}")
    for name, tensor in (("x", x), ("y", y)):
        if tensor.shape[0] >= MOST_ROWS:
            raise ValueError(f"{name} must have fewer than 2^31 rows, not {tensor.shape[0]}")
    if positive is None:
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"positive must say which rows belong together: x has {x.shape[0]} and y {y.shape[0]}")
    else:
        if positive.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"positive must be int32 or int64, not {positive.dtype}")
        if positive.dim() != 1 or positive.shape[0] != x.shape[0]:
            raise ValueError(f"positive must be (P,) = ({x.shape[0]},) as x, not {tuple(positive.shape)}")
        if positive.device != device:
            raise ValueError(f"positive must be on {device} as x, not on {positive.device}")
        if y.shape[0] == 0 and x.shape[0] > 0:
            raise IndexError("positive names rows of y, which has none")
    if num_negatives is not None:
        if isinstance(num_negatives, bool) or not isinstance(num_negatives, int):
            raise TypeError(f"num_negatives must be a whole number or None, not {num_negatives!r}")
        if not 1 <= num_negatives < MOST_ROWS:
            raise ValueError(f"num_negatives must be in [1, 2^31) or None, not {num_negatives}")


def _check_contents(positive: Tensor, rows: int) -> None:
    """Reads positive, and raises IndexError at the first entry that names no row of y."""
    wrong = ((positive < 0) | (positive >= rows)).nonzero()
    if wrong.numel():
        place = int(wrong[0])
        raise IndexError(f"positive holds {int(positive[place])} at place {place}; it must be in [0, {rows})")


# ------------------------------------------------------------------------------------------------------------ registered ops

_library = torch.library.Library("case_fast", "FRAGMENT")
_INPUTS = "Tensor x, Tensor y, Tensor? weight, Tensor? positive"
_NUMBERS = "int? num_negatives, SymInt seed, str score, bool deterministic"  # SymInt: a new seed does not compile again
# side_y, side_x, logit, (P,) each, and what backward needs beside the inputs: in the dtype of `_full`.
_library.define(f"{FAMILY}_forward(str backend, {_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)")
# Gradients of x and y, and of weight where it is given.
_library.define(f"{FAMILY}_backward(str backend, Tensor grad_side_y, Tensor grad_side_x, {_INPUTS}, Tensor saved, {_NUMBERS}) "
                "-> Tensor[]")
_forward_op = torch.ops.case_fast.bilinear_mim_forward.default
_backward_op = torch.ops.case_fast.bilinear_mim_backward.default


def _full(x: Tensor) -> torch.dtype:
    """Of sums and losses."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _outputs(runs: str, x: Tensor, y: Tensor, weight: Tensor | None, num_negatives: int | None, score: str) -> tuple[Tensor, ...]:
    """Uninitialised side_y, side_x, logit and saved."""
    (pairs, dim), rows = x.shape, y.shape[0]
    if runs == "triton":
        from case_fast.ops.bilinear_mim_triton import saved_elements

        saved = saved_elements(pairs, rows, num_negatives)
    elif isinstance(pairs, int) and isinstance(rows, int) and isinstance(dim, int):
        saved = backend.native.bilinear_mim_saved(_problem(x, y, None, num_negatives, 0, score))
    else:
        saved = _saved_elements(pairs, rows, dim, num_negatives, score)
    return tuple(torch.empty(size, dtype=_full(x), device=x.device) for size in (pairs, pairs, pairs, saved))


def _saved_elements(pairs: int, rows: int, dim: int, num_negatives: int | None, score: str) -> int:
    """What native.bilinear_mim_saved says, for sizes that are still symbols to a compiler."""
    projected = 0 if score == "dot" else torch.sym_min(pairs, rows) * dim
    if num_negatives is None:
        return projected + 3 * pairs + 2 * rows
    return projected + 5 * pairs + (2 * pairs * num_negatives if num_negatives <= dim else 0)


def _gradients(*inputs: Tensor | None) -> list[Tensor]:
    """Uninitialised gradients of the inputs that are there."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]


def _contiguous(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None else x.contiguous() for x in inputs)


def _problem(x: Tensor, y: Tensor, positive: Tensor | None, num_negatives: int | None, seed: int, score: str) -> tuple:
    """The fields of struct case_fast_mim."""
    pairs, dim = x.shape
    negatives = -1 if num_negatives is None else num_negatives
    return pairs, y.shape[0], dim, common.DTYPES[x.dtype], SCORES.index(score), negatives, pointer(positive), seed, PLAN_AUTO


@functools.lru_cache(maxsize=8)
def _one_to_one(pairs: int) -> Tensor:
    """positive where x_p and y_p belong together. Only read."""
    return torch.arange(pairs)


def _int64(positive: Tensor | None, x: Tensor) -> Tensor:
    """positive as the native kernels take it."""
    return _one_to_one(x.shape[0]) if positive is None else positive.long()


def _forward(runs: str, x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None, num_negatives: int | None,
             seed: int, score: str, deterministic: bool) -> tuple[Tensor, ...]:
    x, y, weight, positive = _contiguous(x, y, weight, positive)
    if runs == "triton":
        from case_fast.ops import bilinear_mim_triton as triton

        return triton.forward(x, y, weight, positive, num_negatives, seed, score, deterministic)
    positive = _int64(positive, x)
    found = _outputs(runs, x, y, weight, num_negatives, score)
    status = backend.native.bilinear_mim_forward(
        _problem(x, y, positive, num_negatives, seed, score), x.data_ptr(), y.data_ptr(), pointer(weight),
        *[tensor.data_ptr() for tensor in found], torch.get_num_threads(),
    )
    if status:
        _raise(status, positive, y.shape[0])
    return found


def _backward(runs: str, grad_side_y: Tensor, grad_side_x: Tensor, x: Tensor, y: Tensor, weight: Tensor | None,
              positive: Tensor | None, saved: Tensor, num_negatives: int | None, seed: int, score: str, deterministic: bool
              ) -> list[Tensor]:
    grad_side_y, grad_side_x, x, y, weight, positive, saved = _contiguous(grad_side_y, grad_side_x, x, y, weight, positive, saved)
    if runs == "triton":
        from case_fast.ops import bilinear_mim_triton as triton

        found = triton.backward(
            grad_side_y, grad_side_x, x, y, weight, positive, saved, num_negatives, seed, score, deterministic
        )
        return [gradient for gradient in found if gradient is not None]
    positive = _int64(positive, x)
    found = _gradients(x, y, weight)
    status = backend.native.bilinear_mim_backward(
        _problem(x, y, positive, num_negatives, seed, score), x.data_ptr(), y.data_ptr(), pointer(weight), saved.data_ptr(),
        grad_side_y.data_ptr(), grad_side_x.data_ptr(), *[gradient.data_ptr() for gradient in found],
        *(() if weight is not None else (0,)), torch.get_num_threads(),
    )
    if status:
        _raise(status, positive, y.shape[0])
    return found


def _raise(status: int, positive: Tensor, rows: int) -> None:
    """The error that belongs to a status of enum case_fast_status; nothing was written."""
    _check_contents(positive, rows)  # says which entry
    if status == 5:
        raise MemoryError("bilinear_mim found no memory for its workspace")
    raise RuntimeError(f"bilinear_mim: the native kernel refused its arguments (status {status})")


def _forward_fake(runs, x, y, weight, positive, num_negatives, seed, score, deterministic):
    return _outputs(runs, x, y, weight, num_negatives, score)


def _backward_fake(runs, grad_side_y, grad_side_x, x, y, weight, *rest):
    return _gradients(x, y, weight)


for _device in ("CPU", "CUDA"):
    _library.impl(f"{FAMILY}_forward", _forward, _device)
    _library.impl(f"{FAMILY}_backward", _backward, _device)
torch.library.register_fake(f"case_fast::{FAMILY}_forward", _forward_fake, lib=_library)
torch.library.register_fake(f"case_fast::{FAMILY}_backward", _backward_fake, lib=_library)


# --------------------------------------------------------------------------------------------------------------- autograd


class _BilinearMIM(torch.autograd.Function):
    """Keeps the inputs and O((P + Q) d) numbers; the scores are computed again."""

    @staticmethod
    def forward(ctx, runs, x, y, weight, positive, *numbers):
        side_y, side_x, logit, saved = common.call(_forward_op, _forward, runs, x, y, weight, positive, *numbers)
        ctx.save_for_backward(x, y, weight, positive, saved)
        ctx.runs, ctx.numbers = runs, numbers
        ctx.mark_non_differentiable(logit)
        return side_y, side_x, logit

    @staticmethod
    def backward(ctx, grad_side_y, grad_side_x, _):
        def call(*tensors):
            return common.call(_backward_op, _backward, ctx.runs, *tensors, *ctx.numbers)

        found = common.gradients(FAMILY, call, (grad_side_y, grad_side_x, *ctx.saved_tensors))
        grad_x, grad_y, grad_weight = *found, *[None] * (3 - len(found))
        return None, grad_x, grad_y, grad_weight, *[None] * 5
