"""Attention of packed sequences, causal or not, with gradients: what encoders and decoders need in place of padding.

The equation in plain torch is `case_fast.equations.packed_attention`: the oracle of the tests, and what runs where there is
no kernel. The registered ops `case_fast::packed_attention_forward` and `_backward` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from case_fast import equations
from case_fast.ops import backend, common
from case_fast.ops.common import pointer
from case_fast.ops.device_flag import device_flag, raise_pending

FAMILY = "packed_attention"
MAX_DIMENSION = 256  # of a head, in the GPU kernels
PLAN_AUTO = 0  # enum case_fast_attention_plan of cuda.h
INDEX_BITS = {torch.int32: 32, torch.int64: 64}


def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, causal: bool = False,
                     scale: float | None = None, dropout_p: float = 0.0, seed: int = 0, key_of: Tensor | None = None,
                     key_length: Tensor | None = None, validate: bool | None = None) -> Tensor:
    """out_i = sum_j softmax_j( scale * q_i . k_j ) v_j over the keys j of i's own sequence, per head.

    Replaces, for sequences padded to (B, H, n, D) and (B, H, m, D) with a mask of what is padding,
    ``scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)`` by O(Tq H) memory beyond inputs, outputs and
    gradients. A query that sees no key gives zeros.

    Args:
        query: (Tq, H, D); key, value: (Tk, H, D); one dtype and device. float32 and float64; half precision is computed in
            float32 on CPU. Any strides; rows that lie apart are not copied. On GPU a head of D > 256 runs on the reference
            backend.
        cu_query: (B + 1,), cu_key: (S + 1,), int32 or int64, from 0 to Tq and Tk: where each sequence starts. S = B
            unless ``key_of`` is given.
        causal: the last query of a sequence sees all its keys, the one before it all but the last, and so on.
        scale: default D ** -0.5.
        dropout_p, seed: probability in [0, 1) that an attention weight is dropped; the others are divided by 1 - p. Which
            ones is a function of (seed, head, e) alone, the same on every backend, with e = query row * (the longest key
            sequence by cu_key) + the key's place in its sequence; 0 <= seed < 2^63.
        key_of: (B,) int32 or int64 in [0, S): the sequence of keys that each sequence of queries attends to. Several may
            share one, without a copy.
        key_length: (S,) int32 or int64: how many rows of each sequence of keys are keys, from its first; the others, room
            that a cache grows into, are not read. Default: all.
        validate: whether the contents of cu_query, cu_key, key_of and key_length are checked. Default: on CPU always,
            elsewhere never, since reading the answer would stop the device's queue. The native CPU kernels always check.

    Returns:
        (Tq, H, D), in the dtype of the inputs. Under autocast: in autocast's dtype on GPU, in float32 on CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        IndexError: offsets that do not rise from 0 to the number of rows, key_of or key_length out of range. All before any
            kernel runs.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call.

    Deterministic: equal inputs give equal bits, forward and backward, whatever the number of threads. No second derivative
    but on the reference backend.
    """
    device_type, given = query.device.type, query.dtype
    compute, differs = common.compute_dtype(query)
    if differs:
        query, key, value = common.cast(compute, query, key, value)
    _check(query, key, value, cu_query, cu_key, key_of, key_length)
    dimension = query.shape[2]
    scale = dimension**-0.5 if scale is None else scale
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be a finite number >= 0, not {scale!r}")
    check_dropout(dropout_p, seed)
    cu_query, cu_key, key_of, key_length = like_indices(cu_query, cu_key, key_of, key_length)

    beyond = "" if dimension <= MAX_DIMENSION or device_type == "cpu" else f"heads of more than {MAX_DIMENSION} dimensions"
    runs = backend.choose(FAMILY, device_type, beyond)
    compiling = torch.compiler.is_compiling()
    if validate is None:
        validate = device_type == "cpu" and not compiling
    if validate and not (runs == "native" and device_type == "cpu"):
        _check_contents(query, key, cu_query, cu_key, key_of, key_length)
    tensors, numbers = (query, key, value, cu_query, cu_key, key_of, key_length), (causal, scale, dropout_p, seed)
    if runs == "reference" and not compiling:
        with torch.autocast(device_type, enabled=False):
            out = equations.packed_attention(*tensors[:5], *numbers, key_of, key_length)
    elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out = _PackedAttention.apply(runs, *(distinct(tensors) if compiling else tensors), *numbers)
    else:
        out = common.call(_forward_op, _forward, runs, *tensors, *numbers)[0]
    return common.restored(out, given)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, key_of: Tensor | None,
           key_length: Tensor | None) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    shape, dtype, device = query.shape, query.dtype, query.device
    if dtype not in common.DTYPES:
        raise TypeError(f"query must be float32, float64, float16 or bfloat16, not {dtype}")
    if len(shape) != 3 or shape[1] == 0 or shape[2] == 0:
        raise ValueError(f"query must be (Tq, H, D) with H and D above 0, not {tuple(shape)}")
    if key.dim() != 3 or key.shape[1:] != shape[1:]:
        raise ValueError(f"key must be (Tk, {shape[1]}, {shape[2]}) as query is (Tq, H, D), not {tuple(key.shape)}")
    check_float("key", key, key.shape, dtype, device, "query")
    check_float("value", value, key.shape, dtype, device, "key")
    check_sequences("cu_query", cu_query, "cu_key", cu_key, "key_of", key_of, device)
    if key_length is not None:
        check_index("key_length", key_length, device)
        if key_length.shape[0] != cu_key.shape[0] - 1:
            raise ValueError(f"key_length must be ({cu_key.shape[0] - 1},), a number for each sequence of cu_key, not "
                             f"{tuple(key_length.shape)}")


def _check_contents(query: Tensor, key: Tensor, cu_query: Tensor, cu_key: Tensor, key_of: Tensor | None,
                    key_length: Tensor | None) -> None:
    """Reads all offsets and numbers, and raises IndexError at the first that is wrong."""
    check_offsets("cu_query", cu_query, query.shape[0], "query")
    check_offsets("cu_key", cu_key, key.shape[0], "key")
    check_key_of("key_of", key_of, cu_key.shape[0] - 1)
    if key_length is not None:
        wrong = ((key_length < 0) | (key_length > cu_key.diff())).nonzero()
        if wrong.numel():
            place = int(wrong[0])
            most = int(cu_key[place + 1] - cu_key[place])
            raise IndexError(f"key_length holds {int(key_length[place])} at place {place}; it must be in [0, {most}]")


def check_float(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, like: str) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} as {like}, not {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)} as {like} asks for, not {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as {like}, not on {x.device}")


def check_sequences(query_name: str, cu_query: Tensor, key_name: str, cu_key: Tensor, of_name: str, key_of: Tensor | None,
                    device: torch.device) -> None:
    """What is known of offsets without reading them."""
    for name, cu in ((query_name, cu_query), (key_name, cu_key)):
        check_index(name, cu, device)
        if cu.shape[0] == 0:
            raise ValueError(f"{name} must hold one number more than there are sequences, so at least one")
    sequences = cu_query.shape[0] - 1
    if key_of is None:
        if cu_key.shape[0] != cu_query.shape[0]:
            raise ValueError(f"{key_name} must be ({sequences + 1},) as {query_name}, not {tuple(cu_key.shape)}; "
                             f"{of_name} would say which keys each sequence attends to")
        return
    check_index(of_name, key_of, device)
    if key_of.shape[0] != sequences:
        raise ValueError(f"{of_name} must be ({sequences},), a number for each sequence of {query_name}, not "
                         f"{tuple(key_of.shape)}")
    if sequences and cu_key.shape[0] == 1:
        raise IndexError(f"{of_name} names sequences of {key_name}, which has none")


def check_index(name: str, x: Tensor, device: torch.device) -> None:
    if x.dtype not in INDEX_BITS:
        raise TypeError(f"{name} must be int32 or int64, not {x.dtype}")
    if x.dim() != 1:
        raise ValueError(f"{name} must have one dimension, not shape {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as the other arguments, not on {x.device}")


def check_dropout(dropout_p: float, seed: int) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p!r}")
    common.check_seed(seed)


def like_indices(*indices: Tensor | None) -> tuple[Tensor | None, ...]:
    """int64 for all where they differ; the kernels take one of both."""
    if len({x.dtype for x in indices if x is not None}) == 1:
        return indices
    return tuple(x if x is None else x.long() for x in indices)


def distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same as tensors of their own: torch.compile takes no tensor twice into an autograd.Function."""
    return [x if x is None else x.view_as(x) for x in tensors]


def check_offsets(name: str, cu: Tensor, rows: int, of: str) -> None:
    """Reads offsets, and raises IndexError at the first that is wrong."""
    first, last = int(cu[0]), int(cu[-1])
    if first != 0:
        raise IndexError(f"{name} starts at {first}; it must start at 0")
    falls = (cu[1:] < cu[:-1]).nonzero()
    if falls.numel():
        place = int(falls[0])
        raise IndexError(f"{name} falls from {int(cu[place])} to {int(cu[place + 1])} at place {place + 1}")
    if last != rows:
        raise IndexError(f"{name} ends at {last}; it must end at the number of rows of {of}, {rows}")


def check_key_of(name: str, key_of: Tensor | None, sequences: int) -> None:
    if key_of is None:
        return
    wrong = ((key_of < 0) | (key_of >= sequences)).nonzero()
    if wrong.numel():
        place = int(wrong[0])
        raise IndexError(f"{name} holds {int(key_of[place])} at place {place}; it must be in [0, {sequences})")


# ------------------------------------------------------------------------------------------------------------ registered ops

_library = torch.library.Library("case_fast", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor cu_query, Tensor cu_key, Tensor? key_of, Tensor? key_length"
_NUMBERS = "bool causal, float scale, float dropout_p, int seed"
# out, and the log of the softmax' divisor (Tq, H) in float32 (float64 for float64 inputs), kept for backward.
_library.define(f"{FAMILY}_forward(str backend, {_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)")
# Gradients of query, key and value.
_library.define(f"{FAMILY}_backward(str backend, Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_NUMBERS}) -> "
                "(Tensor, Tensor, Tensor)")
_forward_op = torch.ops.case_fast.packed_attention_forward.default
_backward_op = torch.ops.case_fast.packed_attention_backward.default


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.empty(query.shape[:2], dtype=dtype, device=query.device)
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


def _gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised gradients."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def are_rows_apart(x: Tensor) -> bool:
    """Whether the rows of (T, H, D) are dense, wherever each row lies: what the kernels read without a copy."""
    if x.is_contiguous():
        return True
    heads, dimension = x.shape[1:]
    dense = (x.stride(2) == 1 or dimension == 1) and (x.stride(1) == dimension or heads == 1)
    return dense and (x.stride(0) >= heads * dimension or x.shape[0] <= 1)


def rows_apart(x: Tensor) -> Tensor:
    return x if are_rows_apart(x) else x.contiguous()


def address(key_of: Tensor | None, cu_query: Tensor) -> int:
    """Of key_of; that of an empty one is 0, as of none at all, so any other that is never read stands for it."""
    return 0 if key_of is None else key_of.data_ptr() or cu_query.data_ptr()


def row_stride(x: Tensor) -> int:
    """Elements from one row to the next."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1] * x.shape[2]


def _forward(runs: str, query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, key_of: Tensor | None,
             key_length: Tensor | None, causal: bool, scale: float, dropout_p: float, seed: int
             ) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(query)
    if runs == "reference":  # torch.compile cannot look into it: what it does depends on the offsets
        _check_contents(query, key, cu_query, cu_key, key_of, key_length)
        numbers = (causal, scale, dropout_p, seed, key_of, key_length)
        return equations.packed_attention(query, key, value, cu_query, cu_key, *numbers), lse.zero_()
    attend(query, key, value, (cu_query, cu_key, key_of, key_length), (causal, scale, dropout_p, seed), out, lse)
    return out, lse


def attend(query: Tensor, key: Tensor, value: Tensor, offsets: tuple, numbers: tuple, out: Tensor, lse: Tensor) -> None:
    """Forward by the native module, into contiguous out and lse. offsets: cu_query to key_length; numbers: causal to seed."""
    query, key, value, offsets = rows_apart(query), rows_apart(key), rows_apart(value), _contiguous(*offsets)
    call = _call(query, key, value, *offsets, *numbers)
    pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), lse.data_ptr())
    if query.is_cpu:
        status = backend.native.packed_attention_forward(call, *pointers, torch.get_num_threads())
    else:
        status = on_cuda(f"{FAMILY}_forward", query.device, call, (False,), (*pointers, PLAN_AUTO))
    if status:
        _raise(status, query, key, *offsets)


def _backward(runs: str, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor,
              key_of: Tensor | None, key_length: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float,
              dropout_p: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    if runs == "reference":
        numbers = (causal, scale, dropout_p, seed, key_of, key_length)
        return plain_gradients(
            lambda *leaves: equations.packed_attention(*leaves, cu_query, cu_key, *numbers), (query, key, value), grad_out
        )
    query, key, value = rows_apart(query), rows_apart(key), rows_apart(value)
    found = _gradients(query, key, value)
    attend_backward(grad_out.contiguous(), query, key, value, (cu_query, cu_key, key_of, key_length), out.contiguous(),
                    lse.contiguous(), (causal, scale, dropout_p, seed), found)
    return found


def attend_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, offsets: tuple, out: Tensor, lse: Tensor,
                    numbers: tuple, into: tuple[Tensor, ...]) -> None:
    """Backward by the native module, as `attend`; grad_out contiguous, query, key and value as `rows_apart` makes them."""
    offsets = _contiguous(*offsets)
    call = _call(query, key, value, *offsets, *numbers)
    pointers = [x.data_ptr() for x in (query, key, value, out, lse, grad_out)]
    pointers += [y for x in into for y in (x.data_ptr(), row_stride(x))]
    if query.is_cpu:
        status = backend.native.packed_attention_backward(call, *pointers, torch.get_num_threads())
    else:
        status = on_cuda(f"{FAMILY}_backward", query.device, call, (True,), pointers)
    if status:
        _raise(status, query, key, *offsets)


def on_cuda(name: str, device: torch.device, call: tuple, of_workspace: tuple, arguments: Sequence[int]) -> int:
    """Launches a native CUDA function on torch's current stream, with its workspace; the status. Waits for nothing."""
    raise_pending()
    family = name.rpartition("_")[0]
    with torch.cuda.device(device):
        size = getattr(backend.native, f"{family}_workspace_cuda")(call, *of_workspace)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        launch = getattr(backend.native, f"{name}_cuda")
        return launch(call, *arguments, workspace.data_ptr(), size, device_flag().data_ptr(),
                      torch.cuda.current_stream().cuda_stream)


def plain_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of plain torch, from inside an op."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad_out, allow_unused=True, materialize_grads=True)


def _contiguous(*indices: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None else x.contiguous() for x in indices)


def _call(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, key_of: Tensor | None,
          key_length: Tensor | None, causal: bool, scale: float, dropout_p: float, seed: int) -> tuple:
    """The fields of struct case_fast_packed_attention."""
    rows, heads, dimension = query.shape
    return (
        cu_query.shape[0] - 1, rows, cu_key.shape[0] - 1, key.shape[0], heads, dimension, common.DTYPES[query.dtype],
        INDEX_BITS[cu_query.dtype], causal, cu_query.data_ptr(), cu_key.data_ptr(), address(key_of, cu_query),
        pointer(key_length),
        row_stride(query), row_stride(key), row_stride(value), scale, dropout_p, seed,
    )


def _raise(status: int, query: Tensor, key: Tensor, cu_query: Tensor, cu_key: Tensor, key_of: Tensor | None,
           key_length: Tensor | None) -> None:
    """The error that belongs to a status of enum case_fast_status; nothing was written."""
    if 7 <= status <= 10:
        _check_contents(query, key, cu_query, cu_key, key_of, key_length)  # says which entry
        raise IndexError(f"{('cu_query', 'cu_key', 'key_of', 'key_length')[status - 7]} names what does not exist")
    refuse(FAMILY, status)


def refuse(family: str, status: int) -> None:
    if status == 5:
        raise MemoryError(f"{family} found no memory for its workspace")
    if status == 6:
        raise RuntimeError(f"{family}: CUDA refused a launch; CUDA_LAUNCH_BLOCKING=1 shows where an earlier error arose")
    raise RuntimeError(f"{family}: the native kernel refused its arguments (status {status})")


for _device in ("CPU", "CUDA"):
    _library.impl(f"{FAMILY}_forward", _forward, _device)
    _library.impl(f"{FAMILY}_backward", _backward, _device)
torch.library.register_fake(f"case_fast::{FAMILY}_forward", lambda runs, query, *rest: _outputs(query), lib=_library)
torch.library.register_fake(
    f"case_fast::{FAMILY}_backward",
    lambda runs, grad_out, query, key, value, *rest: _gradients(query, key, value),
    lib=_library,
)


# --------------------------------------------------------------------------------------------------------------- autograd


class _PackedAttention(torch.autograd.Function):
    """Keeps one number a query row and head, and computes the weights again."""

    @staticmethod
    def forward(ctx, runs, query, key, value, cu_query, cu_key, key_of, key_length, causal, scale, dropout_p, seed):
        tensors, numbers = (query, key, value, cu_query, cu_key, key_of, key_length), (causal, scale, dropout_p, seed)
        out, lse = common.call(_forward_op, _forward, runs, *tensors, *numbers)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.runs, ctx.numbers = runs, numbers
        return out

    @staticmethod
    def backward(ctx, grad_out):
        runs, numbers = ctx.runs, ctx.numbers
        found = common.gradients(
            FAMILY, lambda *x: common.call(_backward_op, _backward, runs, *x, *numbers), (grad_out, *ctx.saved_tensors)
        )
        return None, *found, *[None] * 8
