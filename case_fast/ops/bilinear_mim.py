"""Mutual information maximisation over a score matrix that is never stored (Eq. 9-12), with gradients, on CPU and GPU.

The equation in plain torch is `case_fast.ops.reference.mim_sides`: the oracle of the tests, and what runs where there is no
kernel. The registered ops `case_fast::bilinear_mim_forward` and `_backward` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from case_fast.arguments import truth, whole
from case_fast.ops import backend, common, reference
from case_fast.ops.reference import SCORES

FAMILY = "bilinear_mim"
PLAN_AUTO = 0  # enum case_fast_mim_plan
MOST_ROWS = 2**31  # a draw is a 32-bit word times the number of rows, in 64 bits


@common.public
def bilinear_mim(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None = None, num_negatives: int | None = None,
                 seed: int | Tensor = 0, reduction: str = "mean", score: str = "bilinear_sigmoid", validate: bool | None = None,
                 deterministic: bool = True, sizes: Tensor | None = None) -> Tensor:
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
            (`case_fast.ops.reference.draw_negatives`). seed, to be changed every step: in [0, 2^63), or an int64 tensor of
            one element on the device of x, whose value, modulo 2^63, is read when the kernels run.
        reduction: "mean" (0 without pairs), "sum" or "none".
        score: "bilinear_sigmoid", S = sigmoid(x_p^T W y_q); or "dot", S = x_p . y_q, whose sums are taken from their maximum.
        validate: whether the contents of positive are checked. Default: on CPU always, elsewhere never, since reading the
            answer would stop the device's queue. The native CPU kernels always check.
        deterministic: False lets kernels on a GPU add gradients in any order, where that is faster, unless
            `torch.use_deterministic_algorithms` forbids it.
        sizes: (2,) int64 on the device of x: how many of the P pairs and of the Q rows of y exist, the first ones; read when the
            kernels run, so that a captured call serves batches of any size. The others are in no sum, their results and
            gradients are 0, and "mean" is over the pairs that exist. Default: all do.

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
    side_y, side_x, _ = mim_sides(x, y, weight, positive, num_negatives, seed, score, validate, deterministic, sizes)
    return reference.reduced(side_y + side_x, reduction, None if sizes is None else sizes[0])


@common.public
def mim_sides(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None = None, num_negatives: int | None = None,
              seed: int | Tensor = 0, score: str = "bilinear_sigmoid", validate: bool | None = None, deterministic: bool = True,
              sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The two halves of `bilinear_mim`'s loss, log(sum over a set of exp S) - S[p, c] each, whose InfoNCE bounds Eq. 20 gives.

    Arguments and errors: as `bilinear_mim`.

    Returns:
        side_y (P,), over rows of y; side_x (P,), over rows of x; and without gradient x_p^T W y_c (or x_p . y_c), (P,).
    """
    device = common.device_type(x)
    compute, differs = common.compute_dtype(x)
    if differs:
        x, y, weight = common.cast(compute, x, y, weight)
    if num_negatives is not None:
        num_negatives = whole("num_negatives", num_negatives, "a whole number or None")
    _check(x, y, weight, positive, num_negatives, score, sizes)
    number, seed_at = common.seed_pair(seed, x.device)
    deterministic = truth("deterministic", deterministic)
    runs = backend.choose(FAMILY, device)
    if common.reads(validate, runs, device):
        _check_contents(x, y, positive, sizes)
    if runs == "reference":
        positive = torch.arange(x.shape[0], device=x.device) if positive is None else positive
        seed = reference.seed_of(number, seed_at)
        with torch.autocast(device, enabled=False):
            side_y, side_x, logit = reference.mim_sides(x, y, weight, positive, num_negatives, seed, score, sizes)
        return side_y, side_x, logit.detach()
    numbers = (num_negatives, number, seed_at, score, deterministic or torch.are_deterministic_algorithms_enabled())
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or (weight is not None and weight.requires_grad)):
        return _BilinearMIM.apply(runs, x, y, weight, positive, sizes, *numbers)
    return common.call(_forward_op, _forward, runs, x, y, weight, positive, sizes, *numbers)[:3]


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None, num_negatives: int | None, score: str,
           sizes: Tensor | None) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    dtype, device = x.dtype, x.device
    common.check_dtype("x", x)
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
        common.check_like(name, tensor, dtype, device, "x")
        if tensor.dim() != 2 or tensor.shape[1] != dim or (shape is not None and tensor.shape[0] != dim):
            raise ValueError(f"{name} must be {'(Q' if shape is None else f'({dim}'}, {dim}) as x, not {tuple(tensor.shape)}")
    for name, tensor in (("x", x), ("y", y)):
        if tensor.shape[0] >= MOST_ROWS:
            raise ValueError(f"{name} must have fewer than 2^31 rows, not {tensor.shape[0]}")
    if positive is None:
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"positive must say which rows belong together: x has {x.shape[0]} and y {y.shape[0]}")
    else:
        if positive.dim() != 1 or positive.shape[0] != x.shape[0]:
            raise ValueError(f"positive must be (P,) = ({x.shape[0]},) as x, not {tuple(positive.shape)}")
        common.check_index("positive", positive, device, "x")
        if y.shape[0] == 0 and x.shape[0] > 0:
            raise IndexError("positive names rows of y, which has none")
    if num_negatives is not None:
        if not 1 <= num_negatives < MOST_ROWS:
            raise ValueError(f"num_negatives must be in [1, 2^31) or None, not {num_negatives}")
    if sizes is not None:
        if sizes.dtype != torch.int64:
            raise TypeError(f"sizes must be int64, not {sizes.dtype}")
        if sizes.shape != (2,):
            raise ValueError(f"sizes must be (2,), of pairs and of rows of y, not {tuple(sizes.shape)}")
        if sizes.device != device:
            raise ValueError(f"sizes must be on {device} as x, not on {sizes.device}")


def _check_contents(x: Tensor, y: Tensor, positive: Tensor | None, sizes: Tensor | None) -> None:
    """Reads positive and sizes, and raises IndexError at the first entry that names nothing."""
    pairs, rows = _existing(x, y, sizes)
    if positive is not None:
        common.check_within("positive", positive[:pairs], rows)


def _existing(x: Tensor, y: Tensor, sizes: Tensor | None) -> tuple[int, int]:
    """How many pairs and rows of y exist, asked of the device."""
    if sizes is None:
        return x.shape[0], y.shape[0]
    pairs, rows = sizes.tolist()
    if not (0 <= pairs <= x.shape[0] and 0 <= rows <= y.shape[0]):
        raise IndexError(f"sizes holds {pairs} and {rows}; there are {x.shape[0]} pairs and {y.shape[0]} rows of y")
    return pairs, rows


# ------------------------------------------------------------------------------------------------------------ registered ops


def _outputs(runs: str, x: Tensor, y: Tensor, weight: Tensor | None, num_negatives: int | None, score: str) -> tuple[Tensor, ...]:
    """Uninitialised side_y, side_x, logit and saved."""
    (pairs, dim), rows = x.shape, y.shape[0]
    if runs == "triton":
        from case_fast.ops.bilinear_mim_triton import saved_elements

        saved = saved_elements(pairs, rows, num_negatives)
    elif isinstance(pairs, int) and isinstance(rows, int) and isinstance(dim, int):
        saved = backend.native.bilinear_mim_saved(_problem(x, y, None, num_negatives, 0, None, score))
    else:
        saved = _saved_elements(pairs, rows, dim, num_negatives, score)
    return tuple(torch.empty(size, dtype=common.sum_dtype(x), device=x.device) for size in (pairs, pairs, pairs, saved))


def _saved_elements(pairs: int, rows: int, dim: int, num_negatives: int | None, score: str) -> int:
    """What native.bilinear_mim_saved says, for sizes that are still symbols to a compiler."""
    projected = 0 if score == "dot" else torch.sym_min(pairs, rows) * dim
    if num_negatives is None:
        return projected + 3 * pairs + 2 * rows
    return projected + 5 * pairs + (2 * pairs * num_negatives if num_negatives <= dim else 0)


def _problem(x: Tensor, y: Tensor, positive: Tensor | None, num_negatives: int | None, seed: int, seed_at: Tensor | None,
             score: str) -> tuple:
    """The fields of struct case_fast_mim."""
    pairs, dim = x.shape
    negatives = -1 if num_negatives is None else num_negatives
    positive_at, seed_address = common.pointers(positive, seed_at)
    kinds = common.DTYPES[x.dtype], SCORES.index(score)
    return pairs, y.shape[0], dim, *kinds, negatives, positive_at, seed, seed_address, PLAN_AUTO


@functools.lru_cache(maxsize=8)
def _one_to_one(pairs: int) -> Tensor:
    """positive where x_p and y_p belong together. Only read."""
    return torch.arange(pairs, device="cpu")


def _int64(positive: Tensor | None, x: Tensor) -> Tensor:
    """positive as the native kernels take it."""
    return _one_to_one(x.shape[0]) if positive is None else positive.long()


def _forward(runs: str, x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None, sizes: Tensor | None,
             num_negatives: int | None, seed: int, seed_at: Tensor | None, score: str, deterministic: bool) -> tuple[Tensor, ...]:
    x, y, weight, positive, sizes = common.contiguous(x, y, weight, positive, sizes)
    if runs == "triton":
        from case_fast.ops import bilinear_mim_triton as triton

        return triton.forward(x, y, weight, positive, num_negatives, seed, seed_at, score, deterministic, sizes)
    found = _outputs(runs, x, y, weight, num_negatives, score)
    _cleared(x, y, sizes, found)
    _run("forward", x, y, weight, positive, sizes, num_negatives, seed, seed_at, score, found)
    return found


def _backward(runs: str, grad_side_y: Tensor, grad_side_x: Tensor, x: Tensor, y: Tensor, weight: Tensor | None,
              positive: Tensor | None, sizes: Tensor | None, saved: Tensor, num_negatives: int | None, seed: int,
              seed_at: Tensor | None, score: str, deterministic: bool) -> list[Tensor]:
    x, y, weight, positive, sizes = common.contiguous(x, y, weight, positive, sizes)
    grad_side_y, grad_side_x, saved = common.contiguous(grad_side_y, grad_side_x, saved)
    if runs == "triton":
        from case_fast.ops import bilinear_mim_triton as triton

        found = triton.backward(
            grad_side_y, grad_side_x, x, y, weight, positive, saved, num_negatives, seed, seed_at, score, deterministic, sizes
        )
        return [gradient for gradient in found if gradient is not None]
    found = common.empty_like(x, y, weight)
    _cleared(x, y, sizes, found[:2])
    others = (saved, grad_side_y, grad_side_x, *found, *[None] * (3 - len(found)))
    _run("backward", x, y, weight, positive, sizes, num_negatives, seed, seed_at, score, others)
    return found


def _cleared(x: Tensor, y: Tensor, sizes: Tensor | None, found: Sequence[Tensor]) -> None:
    """Zeros for what the kernel does not write, where not all exist."""
    if sizes is not None and _existing(x, y, sizes) != (x.shape[0], y.shape[0]):
        for result in found:
            result.zero_()


def _run(direction: str, x: Tensor, y: Tensor, weight: Tensor | None, positive: Tensor | None, sizes: Tensor | None,
         num_negatives: int | None, seed: int, seed_at: Tensor | None, score: str, others: tuple[Tensor | None, ...]) -> None:
    """Runs the native kernel, which is one of the CPU, on what exists. others: what its arguments are beside the inputs."""
    if sizes is not None:
        pairs, rows = _existing(x, y, sizes)
        x, y, positive = x[:pairs], y[:rows], positive if positive is None else positive[:pairs]
    positive = _int64(positive, x)
    problem = _problem(x, y, positive, num_negatives, seed, seed_at, score)
    status = common.run_native(f"{FAMILY}_{direction}", x, problem, common.pointers(x, y, weight, *others))
    if status:
        rows = y.shape[0]
        common.refuse_contents(FAMILY, status, {2: "positive"}, lambda: common.check_within("positive", positive, rows))


_INPUTS = "Tensor x, Tensor y, Tensor? weight, Tensor? positive, Tensor? sizes"
# SymInt: a new seed does not compile again
_NUMBERS = "int? num_negatives, SymInt seed, Tensor? seed_at, str score, bool deterministic"
# side_y, side_x, logit, (P,) each, and what backward needs beside the inputs: in the dtype of sums.
_forward_op = common.register(
    f"{FAMILY}_forward(str backend, {_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)", _forward,
    lambda runs, x, y, weight, positive, sizes, num_negatives, seed, seed_at, score, deterministic: _outputs(
        runs, x, y, weight, num_negatives, score
    ),
)
# Gradients of x and y, and of weight where it is given.
_backward_op = common.register(
    f"{FAMILY}_backward(str backend, Tensor grad_side_y, Tensor grad_side_x, {_INPUTS}, Tensor saved, {_NUMBERS}) -> Tensor[]",
    _backward, lambda runs, grad_side_y, grad_side_x, x, y, weight, *rest: common.empty_like(x, y, weight),
)


# --------------------------------------------------------------------------------------------------------------- autograd


class _BilinearMIM(torch.autograd.Function):
    """Keeps the inputs and O((P + Q) d) numbers; the scores are computed again."""

    @staticmethod
    def forward(ctx, runs, x, y, weight, positive, sizes, num_negatives, seed, seed_at, score, deterministic):
        numbers = (num_negatives, seed, seed_at, score, deterministic)
        side_y, side_x, logit, saved = common.call(_forward_op, _forward, runs, x, y, weight, positive, sizes, *numbers)
        ctx.save_for_backward(x, y, weight, positive, sizes, saved, seed_at)
        ctx.runs, ctx.seed, ctx.settings = runs, (num_negatives, seed), (score, deterministic)
        ctx.mark_non_differentiable(logit)
        return side_y, side_x, logit

    @staticmethod
    def backward(ctx, grad_side_y, grad_side_x, _):
        def call(*tensors):
            *tensors, seed_at = tensors
            return common.call(_backward_op, _backward, ctx.runs, *tensors, *ctx.seed, seed_at, *ctx.settings)

        found = common.gradients(FAMILY, call, (grad_side_y, grad_side_x, *ctx.saved_tensors))
        grad_x, grad_y, grad_weight = *found, *[None] * (3 - len(found))
        return None, grad_x, grad_y, grad_weight, *[None] * 7
