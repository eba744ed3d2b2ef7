"""Relation-biased sparse graph attention (Eq. 1-2) with gradients, on CPU and GPU.

The equation in plain torch is `case_fast.ops.reference.graph_attention`: the oracle of the tests, and what runs where there is
no kernel. The registered ops `case_fast::graph_attention_forward` and `_backward` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from case_fast.ops import backend, common, reference

FAMILY = "graph_attention"
PLAN_AUTO = 0  # enum case_fast_plan


@common.public
def graph_attention(query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor,
                    relation: Tensor | None = None, relation_query: Tensor | None = None,
                    relation_key: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0,
                    seed: int | Tensor = 0, validate: bool | None = None) -> Tensor:
    """out_i = sum_k softmax_k( scale * (q_i + relation_query[r]) . (k_k + relation_key[r]) ) v_k over the neighbours k of i.

    Replaces, with r the (V, V) relations and m a mask of the edges (CASE, Eq. 1-2; "ihd" and so on per head),
    ``softmax(masked_fill(scale * ((q[:, None] + rq[r]) * (k[None] + rk[r])).sum(-1), ~m, -inf), 1) @ v``
    by O(E H + R H) memory beyond inputs, outputs and gradients. A vertex without neighbours gives zeros; parallel edges
    count separately. Without ``relation`` it is the plain sparse attention that G_EC uses.

    Args:
        query, key, value: (V, H, D), one dtype and device. float32 and float64; float16 and bfloat16 are accumulated in
            float32 on GPU, and computed in float32 on CPU. Any strides. On GPU a head of D > 256 runs on the reference backend.
        indptr, indices: (V + 1,) and (E,), int32 or int64: the neighbours of vertex i are indices[indptr[i]:indptr[i + 1]].
        relation: (E,) int32 or int64 in [0, R).
        relation_query, relation_key: (R, H, D). All three or none.
        scale: default D ** -0.5.
        dropout_p, seed: probability in [0, 1) that an attention weight is dropped; the others are divided by 1 - p. Which
            ones is a function of (seed, edge, head) alone, the same on every backend. seed: in [0, 2^63), or an int64 tensor
            of one element on the device of query, whose value, modulo 2^63, is read when the kernels run.
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
    device_type, given = common.device_type(query), query.dtype
    compute, differs = common.compute_dtype(query)
    if differs:
        query, key, value, relation_query, relation_key = common.cast(
            compute, query, key, value, relation_query, relation_key
        )
    _check(query, key, value, indptr, indices, relation, relation_query, relation_key)
    vertices, _, dimension = query.shape
    scale = dimension**-0.5 if scale is None else scale
    scale = common.finite("scale", scale)
    dropout_p = common.probability("dropout_p", dropout_p)
    number, seed_at = common.seed_pair(seed, query.device)
    indptr, indices, relation = common.like_indices(indptr, indices, relation)

    runs = backend.choose(FAMILY, device_type, common.beyond_gpu(dimension, device_type))
    if common.reads(validate, runs, device_type):
        _check_contents(indptr, indices, relation, vertices, relation_query)
    tensors, numbers = (query, key, value, indptr, indices, relation, relation_query, relation_key), (scale, dropout_p)
    if runs == "reference":
        with torch.autocast(device_type, enabled=False):
            out = reference.graph_attention(*tensors, *numbers, reference.seed_of(number, seed_at))
    elif torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
        or (relation is not None and (relation_query.requires_grad or relation_key.requires_grad))
    ):
        out = _GraphAttention.apply(runs, *tensors, *numbers, number, seed_at)
    else:
        out = common.call(_forward_op, _forward, runs, *tensors, *numbers, number, seed_at)[0]
    return common.restored(out, given)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check(query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None,
           relation_query: Tensor | None, relation_key: Tensor | None) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    shape, dtype, device = query.shape, query.dtype, query.device
    common.check_dtype("query", query)
    if len(shape) != 3 or shape[1] == 0 or shape[2] == 0:
        raise ValueError(f"query must be (V, H, D) with H and D above 0, not {tuple(shape)}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != dtype or x.shape != shape or x.device != device:  # asked here too: this stands before every call
            _check_like(name, x, shape, dtype, device)
    common.check_index("indptr", indptr, device, "query")
    common.check_index("indices", indices, device, "query")
    if indptr.shape[0] != shape[0] + 1:
        raise ValueError(f"indptr must be (V + 1,) = ({shape[0] + 1},) as query is, not {tuple(indptr.shape)}")
    if relation is None:
        if relation_query is not None or relation_key is not None:
            name = "relation_query" if relation_query is not None else "relation_key"
            raise ValueError(f"{name} is given without relation, which says what edge has which row of it")
        return
    common.check_index("relation", relation, device, "query")
    if relation.shape != indices.shape:
        raise ValueError(f"relation must be (E,) = {tuple(indices.shape)} as indices, not {tuple(relation.shape)}")
    if relation_query is None or relation_key is None:
        name = "relation_query" if relation_query is None else "relation_key"
        raise ValueError(f"relation needs {name}, (R, H, D)")
    if relation_query.dim() != 3 or relation_query.shape[1:] != shape[1:]:
        raise ValueError(f"relation_query must be (R, {shape[1]}, {shape[2]}), not {tuple(relation_query.shape)}")
    for name, x in (("relation_query", relation_query), ("relation_key", relation_key)):
        _check_like(name, x, relation_query.shape, dtype, device)
    if relation_query.shape[0] == 0 and relation.shape[0] > 0:
        raise IndexError("relation names rows of relation_query, which has none")


def _check_like(name: str, x: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    common.check_like(name, x, dtype, device, "query")
    if x.shape != shape:
        like = "relation_query" if name == "relation_key" else "query"
        raise ValueError(f"{name} must be {tuple(shape)} as {like}, not {tuple(x.shape)}")


def _check_contents(indptr: Tensor, indices: Tensor, relation: Tensor | None, vertices: int,
                    relation_query: Tensor | None) -> None:
    """Reads indptr, indices and relation, and raises IndexError at the first entry that names nothing."""
    common.check_offsets("indptr", indptr, indices.shape[0], "indices")
    common.check_within("indices", indices, vertices)
    if relation is not None and relation_query is not None:
        common.check_within("relation", relation, relation_query.shape[0])


# ------------------------------------------------------------------------------------------------------------ registered ops


def _outputs(query: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised out and weights."""
    weights = query.new_empty(indices.shape[0], query.shape[1], dtype=common.sum_dtype(query))
    return torch.empty_like(query, memory_format=torch.contiguous_format), weights


def _forward(runs: str, query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None,
             relation_query: Tensor | None, relation_key: Tensor | None, scale: float, dropout_p: float, seed: int,
             seed_at: Tensor | None) -> tuple[Tensor, Tensor]:
    inputs = common.contiguous(query, key, value, indptr, indices, relation, relation_query, relation_key)
    if runs == "triton":
        from case_fast.ops import graph_attention_triton as triton

        return triton.forward(*inputs, scale, dropout_p, seed, seed_at)
    out, weights = _outputs(query, indices)
    _run("forward", inputs, (scale, dropout_p, seed, seed_at), (out, weights))
    return out, weights


def _backward(runs: str, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, indices: Tensor,
              relation: Tensor | None, relation_query: Tensor | None, relation_key: Tensor | None, weights: Tensor,
              scale: float, dropout_p: float, seed: int, seed_at: Tensor | None) -> list[Tensor]:
    inputs = common.contiguous(query, key, value, indptr, indices, relation, relation_query, relation_key)
    grad_out, weights = grad_out.contiguous(), weights.contiguous()
    if runs == "triton":
        from case_fast.ops import graph_attention_triton as triton

        found = triton.backward(grad_out, *inputs, weights, scale, dropout_p, seed, seed_at)
        return [x for x in found if x is not None]
    found = common.empty_like(query, key, value, relation_query, relation_key)
    _run("backward", inputs, (scale, dropout_p, seed, seed_at), (weights, grad_out, *found, *[None] * (5 - len(found))))
    return found


def _run(direction: str, inputs: list[Tensor | None], numbers: tuple, others: tuple[Tensor | None, ...]) -> None:
    """Runs the native kernel. numbers: scale to seed_at; others: what its arguments are beside the inputs."""
    query, key, value, indptr, indices, relation, relation_query, relation_key = inputs
    vertices, heads, dimension = query.shape
    relations = 0 if relation_query is None else relation_query.shape[0]
    graph = (  # struct case_fast_graph
        vertices, indices.shape[0], relations, heads, dimension, common.DTYPES[query.dtype], common.INDEX_BITS[indices.dtype],
        indptr.data_ptr(), indices.data_ptr(), 0 if relation is None else relation.data_ptr(), *numbers[:-1],
        *common.pointers(numbers[-1]),
    )
    arguments = common.pointers(query, key, value, relation_query, relation_key, *others)
    of_workspace = (direction == "backward", PLAN_AUTO)
    status = common.run_native(f"{FAMILY}_{direction}", query, graph, arguments, of_workspace, (PLAN_AUTO,))
    if status:
        common.refuse_contents(FAMILY, status, {1: "indptr", 2: "indices", 3: "relation"},
                               lambda: _check_contents(indptr, indices, relation, vertices, relation_query))


def _backward_fake(runs, grad_out, query, key, value, indptr, indices, relation, relation_query, relation_key, *rest):
    return common.empty_like(query, key, value, relation_query, relation_key)


_INPUTS = ("Tensor query, Tensor key, Tensor value, Tensor indptr, Tensor indices, Tensor? relation, Tensor? relation_query, "
           "Tensor? relation_key")
_NUMBERS = "float scale, float dropout_p, SymInt seed, Tensor? seed_at"  # SymInt: a new seed does not compile again
# out and weights (E, H): after the softmax, before dropout; in the dtype of sums, kept for backward.
_forward_op = common.register(f"{FAMILY}_forward(str backend, {_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)", _forward,
                              lambda runs, query, key, value, indptr, indices, *rest: _outputs(query, indices))
# Gradients of query, key and value, and of relation_query and relation_key where they are given.
_backward_op = common.register(
    f"{FAMILY}_backward(str backend, Tensor grad_out, {_INPUTS}, Tensor weights, {_NUMBERS}) -> Tensor[]", _backward,
    _backward_fake,
)


# --------------------------------------------------------------------------------------------------------------- autograd


class _GraphAttention(torch.autograd.Function):
    """Keeps the weights (E, H): cheaper than computing the scores again."""

    @staticmethod
    def forward(ctx, runs, query, key, value, indptr, indices, relation, relation_query, relation_key, scale, dropout_p, seed,
                seed_at):
        tensors = (query, key, value, indptr, indices, relation, relation_query, relation_key)
        out, weights = common.call(_forward_op, _forward, runs, *tensors, scale, dropout_p, seed, seed_at)
        ctx.save_for_backward(*tensors, weights, seed_at)
        ctx.runs, ctx.numbers = runs, (scale, dropout_p, seed)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        def call(*tensors):
            *tensors, seed_at = tensors
            return common.call(_backward_op, _backward, ctx.runs, *tensors, *ctx.numbers, seed_at)

        found = common.gradients(FAMILY, call, (grad_out, *ctx.saved_tensors))
        query, key, value, relation_query, relation_key = *found, *[None] * (5 - len(found))
        return None, query, key, value, None, None, None, relation_query, relation_key, *[None] * 4
