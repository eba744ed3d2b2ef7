"""Relation-biased sparse graph attention (Eq. 1-2) with gradients, on CPU and GPU.

The equation in plain torch is `case_fast.equations.graph_attention`: the oracle of the tests, and what runs where there is
no kernel. The registered ops `case_fast::graph_attention_forward` and `_backward` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from case_fast import equations
from case_fast.ops import backend, common
from case_fast.ops.common import pointer
from case_fast.ops.device_flag import device_flag, raise_pending

FAMILY = "graph_attention"
MAX_DIMENSION = 256  # of a head, in the GPU kernels
PLAN_AUTO = 0  # enum case_fast_plan of cuda.h
_INDEX_BITS = {torch.int32: 32, torch.int64: 64}


def graph_attention(query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor,
                    relation: Tensor | None = None, relation_query: Tensor | None = None,
                    relation_key: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0,
                    seed: int = 0, validate: bool | None = None) -> Tensor:
    """out_i = sum_k softmax_k( scale * (q_i + relation_query[r]) . (k_k + relation_key[r]) ) v_k over the neighbours k of i.

    Replaces, with r the (V, V) relations and m a mask of the edges (CASE, Eq. 1-2; "ihd" and so on per head),
    ``softmax(masked_fill(scale * ((q[:, None] + rq[r]) * (k[None] + rk[r])).sum(-1), ~m, -inf), 1) @ v``
    by O(E H + R H) memory beyond inputs, outputs and gradients. A vertex without neighbours gives zeros; parallel edges
    count separately. Without ``relation`` it is the plain sparse attention that G_EC uses.

    Args:
        query, key, value: (V, H, D), one dtype and device. float32 and float64; float16 and bfloat16 are accumulated in
            float32 on GPU, and computed in float32 on CPU. Any strides. On GPU a head of D > 256 runs on the reference backend.
        indptr, indices: (V + 1,) and (E,), int32 or int64: the neighbours of vertex i are indices[indptr[i]:indptr[i + 1]].
        relation: (E,) int32 or int64 in [0, R); relation_query, relation_key: (R, H, D). All three or none.
        scale: default D ** -0.5.
        dropout_p, seed: probability in [0, 1) that an attention weight is dropped; the others are divided by 1 - p. Which
            ones is a function of (seed, edge, head) alone, the same on every backend; 0 <= seed < 2^63.
        validate: whether the contents of indptr, indices and relation are checked. Default: on CPU always, elsewhere
            never, since reading the answer would stop the device's queue. The native CPU kernels always check.

    Returns:
        (V, H, D), in the dtype of the inputs. Under autocast: in autocast's dtype on GPU, in float32 on CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        IndexError: indptr does not rise from 0 to E, or an index or relation is out of range. All before any kernel runs.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call.

    Deterministic: equal inputs give equal bits, forward and backward, whatever the number of threads. No second derivative
    but on the reference backend.
    """
    device_type, given = query.device.type, query.dtype
    compute, differs = common.compute_dtype(query)
    if differs:
        query, key, value, relation_query, relation_key = common.cast(
            compute, query, key, value, relation_query, relation_key
        )
    _check(query, key, value, indptr, indices, relation, relation_query, relation_key)
    vertices, _, dimension = query.shape
    scale = dimension**-0.5 if scale is None else scale
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be a finite number >= 0, not {scale!r}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p!r}")
    common.check_seed(seed)
    if not indptr.dtype == indices.dtype == (indices.dtype if relation is None else relation.dtype):
        indptr, indices, relation = (x if x is None else x.long() for x in (indptr, indices, relation))

    beyond = "" if dimension <= MAX_DIMENSION or device_type == "cpu" else f"heads of more than {MAX_DIMENSION} dimensions"
    runs = backend.choose(FAMILY, device_type, beyond)
    if validate is None:
        validate = device_type == "cpu" and not torch.compiler.is_compiling()
    if validate and not (runs == "native" and device_type == "cpu"):
        _check_contents(indptr, indices, relation, vertices, relation_query)
    arguments = (query, key, value, indptr, indices, relation, relation_query, relation_key, scale, dropout_p, seed)
    if runs == "reference":
        with torch.autocast(device_type, enabled=False):
            out = equations.graph_attention(*arguments)
    elif torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
        or (relation is not None and (relation_query.requires_grad or relation_key.requires_grad))
    ):
        out = _GraphAttention.apply(runs, *arguments)
    else:
        out = common.call(_forward_op, _forward, runs, *arguments)[0]
    return common.restored(out, given)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None,
           relation_query: Tensor | None, relation_key: Tensor | None) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    shape, dtype, device = query.shape, query.dtype, query.device
    if dtype not in common.DTYPES:
        raise TypeError(f"query must be float32, float64, float16 or bfloat16, not {dtype}")
    if len(shape) != 3 or shape[1] == 0 or shape[2] == 0:
        raise ValueError(f"query must be (V, H, D) with H and D above 0, not {tuple(shape)}")
    _check_like("key", key, shape, dtype, device)
    _check_like("value", value, shape, dtype, device)
    _check_index("indptr", indptr, device)
    _check_index("indices", indices, device)
    if indptr.shape[0] != shape[0] + 1:
        raise ValueError(f"indptr must be (V + 1,) = ({shape[0] + 1},) as query is, not {tuple(indptr.shape)}")
    if relation is None:
        if relation_query is not None or relation_key is not None:
            name = "relation_query" if relation_query is not None else "relation_key"
            raise ValueError(f"{name} is given without relation, which says what edge has which row of it")
        return
    _check_index("relation", relation, device)
    if relation.shape != indices.shape:
        raise ValueError(f"relation must be (E,) = {tuple(indices.shape)} as indices, not {tuple(relation.shape)}")
    if relation_query is None or relation_key is None:
        name = "relation_query" if relation_query is None else "relation_key"
        raise ValueError(f"relation needs {name}, (R, H, D)")
    if relation_query.dim() != 3 or relation_query.shape[1:] != shape[1:]:
        raise ValueError(f"relation_query must be (R, {shape[1]}, {shape[2]}), not {tuple(relation_query.shape)}")
    _check_like("relation_query", relation_query, relation_query.shape, dtype, device)
    _check_like("relation_key", relation_key, relation_query.shape, dtype, device)
    if relation_query.shape[0] == 0 and relation.shape[0] > 0:
        raise IndexError("relation names rows of relation_query, which has none")


def _check_like(name: str, x: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} as query, not {x.dtype}")
    if x.shape != shape:
        like = "relation_query" if name == "relation_key" else "query"
        raise ValueError(f"{name} must be {tuple(shape)} as {like}, not {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as query, not on {x.device}")


def _check_index(name: str, x: Tensor, device: torch.device) -> None:
    if x.dtype not in _INDEX_BITS:
        raise TypeError(f"{name} must be int32 or int64, not {x.dtype}")
    if x.dim() != 1:
        raise ValueError(f"{name} must have one dimension, not shape {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as query, not on {x.device}")


def _check_contents(indptr: Tensor, indices: Tensor, relation: Tensor | None, vertices: int,
                    relation_query: Tensor | None) -> None:
    """Reads indptr, indices and relation, and raises IndexError at the first entry that names nothing."""
    edges = indices.shape[0]
    first, last = int(indptr[0]), int(indptr[-1])
    if first != 0:
        raise IndexError(f"indptr starts at {first}; it must start at 0")
    falls = (indptr[1:] < indptr[:-1]).nonzero()
    if falls.numel():
        place = int(falls[0])
        raise IndexError(f"indptr falls from {int(indptr[place])} to {int(indptr[place + 1])} at place {place + 1}")
    if last != edges:
        raise IndexError(f"indptr ends at {last}; it must end at the number of indices, {edges}")
    rows = {"indices": (indices, vertices)}
    if relation is not None and relation_query is not None:
        rows["relation"] = (relation, relation_query.shape[0])
    for name, (index, size) in rows.items():
        wrong = ((index < 0) | (index >= size)).nonzero()
        if wrong.numel():
            place = int(wrong[0])
            raise IndexError(f"{name} holds {int(index[place])} at place {place}; it must be in [0, {size})")


# ------------------------------------------------------------------------------------------------------------ registered ops

_library = torch.library.Library("case_fast", "FRAGMENT")
_INPUTS = ("Tensor query, Tensor key, Tensor value, Tensor indptr, Tensor indices, Tensor? relation, Tensor? relation_query, "
           "Tensor? relation_key")
# out and weights (E, H): after the softmax, before dropout; float32 (float64 for float64 inputs), kept for backward.
_library.define(f"{FAMILY}_forward(str backend, {_INPUTS}, float scale, float dropout_p, SymInt seed) -> (Tensor, Tensor)")
# Gradients of query, key and value, and of relation_query and relation_key where they are given.
_library.define(f"{FAMILY}_backward(str backend, Tensor grad_out, {_INPUTS}, Tensor weights, float scale, float dropout_p, "
                "SymInt seed) -> Tensor[]")
_forward_op = torch.ops.case_fast.graph_attention_forward.default
_backward_op = torch.ops.case_fast.graph_attention_backward.default


def _outputs(query: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised out and weights."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.empty((indices.shape[0], query.shape[1]), dtype=dtype, device=query.device)
    return torch.empty_like(query, memory_format=torch.contiguous_format), weights


def _gradients(*inputs: Tensor | None) -> list[Tensor]:
    """Uninitialised gradients of the inputs that are there."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]


def _forward(runs: str, query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None,
             relation_query: Tensor | None, relation_key: Tensor | None, scale: float, dropout_p: float, seed: int
             ) -> tuple[Tensor, Tensor]:
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    indptr, indices = indptr.contiguous(), indices.contiguous()
    if relation is not None:
        relation, relation_query, relation_key = relation.contiguous(), relation_query.contiguous(), relation_key.contiguous()
    if runs == "triton":
        from case_fast.ops import graph_attention_triton as triton

        return triton.forward(
            query, key, value, indptr, indices, relation, relation_query, relation_key, scale, dropout_p, seed
        )
    out, weights = _outputs(query, indices)
    graph = _graph(query, indptr, indices, relation, relation_query, scale, dropout_p, seed)
    pointers = (
        query.data_ptr(), key.data_ptr(), value.data_ptr(), pointer(relation_query), pointer(relation_key),
        out.data_ptr(), weights.data_ptr(),
    )
    if query.is_cpu:
        status = backend.native.graph_attention_forward(graph, *pointers, torch.get_num_threads())
    else:
        status = _on_cuda("forward", query.device, graph, pointers)
    if status:
        _raise(status, indptr, indices, relation, query.shape[0], relation_query)
    return out, weights


def _backward(runs: str, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor,
              relation: Tensor | None, relation_query: Tensor | None, relation_key: Tensor | None, weights: Tensor,
              scale: float, dropout_p: float, seed: int) -> list[Tensor]:
    grad_out, query, key, value = grad_out.contiguous(), query.contiguous(), key.contiguous(), value.contiguous()
    indptr, indices, weights = indptr.contiguous(), indices.contiguous(), weights.contiguous()
    if relation is not None:
        relation, relation_query, relation_key = relation.contiguous(), relation_query.contiguous(), relation_key.contiguous()
    if runs == "triton":
        from case_fast.ops import graph_attention_triton as triton

        found = triton.backward(
            grad_out, query, key, value, indptr, indices, relation, relation_query, relation_key, weights,
            scale, dropout_p, seed,
        )
        return [x for x in found if x is not None]
    found = _gradients(query, key, value, relation_query, relation_key)
    graph = _graph(query, indptr, indices, relation, relation_query, scale, dropout_p, seed)
    pointers = (
        query.data_ptr(), key.data_ptr(), value.data_ptr(), pointer(relation_query), pointer(relation_key),
        weights.data_ptr(), grad_out.data_ptr(), *[x.data_ptr() for x in found], *(() if relation is not None else (0, 0)),
    )
    if query.is_cpu:
        status = backend.native.graph_attention_backward(graph, *pointers, torch.get_num_threads())
    else:
        status = _on_cuda("backward", query.device, graph, pointers)
    if status:
        _raise(status, indptr, indices, relation, query.shape[0], relation_query)
    return found


def _graph(query: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None, relation_query: Tensor | None,
           scale: float, dropout_p: float, seed: int) -> tuple:
    """The fields of struct case_fast_graph."""
    vertices, heads, dimension = query.shape
    relations = 0 if relation_query is None else relation_query.shape[0]
    return (
        vertices, indices.shape[0], relations, heads, dimension, common.DTYPES[query.dtype], _INDEX_BITS[indices.dtype],
        indptr.data_ptr(), indices.data_ptr(), pointer(relation), scale, dropout_p, seed,
    )


def _on_cuda(direction: str, device: torch.device, graph: tuple, pointers: tuple) -> int:
    """Launches a native CUDA kernel on torch's current stream, with its workspace; the status. Waits for nothing."""
    raise_pending()
    with torch.cuda.device(device):
        size = backend.native.graph_attention_workspace_cuda(graph, direction == "backward", PLAN_AUTO)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        call = getattr(backend.native, f"graph_attention_{direction}_cuda")
        return call(graph, *pointers, PLAN_AUTO, workspace.data_ptr(), size, device_flag().data_ptr(),
                    torch.cuda.current_stream().cuda_stream)


def _raise(status: int, indptr: Tensor, indices: Tensor, relation: Tensor | None, vertices: int,
           relation_query: Tensor | None) -> None:
    """The error that belongs to a status of enum case_fast_status; nothing was written."""
    if status in (1, 2, 3):
        _check_contents(indptr, indices, relation, vertices, relation_query)  # says which entry
        raise IndexError(f"{('indptr', 'indices', 'relation')[status - 1]} names what does not exist")
    if status == 5:
        raise MemoryError("graph_attention found no memory for its workspace")
    if status == 6:
        raise RuntimeError("graph_attention: CUDA refused a launch; CUDA_LAUNCH_BLOCKING=1 shows where an earlier error arose")
    raise RuntimeError(f"graph_attention: the native kernel refused its arguments (status {status})")


def _backward_fake(runs, grad_out, query, key, value, indptr, indices, relation, relation_query, relation_key, *rest):
    return _gradients(query, key, value, relation_query, relation_key)


for _device in ("CPU", "CUDA"):
    _library.impl(f"{FAMILY}_forward", _forward, _device)
    _library.impl(f"{FAMILY}_backward", _backward, _device)
torch.library.register_fake(
    f"case_fast::{FAMILY}_forward", lambda runs, query, key, value, indptr, indices, *rest: _outputs(query, indices), lib=_library
)
torch.library.register_fake(f"case_fast::{FAMILY}_backward", _backward_fake, lib=_library)


# --------------------------------------------------------------------------------------------------------------- autograd


class _GraphAttention(torch.autograd.Function):
    """Keeps the weights (E, H): cheaper than computing the scores again."""

    @staticmethod
    def forward(ctx, runs, query, key, value, indptr, indices, relation, relation_query, relation_key, scale, dropout_p, seed):
        tensors = (query, key, value, indptr, indices, relation, relation_query, relation_key)
        out, weights = common.call(_forward_op, _forward, runs, *tensors, scale, dropout_p, seed)
        ctx.save_for_backward(*tensors, weights)
        ctx.runs, ctx.numbers = runs, (scale, dropout_p, seed)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        def call(*tensors):
            return common.call(_backward_op, _backward, ctx.runs, *tensors, *ctx.numbers)

        found = common.gradients(FAMILY, call, (grad_out, *ctx.saved_tensors))
        query, key, value, relation_query, relation_key = *found, *[None] * (5 - len(found))
        return None, query, key, value, None, None, None, relation_query, relation_key, None, None, None
