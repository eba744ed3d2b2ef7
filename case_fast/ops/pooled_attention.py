"""Attention of one query a sequence and head over rows that all heads share: what an encoder's last layer needs where only the
first row of each sequence goes on.

With W_key,h and W_value,h a head's projections and n_j the rows of a sequence, its score q_h . (W_key,h n_j) is
(W_key,h^T q_h) . n_j, and its output sum_j p_j W_value,h n_j is W_value,h (sum_j p_j n_j): projections of one row a sequence in
place of one for each row, and between them this op.

The equation in plain torch is `case_fast.ops.reference.pooled_attention`: the oracle of the tests, and what runs where there is
no kernel. The registered ops `case_fast::pooled_attention_forward` and `_backward` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from case_fast.ops import backend, common, reference

FAMILY = "pooled_attention"
MAX_WIDTH = 1024  # of a row, in the GPU kernels


@common.public
def pooled_attention(query: Tensor, rows: Tensor, cu: Tensor, scale: float, dropout_p: float = 0.0, seed: int | Tensor = 0,
                     validate: bool | None = None) -> Tensor:
    """out[s, h] = sum_j softmax_j( scale * query[s, h] . rows[j] ) rows[j] over the rows j of sequence s.

    Replaces ``packed_attention`` of one query a sequence with keys and values (T, H, d) that are ``rows`` for every head.

    Args:
        query, rows: (s, H, d), (T, d); one dtype and device. float32 and float64; half precision is computed in float32 on CPU.
            Any strides; dense rows are read where they lie. On GPU d > 1024 runs on the reference backend.
        cu: (s + 1,) int32 or int64, from 0 to T: where each sequence starts.
        scale: at least 0; that of the head's own dimension, which is not d, so there is no default.
        dropout_p, seed: probability in [0, 1) that an attention weight is dropped; the others are divided by 1 - p. Which
            ones is a function of (seed, head, e) alone, the same on every backend and of ``packed_attention``, with e = s *
            (the longest sequence) + the row's place in its sequence. seed: in [0, 2^63), or an int64 tensor of one element on
            the device of query, whose value, modulo 2^63, is read when the kernels run.
        validate: whether the contents of cu are checked. Default: on CPU always, elsewhere never, since reading the answer
            would stop the device's queue. The native CPU kernels always check.

    Returns:
        (s, H, d), in the dtype of the inputs. Under autocast: in autocast's dtype on GPU, in float32 on CPU. A sequence
        without rows gives zeros.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        IndexError: cu does not rise from 0 to T. Before any kernel runs.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call.

    Deterministic: equal inputs give equal bits, forward and backward, whatever the number of threads; without dropout those of
    a sequence do not depend on the sequences beside it. No second derivative but on the reference backend.
    """
    device_type, given = common.device_type(query), query.dtype
    compute, differs = common.compute_dtype(query)
    if differs:
        query, rows = common.cast(compute, query, rows)
    _check(query, rows, cu)
    scale = common.finite("scale", scale)
    dropout_p = common.probability("dropout_p", dropout_p)
    number, seed_at = common.seed_pair(seed, query.device)

    beyond = "" if device_type == "cpu" or rows.shape[1] <= MAX_WIDTH else f"rows of more than {MAX_WIDTH} elements"
    runs = backend.choose(FAMILY, device_type, beyond)
    compiling = torch.compiler.is_compiling()
    if common.reads(validate, runs, device_type):
        common.check_offsets("cu", cu, rows.shape[0], "rows")
    numbers = (scale, dropout_p, number)
    if runs == "reference" and not compiling:
        with torch.autocast(device_type, enabled=False):
            out = reference.pooled_attention(query, rows, cu, scale, dropout_p, reference.seed_of(number, seed_at))
    elif torch.is_grad_enabled() and (query.requires_grad or rows.requires_grad):
        out = _PooledAttention.apply(runs, query, rows, cu, *numbers, seed_at)
    else:
        out = common.call(_forward_op, _forward, runs, query, rows, cu, *numbers, seed_at)[0]
    return common.restored(out, given)


def _check(query: Tensor, rows: Tensor, cu: Tensor) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    shape, device = query.shape, query.device
    common.check_dtype("query", query)
    if len(shape) != 3 or shape[1] == 0 or shape[2] == 0:
        raise ValueError(f"query must be (s, H, d) with H and d above 0, not {tuple(shape)}")
    common.check_like("rows", rows, query.dtype, device, "query")
    if rows.dim() != 2 or rows.shape[1] != shape[2]:
        raise ValueError(f"rows must be (T, {shape[2]}) as query is (s, H, d), not {tuple(rows.shape)}")
    common.check_index("cu", cu, device, "query")
    if cu.shape[0] != shape[0] + 1:
        raise ValueError(f"cu must be ({shape[0] + 1},), one more than query has sequences, not {tuple(cu.shape)}")


# ------------------------------------------------------------------------------------------------------------ registered ops


def _gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised gradients."""
    return tuple(common.empty_like(*inputs))


def _forward(runs: str, query: Tensor, rows: Tensor, cu: Tensor, scale: float, dropout_p: float, seed: int,
             seed_at: Tensor | None) -> tuple[Tensor, Tensor]:
    if runs == "reference":  # torch.compile cannot look into it: what it does depends on the offsets
        common.check_offsets("cu", cu, rows.shape[0], "rows")
        out = reference.pooled_attention(query, rows, cu, scale, dropout_p, reference.seed_of(seed, seed_at))
        return out, common.attended_outputs(query)[1].zero_()
    query, rows, cu = _dense(query), _dense(rows), cu.contiguous()
    numbers = (scale, dropout_p, seed, seed_at)
    if runs == "triton":
        from case_fast.ops import pooled_attention_triton as triton

        return triton.forward(query, rows, cu, *numbers)
    out, lse = common.attended_outputs(query)
    _run("forward", query, rows, cu, numbers, (out.data_ptr(), lse.data_ptr()))
    return out, lse


def _backward(runs: str, grad_out: Tensor, query: Tensor, rows: Tensor, cu: Tensor, out: Tensor, lse: Tensor, scale: float,
              dropout_p: float, seed: int, seed_at: Tensor | None) -> tuple[Tensor, Tensor]:
    if runs == "reference":
        numbers = (scale, dropout_p, reference.seed_of(seed, seed_at))
        return common.plain_gradients(
            lambda *leaves: reference.pooled_attention(*leaves, cu, *numbers), (query, rows), grad_out
        )
    grad_out, query, rows, cu = _dense(grad_out), _dense(query), _dense(rows), cu.contiguous()
    out, lse, numbers = out.contiguous(), lse.contiguous(), (scale, dropout_p, seed, seed_at)
    if runs == "triton":
        from case_fast.ops import pooled_attention_triton as triton

        return triton.backward(grad_out, query, rows, cu, out, lse, *numbers)
    grad_query, grad_rows = found = _gradients(query, rows)
    others = (out.data_ptr(), lse.data_ptr(), grad_out.data_ptr(), grad_out.stride(0), grad_out.stride(1), grad_query.data_ptr(),
              grad_rows.data_ptr())
    _run("backward", query, rows, cu, numbers, others)
    return found


def _run(direction: str, query: Tensor, rows: Tensor, cu: Tensor, numbers: tuple, others: tuple[int, ...]) -> None:
    """Runs the native kernel. numbers: scale to seed_at; others: what its arguments are beside query and rows."""
    *numbers, seed_at = numbers
    sequences, heads, width = query.shape
    call = (  # struct case_fast_pooled_attention
        sequences, rows.shape[0], heads, width, common.DTYPES[query.dtype], common.INDEX_BITS[cu.dtype], cu.data_ptr(),
        query.stride(0), query.stride(1), rows.stride(0), *numbers, 0 if seed_at is None else seed_at.data_ptr(),
    )
    status = common.run_native(f"{FAMILY}_{direction}", query, call, (query.data_ptr(), rows.data_ptr(), *others))
    if status:
        common.refuse_contents(FAMILY, status, {14: "cu"}, lambda: common.check_offsets("cu", cu, rows.shape[0], "rows"))


def _dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it where the elements of a row do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


_INPUTS, _NUMBERS = "Tensor query, Tensor rows, Tensor cu", "float scale, float dropout_p, SymInt seed, Tensor? seed_at"
# out, and the log of the softmax' divisor (s, H) in the dtype of sums, kept for backward.
_forward_op = common.register(f"{FAMILY}_forward(str backend, {_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)", _forward,
                              lambda runs, query, *rest: common.attended_outputs(query))
# Gradients of query and rows.
_backward_op = common.register(
    f"{FAMILY}_backward(str backend, Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_NUMBERS}) -> (Tensor, Tensor)",
    _backward, lambda runs, grad_out, query, rows, *rest: _gradients(query, rows),
)


# --------------------------------------------------------------------------------------------------------------- autograd


class _PooledAttention(torch.autograd.Function):
    """Keeps one number a sequence and head, and computes the weights again."""

    @staticmethod
    def forward(ctx, runs, query, rows, cu, scale, dropout_p, seed, seed_at):
        out, lse = common.call(_forward_op, _forward, runs, query, rows, cu, scale, dropout_p, seed, seed_at)
        ctx.save_for_backward(query, rows, cu, out, lse, seed_at)
        ctx.runs, ctx.numbers = runs, (scale, dropout_p, seed)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        runs, numbers = ctx.runs, ctx.numbers

        def call(*tensors):
            *tensors, seed_at = tensors
            return common.call(_backward_op, _backward, runs, *tensors, *numbers, seed_at)

        return None, *common.gradients(FAMILY, call, (grad_out, *ctx.saved_tensors)), *[None] * 5
