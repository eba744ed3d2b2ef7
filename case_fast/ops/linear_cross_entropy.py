"""The vocabulary at the end of a decoder (Eq. 8 and 19): losses of target words with gradients, and the most probable words.

The equations in plain torch are `case_fast.equations.linear_cross_entropy` and `top_words`: the oracle of the tests, and what
runs where there is no kernel. The registered ops `case_fast::linear_cross_entropy_forward`, `_backward` and
`case_fast::top_words` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from case_fast import equations
from case_fast.ops import backend, common
from case_fast.ops.common import pointer
from case_fast.ops.device_flag import BAD_CU_TARGET, BAD_TARGET

FAMILY = "linear_cross_entropy"
MOST_WORDS = 2**31
MOST_BEST, MOST_WORDS_OF_BEST = 32, 2**19  # k and V of top_words in Triton, which merges the tiles of a row in one program
_INDEX_BITS = {torch.int32: 32, torch.int64: 64}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, keep_bytes: int = 64 << 20,
                         cu_target: Tensor | None = None, validate: bool | None = None) -> tuple[Tensor, Tensor]:
    """nll_m = log sum_v exp z_tv - z_ty with z = hidden @ weight.T + bias, for each target word y = target[m] of row t.

    Replaces ``z = F.linear(hidden, weight, bias); F.cross_entropy(z, target, reduction="none"), z.argmax(1)`` by one pass over
    tiles of z. Any weighting of the words is a weighting of this nll: both decoder losses of CASE come from one call,
    ``sum_t (1 / T) (g3 + g4 w[target_t]) nll_t``; and L_BOW (Eq. 8) is the mean over the words of rows with several targets.

    Args:
        hidden: (T, d), weight: (V, d), bias: (V,); one dtype and device. float32 and float64; float16 and bfloat16 are
            accumulated in float32 on GPU, and computed in float32 on CPU. Any strides. A bias of -inf forbids a word.
        target: (M,) int32 or int64 in [0, V).
        keep_bytes: z is kept for backward where T * V numbers (of 4 bytes, 8 for float64) are no more than so many bytes;
            else it is computed again, in tiles: about a third more work in no more than 16 MiB, and 1 MiB a thread.
        cu_target: (T + 1,) int32 or int64: row t has the targets target[cu_target[t]:cu_target[t + 1]], any number of them.
            Default: each row has one, and M == T.
        validate: whether the contents of target and cu_target are checked. Default: on CPU always, elsewhere never, since
            reading the answer would stop the device's queue. The native CPU kernels always check.

    Returns:
        nll (M,), float64 for float64 inputs, else float32, under autocast too; and without gradient the word of greatest z in
        each row (T,), int64, the lowest among equals.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        IndexError: a target is out of range, or cu_target does not rise from 0 to M. All before any kernel runs.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call.

    Deterministic: equal inputs give equal bits, forward and backward, whatever the number of threads. A row whose targets all
    have gradient 0 takes no part in backward. NaN or Inf in a row of hidden stays out of the other rows' nll, prediction and
    grad_hidden; the gradients of weight and bias, sums over all rows that take part, are NaN then. No second derivative but on
    the reference backend.
    """
    device = hidden.device.type
    compute, differs = common.compute_dtype(hidden)
    if differs:
        hidden, weight, bias = common.cast(compute, hidden, weight, bias)
    _check(hidden, weight, bias)
    _check_targets(target, cu_target, hidden)
    if isinstance(keep_bytes, bool) or not isinstance(keep_bytes, int):
        raise TypeError(f"keep_bytes must be a whole number, not {keep_bytes!r}")
    if keep_bytes < 0:
        raise ValueError(f"keep_bytes must be at least 0, not {keep_bytes}")
    if cu_target is not None and cu_target.dtype != target.dtype:
        target, cu_target = target.long(), cu_target.long()
    runs = backend.choose(FAMILY, device)
    if validate is None:
        validate = device == "cpu" and not torch.compiler.is_compiling()
    if validate and not (runs == "native" and device == "cpu"):
        _check_contents(target, cu_target, weight.shape[0])
    if runs == "reference":
        with torch.autocast(device, enabled=False):
            return equations.linear_cross_entropy(hidden, weight, bias, target, cu_target)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad or bias.requires_grad):
        keep = hidden.shape[0] * weight.shape[0] * _full(hidden).itemsize <= keep_bytes
        return _LinearCrossEntropy.apply(runs, hidden, weight, bias, target, cu_target, keep)
    return common.call(_forward_op, _forward, runs, hidden, weight, bias, target, cu_target, False)[:2]


def top_words(hidden: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable words of each row and their log-probabilities, for decoding; k = 1 is argmax.

    Replaces ``F.log_softmax(F.linear(hidden, weight, bias), 1).topk(k)``: the rows of weight are read once as they lie, and
    neither z nor its softmax is kept. Made for few rows (hypotheses) and a small k.

    Args:
        hidden: (T, d), weight: (V, d), bias: (V,), as in `linear_cross_entropy`. A bias of -inf forbids a word, which then
            has no part in the sum and log-probability -inf.
        k: in [1, V].

    Returns:
        log-probabilities (T, k), the greatest first, and words (T, k), int64; among equals the lowest word comes first. float64
        for float64 inputs, else float32. Without gradient. A NaN in a row makes its log-probabilities NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.

    Deterministic, whatever the number of threads; on CPU, a row's result does not depend on the other rows. On GPU, plain torch
    serves a k above 32.
    """
    compute, differs = common.compute_dtype(hidden)
    if differs:
        hidden, weight, bias = common.cast(compute, hidden, weight, bias)
    _check(hidden, weight, bias)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be a whole number, not {k!r}")
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be in [1, V] = [1, {weight.shape[0]}], not {k}")
    device = hidden.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        runs = backend.choose(FAMILY, device)
        if runs == "native" or runs == "triton" and k <= MOST_BEST and weight.shape[0] <= MOST_WORDS_OF_BEST:
            return common.call(_top_op, _top_words, runs, hidden, weight, bias, k)
        return equations.top_words(hidden, weight, bias, k)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    dtype, device = hidden.dtype, hidden.device
    if dtype not in common.DTYPES:
        raise TypeError(f"hidden must be float32, float64, float16 or bfloat16, not {dtype}")
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be (T, d) with d above 0, not {tuple(hidden.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} as hidden, not {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on {device} as hidden, not on {x.device}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be (V, {hidden.shape[1]}) as hidden, not {tuple(weight.shape)}")
    if not 0 < weight.shape[0] < MOST_WORDS:
        raise ValueError(f"weight must have from 1 to 2^31 - 1 rows, not {weight.shape[0]}")
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},) as weight, not {tuple(bias.shape)}")


def _check_targets(target: Tensor, cu_target: Tensor | None, hidden: Tensor) -> None:
    for name, x in (("target", target), ("cu_target", cu_target)):
        if x is None:
            continue
        if x.dtype not in _INDEX_BITS:
            raise TypeError(f"{name} must be int32 or int64, not {x.dtype}")
        if x.dim() != 1:
            raise ValueError(f"{name} must have one dimension, not shape {tuple(x.shape)}")
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} as hidden, not on {x.device}")
    rows = hidden.shape[0]
    if cu_target is None and target.shape[0] != rows:
        raise ValueError(f"target must be (T,) = ({rows},) as hidden without cu_target, not {tuple(target.shape)}")
    if cu_target is not None and cu_target.shape[0] != rows + 1:
        raise ValueError(f"cu_target must be (T + 1,) = ({rows + 1},) as hidden is, not {tuple(cu_target.shape)}")


def _check_contents(target: Tensor, cu_target: Tensor | None, words: int) -> None:
    """Reads target and cu_target, and raises IndexError at the first entry that is wrong."""
    if cu_target is not None:
        first, last = int(cu_target[0]), int(cu_target[-1])
        if first != 0:
            raise IndexError(f"cu_target starts at {first}; it must start at 0")
        falls = (cu_target[1:] < cu_target[:-1]).nonzero()
        if falls.numel():
            place = int(falls[0])
            raise IndexError(
                f"cu_target falls from {int(cu_target[place])} to {int(cu_target[place + 1])} at place {place + 1}"
            )
        if last != target.shape[0]:
            raise IndexError(f"cu_target ends at {last}; it must end at the number of targets, {target.shape[0]}")
    wrong = ((target < 0) | (target >= words)).nonzero()
    if wrong.numel():
        place = int(wrong[0])
        raise IndexError(f"target holds {int(target[place])} at place {place}; it must be in [0, {words})")


# ------------------------------------------------------------------------------------------------------------ registered ops

_library = torch.library.Library("case_fast", "FRAGMENT")
_INPUTS = "Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor? cu_target"
# nll (M,), prediction (T,), state (T, 2): the greatest z of a row, and log sum exp z less that; kept: z in an order of the
# backend's own, or empty.
_library.define(f"{FAMILY}_forward(str backend, {_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)")
# Those gradients of hidden, weight and bias that are wanted.
_library.define(f"{FAMILY}_backward(str backend, Tensor grad_nll, {_INPUTS}, Tensor state, Tensor kept, bool[] wanted) "
                "-> Tensor[]")
_library.define("top_words(str backend, Tensor hidden, Tensor weight, Tensor bias, int k) -> (Tensor, Tensor)")
_forward_op = torch.ops.case_fast.linear_cross_entropy_forward.default
_backward_op = torch.ops.case_fast.linear_cross_entropy_backward.default
_top_op = torch.ops.case_fast.top_words.default


def _full(x: Tensor) -> torch.dtype:
    """Of sums and losses."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _outputs(hidden: Tensor, weight: Tensor, target: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """Uninitialised nll, prediction, state and kept."""
    rows, words = hidden.shape[0], weight.shape[0]
    full = {"dtype": _full(hidden), "device": hidden.device}
    nll, state = torch.empty(target.shape[0], **full), torch.empty((rows, 2), **full)
    kept = torch.empty(rows * words if keep else 0, **full)
    return nll, torch.empty(rows, dtype=torch.int64, device=hidden.device), state, kept


def _gradients(wanted: list[bool], *inputs: Tensor) -> list[Tensor]:
    """Uninitialised gradients of the inputs that want one."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, w in zip(inputs, wanted, strict=True) if w]


def _best(hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Uninitialised log-probabilities and words."""
    found = torch.empty((hidden.shape[0], k), dtype=_full(hidden), device=hidden.device)
    return found, torch.empty_like(found, dtype=torch.int64)


def _contiguous(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None else x.contiguous() for x in inputs)


def _call(hidden: Tensor, weight: Tensor, target: Tensor, cu_target: Tensor | None) -> tuple:
    """The fields of struct case_fast_linear_cross_entropy."""
    rows, dim = hidden.shape
    return (
        rows, weight.shape[0], target.shape[0], dim, common.DTYPES[hidden.dtype], _INDEX_BITS[target.dtype],
        target.data_ptr(), pointer(cu_target),
    )


def _forward(runs: str, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, cu_target: Tensor | None, keep: bool
             ) -> tuple[Tensor, ...]:
    hidden, weight, bias, target, cu_target = _contiguous(hidden, weight, bias, target, cu_target)
    if runs == "triton":
        from case_fast.ops import linear_cross_entropy_triton as triton

        return triton.forward(hidden, weight, bias, target, cu_target, keep)
    nll, prediction, state, kept = found = _outputs(hidden, weight, target, keep)
    status = backend.native.linear_cross_entropy_forward(
        _call(hidden, weight, target, cu_target), hidden.data_ptr(), weight.data_ptr(), bias.data_ptr(), nll.data_ptr(),
        prediction.data_ptr(), state.data_ptr(), kept.data_ptr() if keep else 0, torch.get_num_threads(),
    )
    if status:
        _raise(status, target, cu_target, weight.shape[0])
    return found


def _backward(runs: str, grad_nll: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor,
              cu_target: Tensor | None, state: Tensor, kept: Tensor, wanted: list[bool]) -> list[Tensor]:
    grad_nll, hidden, weight, bias = _contiguous(grad_nll, hidden, weight, bias)
    target, cu_target, state, kept = _contiguous(target, cu_target, state, kept)
    if runs == "triton":
        from case_fast.ops import linear_cross_entropy_triton as triton

        return triton.backward(grad_nll, hidden, weight, bias, target, cu_target, state, kept, wanted)
    found = _gradients(wanted, hidden, weight, bias)
    given = iter(found)
    status = backend.native.linear_cross_entropy_backward(
        _call(hidden, weight, target, cu_target), hidden.data_ptr(), weight.data_ptr(), bias.data_ptr(), state.data_ptr(),
        kept.data_ptr() if kept.numel() else 0, grad_nll.data_ptr(), *[next(given).data_ptr() if w else 0 for w in wanted],
        torch.get_num_threads(),
    )
    if status:
        _raise(status, target, cu_target, weight.shape[0])
    return found


def _top_words(runs: str, hidden: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    hidden, weight, bias = _contiguous(hidden, weight, bias)
    if runs == "triton":
        from case_fast.ops import linear_cross_entropy_triton as triton

        return triton.top_words(hidden, weight, bias, k)
    value, word = found = _best(hidden, k)
    rows, dim = hidden.shape
    status = backend.native.top_words(
        rows, weight.shape[0], k, dim, common.DTYPES[hidden.dtype], hidden.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        value.data_ptr(), word.data_ptr(), torch.get_num_threads(),
    )
    if status:
        _raise(status, word[:0, 0], None, weight.shape[0])
    return found


def _raise(status: int, target: Tensor, cu_target: Tensor | None, words: int) -> None:
    """The error that belongs to a status of enum case_fast_status; nothing was written."""
    if status in (BAD_TARGET, BAD_CU_TARGET):
        _check_contents(target, cu_target, words)  # says which entry
        raise IndexError(f"{'target' if status == BAD_TARGET else 'cu_target'} names what does not exist")
    if status == 5:
        raise MemoryError("linear_cross_entropy found no memory for its workspace")
    raise RuntimeError(f"linear_cross_entropy: the native kernel refused its arguments (status {status})")


def _forward_fake(runs, hidden, weight, bias, target, cu_target, keep):
    return _outputs(hidden, weight, target, keep)


def _backward_fake(runs, grad_nll, hidden, weight, bias, target, cu_target, state, kept, wanted):
    return _gradients(wanted, hidden, weight, bias)


for _device in ("CPU", "CUDA"):
    _library.impl(f"{FAMILY}_forward", _forward, _device)
    _library.impl(f"{FAMILY}_backward", _backward, _device)
    _library.impl("top_words", _top_words, _device)
torch.library.register_fake(f"case_fast::{FAMILY}_forward", _forward_fake, lib=_library)
torch.library.register_fake(f"case_fast::{FAMILY}_backward", _backward_fake, lib=_library)
torch.library.register_fake("case_fast::top_words", lambda runs, hidden, weight, bias, k: _best(hidden, k), lib=_library)


# --------------------------------------------------------------------------------------------------------------- autograd


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the inputs, two numbers a row, and z where it is small."""

    @staticmethod
    def forward(ctx, runs, hidden, weight, bias, target, cu_target, keep):
        nll, prediction, state, kept = common.call(_forward_op, _forward, runs, hidden, weight, bias, target, cu_target, keep)
        ctx.save_for_backward(hidden, weight, bias, target, cu_target, state, kept)
        ctx.runs = runs
        ctx.mark_non_differentiable(prediction)
        return nll, prediction

    @staticmethod
    def backward(ctx, grad_nll, _):
        wanted = list(ctx.needs_input_grad[1:4])

        def call(*tensors):
            return common.call(_backward_op, _backward, ctx.runs, *tensors, wanted)

        found = iter(common.gradients(FAMILY, call, (grad_nll, *ctx.saved_tensors)))
        return None, *[next(found) if w else None for w in wanted], None, None, None
