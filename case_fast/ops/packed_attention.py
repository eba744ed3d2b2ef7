"""Attention of packed sequences, causal or not, with gradients: what encoders and decoders need in place of padding.

The equation in plain torch is `case_fast.ops.reference.packed_attention`: the oracle of the tests, and what runs where there is
no kernel. The registered ops `case_fast::packed_attention_forward` and `_backward` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from case_fast.arguments import truth
from case_fast.ops import backend, common, reference, transforms
from case_fast.ops.common import row_stride, rows_apart

FAMILY = "packed_attention"
PLAN_AUTO = 0  # enum case_fast_attention_plan


@common.public
def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, causal: bool = False,
                     scale: float | None = None, dropout_p: float = 0.0, seed: int | Tensor = 0, key_of: Tensor | None = None,
                     key_length: Tensor | None = None, validate: bool | None = None) -> Tensor:
    """out_i = sum_j softmax_j( scale * q_i . k_j ) v_j over the keys j of i's own sequence, per head.

    Replaces, for sequences padded to (B, H, n, D) and (B, H, m, D) with a mask of what is padding,
    ``scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)`` by O(Tq H) memory beyond inputs, outputs and
    gradients. A query that sees no key gives zeros.

    Args:
        query, key, value: (Tq, H, D), (Tk, H, D), (Tk, H, D); one dtype and device. float32 and float64; half precision is
            computed in float32 on CPU. Any strides; rows that lie apart are not copied. On GPU a head of D > 256 runs on the
            reference backend.
        cu_query, cu_key: (B + 1,), (S + 1,), int32 or int64, from 0 to Tq and Tk: where each sequence starts. S = B
            unless ``key_of`` is given.
        causal: the last query of a sequence sees all its keys, the one before it all but the last, and so on.
        scale: default D ** -0.5.
        dropout_p, seed: probability in [0, 1) that an attention weight is dropped; the others are divided by 1 - p. Which
            ones is a function of (seed, head, e) alone, the same on every backend, with e = query row * (the longest key
            sequence by cu_key) + the key's place in its sequence. seed: in [0, 2^63), or an int64 tensor of one element on the
            device of query, whose value, modulo 2^63, is read when the kernels run.
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
    device_type, given = common.device_type(query), query.dtype
    compute, differs = common.compute_dtype(query)
    if differs:
        query, key, value = common.cast(compute, query, key, value)
    _check(query, key, value, cu_query, cu_key, key_of, key_length)
    causal, dimension = truth("causal", causal), query.shape[2]
    scale = dimension**-0.5 if scale is None else scale
    scale = common.finite("scale", scale)
    dropout_p = common.probability("dropout_p", dropout_p)
    number, seed_at = common.seed_pair(seed, query.device)
    cu_query, cu_key, key_of, key_length = common.like_indices(cu_query, cu_key, key_of, key_length)

    runs = backend.choose(FAMILY, device_type, common.beyond_gpu(dimension, device_type))
    compiling = torch.compiler.is_compiling()
    if common.reads(validate, runs, device_type):
        _check_contents(query, key, cu_query, cu_key, key_of, key_length)
    tensors = (query, key, value, cu_query, cu_key, key_of, key_length)
    numbers = (causal, scale, dropout_p, number, seed_at)
    if runs == "reference" and not compiling:
        with torch.autocast(device_type, enabled=False):
            seed = reference.seed_of(number, seed_at)
            out = reference.packed_attention(*tensors[:5], causal, scale, dropout_p, seed, key_of, key_length)
    elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out = _PackedAttention.apply(runs, *(common.distinct(tensors) if compiling else tensors), *numbers)
    else:
        out = common.call(_forward_op, _forward, runs, *tensors, *numbers)[0]
    return common.restored(out, given)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, key_of: Tensor | None,
           key_length: Tensor | None) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    shape, dtype, device = query.shape, query.dtype, query.device
    common.check_dtype("query", query)
    if len(shape) != 3 or shape[1] == 0 or shape[2] == 0:
        raise ValueError(f"query must be (Tq, H, D) with H and D above 0, not {tuple(shape)}")
    if key.dim() != 3 or key.shape[1:] != shape[1:]:
        raise ValueError(f"key must be (Tk, {shape[1]}, {shape[2]}) as query is (Tq, H, D), not {tuple(key.shape)}")
    common.check_like("key", key, dtype, device, "query")
    common.check_like("value", value, dtype, device, "key")
    if value.shape != key.shape:
        raise ValueError(f"value must be {tuple(key.shape)} as key asks for, not {tuple(value.shape)}")
    common.check_sequences("cu_query", cu_query, "cu_key", cu_key, "key_of", key_of, device)
    if key_length is not None:
        common.check_index("key_length", key_length, device, "the other arguments")
        if key_length.shape[0] != cu_key.shape[0] - 1:
            raise ValueError(f"key_length must be ({cu_key.shape[0] - 1},), a number for each sequence of cu_key, not "
                             f"{tuple(key_length.shape)}")


@transforms.reading
def _check_contents(query: Tensor, key: Tensor, cu_query: Tensor, cu_key: Tensor, key_of: Tensor | None,
                    key_length: Tensor | None) -> None:
    """Reads all offsets and numbers, and raises IndexError at the first that is wrong."""
    common.check_offsets("cu_query", cu_query, query.shape[0], "rows of query")
    common.check_offsets("cu_key", cu_key, key.shape[0], "rows of key")
    if key_of is not None:
        common.check_within("key_of", key_of, cu_key.shape[0] - 1)
    if key_length is not None:
        wrong = ((key_length < 0) | (key_length > cu_key.diff())).nonzero()
        if wrong.numel():
            place = int(wrong[0])
            most = int(cu_key[place + 1] - cu_key[place])
            raise IndexError(f"key_length holds {int(key_length[place])} at place {place}; it must be in [0, {most}]")


# ------------------------------------------------------------------------------------------------------------ registered ops


def _gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised gradients."""
    return tuple(common.empty_like(*inputs))


def _forward(runs: str, query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, key_of: Tensor | None,
             key_length: Tensor | None, causal: bool, scale: float, dropout_p: float, seed: int, seed_at: Tensor | None
             ) -> tuple[Tensor, Tensor]:
    out, lse = common.attended_outputs(query)
    if runs == "reference":  # torch.compile cannot look into it: what it does depends on the offsets
        _check_contents(query, key, cu_query, cu_key, key_of, key_length)
        numbers = (causal, scale, dropout_p, reference.seed_of(seed, seed_at), key_of, key_length)
        return reference.packed_attention(query, key, value, cu_query, cu_key, *numbers), lse.zero_()
    attend(query, key, value, (cu_query, cu_key, key_of, key_length), (causal, scale, dropout_p, seed, seed_at), out, lse)
    return out, lse


def attend(query: Tensor, key: Tensor, value: Tensor, offsets: tuple, numbers: tuple, out: Tensor, lse: Tensor) -> None:
    """Forward by the native module, into contiguous out and lse. offsets: cu_query to key_length; numbers: causal to seed_at."""
    query, key, value = rows_apart(query), rows_apart(key), rows_apart(value)
    _run("forward", query, key, value, offsets, numbers, (out.data_ptr(), lse.data_ptr()), (PLAN_AUTO,))


def _backward(runs: str, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor,
              key_of: Tensor | None, key_length: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float,
              dropout_p: float, seed: int, seed_at: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if runs == "reference":
        numbers = (causal, scale, dropout_p, reference.seed_of(seed, seed_at), key_of, key_length)
        return common.plain_gradients(
            lambda *leaves: reference.packed_attention(*leaves, cu_query, cu_key, *numbers), (query, key, value), grad_out
        )
    query, key, value = rows_apart(query), rows_apart(key), rows_apart(value)
    found = _gradients(query, key, value)
    attend_backward(grad_out.contiguous(), query, key, value, (cu_query, cu_key, key_of, key_length), out.contiguous(),
                    lse.contiguous(), (causal, scale, dropout_p, seed, seed_at), found)
    return found


def attend_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, offsets: tuple, out: Tensor, lse: Tensor,
                    numbers: tuple, into: tuple[Tensor, ...]) -> None:
    """Backward by the native module, as `attend`; grad_out contiguous, query, key and value as `rows_apart` makes them."""
    gradients = [y for x in into for y in (x.data_ptr(), row_stride(x))]
    _run("backward", query, key, value, offsets, numbers, (out.data_ptr(), lse.data_ptr(), grad_out.data_ptr(), *gradients), ())


def _run(direction: str, query: Tensor, key: Tensor, value: Tensor, offsets: tuple[Tensor | None, ...], numbers: tuple,
         others: tuple[int, ...], on_cuda: tuple[int, ...]) -> None:
    """Runs the native kernel. others: what its arguments are beside query, key and value."""
    cu_query, cu_key, key_of, key_length = offsets = common.contiguous(*offsets)
    rows, heads, dimension = query.shape
    causal, *rest, seed_at = numbers
    call = (  # struct case_fast_packed_attention
        cu_query.shape[0] - 1, rows, cu_key.shape[0] - 1, key.shape[0], heads, dimension, common.DTYPES[query.dtype],
        common.INDEX_BITS[cu_query.dtype], causal, cu_query.data_ptr(), cu_key.data_ptr(), common.pointer_of(key_of, cu_query),
        0 if key_length is None else key_length.data_ptr(), row_stride(query), row_stride(key), row_stride(value), *rest,
        *common.pointers(seed_at),
    )
    arguments = (query.data_ptr(), key.data_ptr(), value.data_ptr(), *others)
    status = common.run_native(f"{FAMILY}_{direction}", query, call, arguments, (direction == "backward",), on_cuda)
    if status:
        common.refuse_contents(FAMILY, status, {7: "cu_query", 8: "cu_key", 9: "key_of", 10: "key_length"},
                               lambda: _check_contents(query, key, *offsets))


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor cu_query, Tensor cu_key, Tensor? key_of, Tensor? key_length"
_NUMBERS = "bool causal, float scale, float dropout_p, SymInt seed, Tensor? seed_at"  # SymInt: a new seed does not compile again
# out, and the log of the softmax' divisor (Tq, H) in the dtype of sums, kept for backward.
_forward_op = common.register(f"{FAMILY}_forward(str backend, {_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)", _forward,
                              lambda runs, query, *rest: common.attended_outputs(query))
# Gradients of query, key and value.
_backward_op = common.register(
    f"{FAMILY}_backward(str backend, Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    _backward, lambda runs, grad_out, query, key, value, *rest: _gradients(query, key, value),
)


# --------------------------------------------------------------------------------------------------------------- autograd


class _PackedAttention(torch.autograd.Function):
    """Keeps one number a query row and head, and computes the weights again."""

    @staticmethod
    def forward(ctx, runs, query, key, value, cu_query, cu_key, key_of, key_length, causal, scale, dropout_p, seed, seed_at):
        tensors, numbers = (query, key, value, cu_query, cu_key, key_of, key_length), (causal, scale, dropout_p, seed)
        out, lse = common.call(_forward_op, _forward, runs, *tensors, *numbers, seed_at)
        ctx.save_for_backward(*tensors, out, lse, seed_at)
        ctx.runs, ctx.numbers = runs, numbers
        return out

    @staticmethod
    def backward(ctx, grad_out):
        runs, numbers = ctx.runs, ctx.numbers

        def call(*tensors):
            *tensors, seed_at = tensors
            return common.call(_backward_op, _backward, runs, *tensors, *numbers, seed_at)

        return None, *common.gradients(FAMILY, call, (grad_out, *ctx.saved_tensors)), *[None] * 9
