"""Sums of rows by segment, and the gather of rows that is their gradient, on CPU and GPU.

The equations in plain torch are `segment_sum` and `take` of `case_fast.ops.reference`: the oracle of the tests, and what runs
where there is no kernel. The registered ops `case_fast::segment_sum_forward` (the sum) and `_backward` (the gather) call the
kernels; autograd stands outside, and each of the two is the other's gradient, so that there are derivatives of any order. On CPU
the gather is torch's own, at any size faster than a kernel that Python must call.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from case_fast.arguments import whole
from case_fast.ops import backend, common, reference, transforms

FAMILY = "segment_sum"
# Elements below which plain torch sums faster on CPU: with a gradient (autograd through Python takes 20 us more), and without.
FEW, FEWER = 1 << 19, 1 << 11
ANY = 1 << 62
_PLAIN = (torch.float32, torch.float64)
_REFUSED = (IndexError, RuntimeError, TypeError, ValueError)  # what torch raises at wrong arguments


@common.public
def segment_sum(x: Tensor, segment: Tensor, size: int, validate: bool | None = None, few: int | None = None) -> Tensor:
    """out_s = sum of x_i over the rows i with segment[i] = s, in ascending order of i.

    Replaces ``x.new_zeros(size, ...).index_add(0, segment, x)``, which on GPU adds by float atomics, in any order, or sorts
    first. An empty segment gives zeros.

    Args:
        x: (n, ...). float32 and float64; float16 and bfloat16 are summed in float32. Any strides; dense rows are read where
            they lie.
        segment: (n,) int32 or int64 in [0, size), in any order.
        size: segments, at least 0.
        validate: whether the contents of segment are checked. Default: on CPU always, elsewhere never, since reading the
            answer would stop the device's queue. On CPU they are always checked.
        few: on CPU plain torch sums fewer elements than these: faster there, and the same bits. Default: as measured.

    Returns:
        (size, ...), in the dtype of x; under autocast float32 for half precision, as torch.sum.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        IndexError: segment names a segment that does not exist. Before any kernel runs.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call, where a backend is chosen at all (``few``).

    Deterministic: equal inputs give equal bits, forward and backward, whatever the number of threads; on CPU those of the
    torch line above. Differentiable any number of times.
    """
    if size and segment.dim() == 1 and _is_plain(x, x.numel(), few, FEWER):
        try:
            return x.new_zeros(size, *x.shape[1:]).index_add_(0, segment, x)
        except _REFUSED:
            pass  # what follows says what is wrong
    device = _checked(x)
    common.check_index("segment", segment, x.device, "x")
    if segment.shape[0] != x.shape[0]:
        raise ValueError(f"segment must be (n,) = ({x.shape[0]},) as x, not {tuple(segment.shape)}")
    size = whole("size", size)
    if size < 0:
        raise ValueError(f"size must be at least 0, not {size}")
    if x.dtype in common.HALF and torch.is_autocast_enabled(device):
        x = x.float()
    runs = _chosen(device, "segment", segment, size, validate)
    if runs == "reference":
        return _named(reference.segment_sum, "segment", x, segment, size)
    return _sum(runs, x, segment, size)


@common.public
def take(x: Tensor, index: Tensor, validate: bool | None = None, few: int | None = None) -> Tensor:
    """Rows of ``x`` (n, ...) at ``index`` (...), int32 or int64 in [0, n): as ``x[index]``. Its gradient is `segment_sum`, which
    says what holds of dtypes, ``validate``, ``few`` (elements taken), errors, determinism and derivatives."""
    if index.dim() == 1 and _is_plain(x, index.shape[0] * math.prod(x.shape[1:]), few, ANY):
        try:
            return x.index_select(0, index)
        except _REFUSED:
            pass  # what follows says what is wrong
    device = _checked(x)
    places = index if index.dim() == 1 else index.reshape(-1)
    common.check_index("index", places, x.device, "x")
    runs = _chosen(device, "index", places, x.shape[0], validate)
    if runs == "reference":
        return _named(reference.take, "index", x, index)
    out = _gather(runs, x, places)
    return out if index.dim() == 1 else out.unflatten(0, index.shape)


@common.public
def segment_mean(x: Tensor, segment: Tensor, size: int) -> Tensor:
    """(size, ...): rows of ``x`` (n, ...) averaged by segment; an empty segment gives zeros."""
    return reference.segment_mean(x, segment, size, segment_sum)


@common.public
def segment_log_softmax(score: Tensor, segment: Tensor, size: int) -> Tensor:
    """Log-softmax of ``score`` (n, ...) over the rows of each segment."""
    return reference.segment_log_softmax(score, segment, size, segment_sum, take)


def _checked(x: Tensor) -> str:
    """The type of its device."""
    common.check_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (n, ...), not a number")
    return common.device_type(x)


def _chosen(device: str, name: str, index: Tensor, size: int, validate: bool | None) -> str:
    """The backend of a call, whose index is checked where the kernel does not."""
    if size == 0 and index.shape[0] > 0:
        raise IndexError(f"{name} names what does not exist: there is nothing to name")
    runs = backend.choose(FAMILY, device)
    if common.reads(validate, runs, device):
        common.check_within(name, index, size)
    return runs


def _is_plain(x: Tensor, elements: int, few: int | None, fewer: int) -> bool:
    """Whether a call goes to plain torch, which checks its arguments itself: few elements on CPU (``fewer``: without a gradient),
    though not none, of which it would check nothing. Its bits are those of the native and the reference backend, so no backend is
    chosen. Not in compiled code, which would add by atomics."""
    if few is None:
        few = FEW if x.requires_grad and torch.is_grad_enabled() else fewer
    return 0 < elements < few and x.is_cpu and x.dtype in _PLAIN and x.dim() > 0 and not torch.compiler.is_compiling()


def _named(function: Callable[..., Tensor], name: str, x: Tensor, index: Tensor, *size: int) -> Tensor:
    """``function(x, index, *size)``; what torch says of a bad index on CPU does not name it."""
    try:
        return function(x, index, *size)
    except (IndexError, RuntimeError):
        common.check_within(name, index, *size or x.shape[:1])
        raise


# ------------------------------------------------------------------------------------------------------------ registered ops


def _forward(runs: str, x: Tensor, segment: Tensor, size: int) -> Tensor:
    if runs == "triton":
        from case_fast.ops import segment_sum_triton as triton

        return triton.forward(x, segment, size)
    if x.dtype in common.HALF:
        return _forward(runs, x.float(), segment, size).to(x.dtype)
    out = x.new_empty(size, *x.shape[1:])
    read, width, stride = common.dense_rows(x)
    segment = segment.contiguous()
    call = (  # struct case_fast_segment_sum
        segment.shape[0], size, width, stride, common.DTYPES[x.dtype], common.INDEX_BITS[segment.dtype], segment.data_ptr(),
    )
    status = backend.native.segment_sum_forward(call, read.data_ptr(), out.data_ptr(), torch.get_num_threads())
    if status:
        common.refuse_contents(FAMILY, status, {13: "segment"}, lambda: common.check_within("segment", segment, size))
    return out


def _backward(runs: str, grad_out: Tensor, segment: Tensor) -> Tensor:
    if runs == "triton":
        from case_fast.ops import segment_sum_triton as triton

        return triton.backward(grad_out, segment)
    return _named(_selected, "index", grad_out, segment)


def _selected(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


_forward_op = common.register(
    f"{FAMILY}_forward(str backend, Tensor x, Tensor segment, SymInt size) -> Tensor", _forward,
    lambda runs, x, segment, size: x.new_empty(size, *x.shape[1:]),
)
_backward_op = common.register(
    f"{FAMILY}_backward(str backend, Tensor grad_out, Tensor segment) -> Tensor", _backward,
    lambda runs, grad_out, segment: grad_out.new_empty(segment.shape[0], *grad_out.shape[1:]),
)


# --------------------------------------------------------------------------------------------------------------- autograd


def _sum(runs: str, x: Tensor, segment: Tensor, size: int) -> Tensor:
    if transforms.beyond_kernels():
        return reference.segment_sum(x, segment, size)
    if x.requires_grad and torch.is_grad_enabled():
        return _Sum.apply(runs, x, segment, size)
    return common.call(_forward_op, _forward, runs, x, segment, size)


def _gather(runs: str, x: Tensor, index: Tensor) -> Tensor:
    if transforms.beyond_kernels():
        return reference.take(x, index)
    if x.requires_grad and torch.is_grad_enabled():
        return _Gather.apply(runs, x, index)
    return _gathered(runs, x, index)


def _gathered(runs: str, x: Tensor, index: Tensor) -> Tensor:
    """Without a graph."""
    if runs == "native" and not torch.compiler.is_compiling():
        return _backward(runs, x, index)  # torch's op, which all see that would see ours
    return common.call(_backward_op, _backward, runs, x, index)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, runs, x, segment, size):
        ctx.save_for_backward(segment)
        ctx.runs = runs
        return common.call(_forward_op, _forward, runs, x, segment, size)

    @staticmethod
    def backward(ctx, grad_out):
        return None, _gather(ctx.runs, grad_out, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, runs, x, index):
        ctx.save_for_backward(index)
        ctx.runs, ctx.size = runs, x.shape[0]
        return _gathered(runs, x, index)

    @staticmethod
    def backward(ctx, grad_out):
        return None, _sum(ctx.runs, grad_out, *ctx.saved_tensors, ctx.size), None
