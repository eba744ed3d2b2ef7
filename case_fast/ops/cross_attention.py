"""A decoder's attention to several sources in turn, with gradients: one call a layer, for training and for decoding.

The equation in plain torch is `case_fast.equations.cross_attention`: the oracle of the tests, and what runs where there is
no kernel. The registered ops `case_fast::cross_attention_forward` and `_backward` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from case_fast import equations
from case_fast.ops import backend, common
from case_fast.ops.common import pointer
from case_fast.ops.packed_attention import (
    INDEX_BITS,
    MAX_DIMENSION,
    address,
    are_rows_apart,
    attend,
    attend_backward,
    check_dropout,
    check_float,
    check_key_of,
    check_offsets,
    check_sequences,
    distinct,
    like_indices,
    on_cuda,
    plain_gradients,
    refuse,
    row_stride,
    rows_apart,
)

FAMILY = "cross_attention"
FEW_ROWS, MAX_WIDTH = 256, 4096  # what the GPU kernels of decoding take; beyond, torch's products stand around the attention
FLOATS = ("key", "value", "norm_weight", "norm_bias", "query_weight", "output_weight")  # of a source, in order


class _Known(NamedTuple):
    """What a call has found out about a source, for the calls after it.

    ``tensors`` are the source's own; while they lie at ``addresses``, the memory of that shape there is ``held``.
    """

    of: tuple  # what of the other arguments it depends on
    heads: tuple[int, int]
    tensors: tuple[Tensor, ...]
    addresses: list[int]
    held: list[Tensor]
    members: tuple[int, ...]  # of struct case_fast_source


_SEEN = _Known((), (0, 0), (), [], [], ())  # of a source that was in one call


@dataclass(frozen=True)
class Source:
    """What a decoder attends to, and the weights it attends by. Make one for a reply, not one for each word: the first call
    checks it, later ones only see that its tensors lie where they lay. Between calls their values may change, their shapes and
    strides may not.

    Attributes:
        key, value: (Tk, H, D), projected already: once a reply, whatever its length. Any strides.
        cu_keys: (S + 1,) int32 or int64: where each sequence of keys starts. S = B unless ``key_of`` is given.
        norm_weight, norm_bias: (d,) of the layer norm before.
        query_weight: (H D, d); output_weight: (d, H D).
        key_of: (B,) in [0, S): the sequence of keys that each sequence of hidden attends to.
    """

    key: Tensor
    value: Tensor
    cu_keys: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    query_weight: Tensor
    output_weight: Tensor
    key_of: Tensor | None = None
    _known: _Known | None = field(default=None, init=False, repr=False, compare=False)

    def floats(self) -> tuple[Tensor, ...]:
        return self.key, self.value, self.norm_weight, self.norm_bias, self.query_weight, self.output_weight


def cross_attention(hidden: Tensor, cu_hidden: Tensor, sources: Sequence[Source], eps: float = 1e-5, dropout_p: float = 0.0,
                    output_dropout_p: float = 0.0, seed: int = 0, validate: bool | None = None) -> Tensor:
    """In order, for every source: hidden <- hidden + attention( layer_norm(hidden) W_query^T, key, value ) W_output^T.

    Replaces, for every source, with sequences padded and a mask of what is padding,
    ``hidden = hidden + dropout(F.linear(scaled_dot_product_attention(F.linear(F.layer_norm(hidden, (d,), norm_weight,
    norm_bias, eps), query_weight), key, value, attn_mask=mask), output_weight))``, each split into heads. A sequence
    without keys in a source gets 0 from it. One row a sequence is a step of decoding; beams are rows of one sequence, which
    share its keys.

    Args:
        hidden: (T, d), float32 or float64; half precision is computed in float32 on CPU.
        cu_hidden: (B + 1,) int32 or int64, from 0 to T: where each sequence starts.
        sources: all of hidden's dtype and device, with any number of keys.
        eps: of the layer norms.
        dropout_p, output_dropout_p, seed: probabilities in [0, 1) that an attention weight, and that an element of what a
            source adds, is dropped; the others are divided by 1 - p. By counter, the same on every backend
            (`case_fast.equations.cross_attention`); 0 <= seed < 2^63.
        validate: as in `packed_attention`.

    Returns:
        (T, d), in the dtype of hidden. Under autocast: in autocast's dtype on GPU, in float32 on CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        IndexError: offsets that do not rise from 0 to the number of rows, or key_of out of range. All before any kernel runs.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call.

    Deterministic: equal inputs give equal bits, forward and backward, whatever the number of threads. No second derivative
    but on the reference backend.
    """
    keeps_all = dropout_p == 0 and output_dropout_p == 0 and type(seed) is int and 0 <= seed < 2**63
    if keeps_all and not torch.is_grad_enabled() and (stepped := _step(hidden, cu_hidden, sources, eps)) is not None:
        return stepped
    device_type, given = hidden.device.type, hidden.dtype
    compute, differs = common.compute_dtype(hidden)
    if differs:
        (hidden,) = common.cast(compute, hidden)
        sources = [Source(*_in_order(common.cast(compute, *s.floats()), s.cu_keys), s.key_of) for s in sources]
    _check(hidden, cu_hidden, sources)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, not {eps!r}")
    check_dropout(dropout_p, seed)
    if not 0 <= output_dropout_p < 1:
        raise ValueError(f"output_dropout_p must be in [0, 1), not {output_dropout_p!r}")
    given_cu = cu_hidden
    indices = like_indices(cu_hidden, *[x for s in sources for x in (s.cu_keys, s.key_of)])
    cu_hidden, cu_keys, key_of = indices[0], list(indices[1::2]), list(indices[2::2])

    runs = backend.choose(FAMILY, device_type, _beyond(sources, device_type))
    compiling = torch.compiler.is_compiling()
    if validate is None:
        validate = device_type == "cpu" and not compiling
    if validate and not (runs == "native" and device_type == "cpu"):
        _check_contents(hidden, cu_hidden, [s.key for s in sources], cu_keys, key_of)
    floats, numbers = [x for s in sources for x in s.floats()], (eps, dropout_p, output_dropout_p, seed)
    if runs == "reference" and not compiling:
        with torch.autocast(device_type, enabled=False):
            out = equations.cross_attention(hidden, cu_hidden, _sources(floats, cu_keys, key_of), *numbers)
    elif torch.is_grad_enabled() and (hidden.requires_grad or any(x.requires_grad for x in floats)):
        tensors = (hidden, cu_hidden, *floats, *cu_keys, *key_of)
        hidden, cu_hidden, *tensors = distinct(tensors) if compiling else tensors
        out = _CrossAttention.apply(runs, hidden, cu_hidden, *numbers, len(sources), *tensors)
    else:
        out = common.call(_forward_op, _forward, runs, hidden, cu_hidden, floats, cu_keys, key_of, *numbers, False)[0]
        if (runs, device_type, differs, compiling) == ("native", "cpu", False, False):
            _know(hidden, given_cu, sources)
    return common.restored(out, given)


# -------------------------------------------------------------------------------------------------------------------- steps


def _depends_on(hidden: Tensor, cu_hidden: Tensor) -> tuple:
    return hidden.shape[1], hidden.dtype, cu_hidden.shape, cu_hidden.dtype, backend.said_by_user()


def _know(hidden: Tensor, cu_hidden: Tensor, sources: Sequence[Source]) -> None:
    """Keeps what a call on the CPU that went well has found out about each source, for `_step`."""
    for source in sources:
        tensors = tuple(x for x in (*source.floats(), source.cu_keys, source.key_of) if x is not None)
        if common.watched((hidden, cu_hidden, *tensors)) or hidden.shape[0] > FEW_ROWS:  # many rows are no step
            return
        if source._known is None:  # it may be made anew for every call, and what is found out now never asked for
            object.__setattr__(source, "_known", _SEEN)
            continue
        key, value, *others = tensors
        as_read = are_rows_apart(key) and are_rows_apart(value) and all(x.is_contiguous() for x in others)
        if as_read and all(x.dtype == cu_hidden.dtype for x in (source.cu_keys, source.key_of) if x is not None):
            members = _source_members(source.floats(), source.cu_keys, source.key_of, cu_hidden, 0, 0)
            known = _Known(_depends_on(hidden, cu_hidden), key.shape[1:], tensors, [x.data_ptr() for x in tensors],
                           [x.detach() for x in tensors], members)
            object.__setattr__(source, "_known", known)


def _step(hidden: Tensor, cu_hidden: Tensor, sources: Sequence[Source], eps: float) -> Tensor | None:
    """The result where all sources are known, with no more checks than that takes: those would be a quarter of the time. None
    where the call must go the whole way, if to an error."""
    if common.watched((hidden, cu_hidden)) or torch.is_autocast_enabled("cpu") or not (sources and 0 <= eps < math.inf):
        return None
    if not (hidden.is_cpu and cu_hidden.is_cpu and hidden.dim() == 2 and hidden.is_contiguous() and cu_hidden.is_contiguous()):
        return None
    of, heads, members = _depends_on(hidden, cu_hidden), None, []
    for source in sources:
        known = source._known if type(source) is Source else None
        if known is None or known.of != of or [x.data_ptr() for x in known.tensors] != known.addresses:
            return None
        heads = heads or known.heads
        if known.heads != heads:
            return None
        members.append(known.members)
    out = torch.empty_like(hidden)
    call = _call_members(hidden, cu_hidden, heads, (eps, 0.0, 0.0), len(members))
    bad = backend.native.cross_attention_forward(call, members, hidden.data_ptr(), out.data_ptr(), 0, torch.get_num_threads())
    return None if bad else out


# ------------------------------------------------------------------------------------------------------------------- checks


def _in_order(floats: Sequence[Tensor], cu_keys: Tensor) -> tuple[Tensor, ...]:
    """The fields of a Source up to key_of."""
    return (*floats[:2], cu_keys, *floats[2:])


def _sources(floats: Sequence[Tensor], cu_keys: Sequence[Tensor], key_of: Sequence[Tensor | None]) -> list[Source]:
    each = len(FLOATS)
    return [
        Source(*_in_order(floats[place * each : place * each + each], cu), of)
        for place, (cu, of) in enumerate(zip(cu_keys, key_of, strict=True))
    ]


def _beyond(sources: Sequence[Source], device_type: str) -> str:
    """What about these sources the kernels do not take."""
    if len({s.key.shape[1:] for s in sources}) > 1:
        return "sources of different heads or dimensions"
    if device_type != "cpu" and sources and sources[0].key.shape[2] > MAX_DIMENSION:
        return f"heads of more than {MAX_DIMENSION} dimensions"
    return ""


def _check(hidden: Tensor, cu_hidden: Tensor, sources: Sequence[Source]) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    dtype, device = hidden.dtype, hidden.device
    if dtype not in common.DTYPES:
        raise TypeError(f"hidden must be float32, float64, float16 or bfloat16, not {dtype}")
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be (T, d) with d above 0, not {tuple(hidden.shape)}")
    if not sources:
        raise ValueError("sources must hold at least one source")
    width = hidden.shape[1]
    for place, source in enumerate(sources):
        if not isinstance(source, Source):
            raise TypeError(f"sources[{place}] must be a case_fast.ops.Source, not {type(source).__name__}")
        name = f"sources[{place}]"
        key = source.key
        if key.dim() != 3 or key.shape[1] == 0 or key.shape[2] == 0:
            raise ValueError(f"{name}.key must be (Tk, H, D) with H and D above 0, not {tuple(key.shape)}")
        inner = key.shape[1] * key.shape[2]
        shapes = (key.shape, key.shape, (width,), (width,), (inner, width), (width, inner))
        for part, x, shape in zip(FLOATS, source.floats(), shapes, strict=True):
            if x.dtype != dtype or x.shape != shape or x.device != device:  # asked here too: this stands before every step
                check_float(f"{name}.{part}", x, shape, dtype, device, "hidden" if part == "key" else "hidden and key")
        check_sequences("cu_hidden", cu_hidden, f"{name}.cu_keys", source.cu_keys, f"{name}.key_of", source.key_of, device)


def _check_contents(hidden: Tensor, cu_hidden: Tensor, keys: Sequence[Tensor], cu_keys: Sequence[Tensor],
                    key_of: Sequence[Tensor | None]) -> None:
    """Reads all offsets and numbers, and raises IndexError at the first that is wrong."""
    check_offsets("cu_hidden", cu_hidden, hidden.shape[0], "hidden")
    for place, (key, cu, of) in enumerate(zip(keys, cu_keys, key_of, strict=True)):
        check_offsets(f"sources[{place}].cu_keys", cu, key.shape[0], "key")
        check_key_of(f"sources[{place}].key_of", of, cu.shape[0] - 1)


# ------------------------------------------------------------------------------------------------------------ registered ops

_library = torch.library.Library("case_fast", "FRAGMENT")
# floats: for each source key, value, norm_weight, norm_bias, query_weight, output_weight, end to end.
_INPUTS = "Tensor hidden, Tensor cu_hidden, Tensor[] floats, Tensor[] cu_keys, Tensor?[] key_of"
_NUMBERS = "float eps, float dropout_p, float output_dropout_p, int seed"
# out, and what backward needs of it, as the kernel lays it out; empty unless it is to be kept.
_library.define(f"{FAMILY}_forward(str backend, {_INPUTS}, {_NUMBERS}, bool keep) -> (Tensor, Tensor)")
# Gradients of hidden and of floats.
_library.define(f"{FAMILY}_backward(str backend, Tensor grad_out, {_INPUTS}, Tensor saved, {_NUMBERS}) -> Tensor[]")
_forward_op = torch.ops.case_fast.cross_attention_forward.default
_backward_op = torch.ops.case_fast.cross_attention_backward.default


def _saved_size(hidden: Tensor, floats: Sequence[Tensor]) -> int:
    """Elements of saved. On CPU, for each source the normalised rows (T, d), 1 / deviation (T), query and attended (T, H, D),
    log of the softmax' divisor (T, H); elsewhere as `_kept` reads it."""
    rows, width = hidden.shape
    lse = 2 if hidden.dtype in common.HALF else 1  # it is in float32
    return sum(rows * (width + 1 + key.shape[1] * (2 * key.shape[2] + lse)) for key in floats[:: len(FLOATS)])


def _outputs(hidden: Tensor, floats: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised out and saved."""
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return out, torch.empty(_saved_size(hidden, floats) if keep else 0, dtype=hidden.dtype, device=hidden.device)


def _gradients(hidden: Tensor, floats: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised gradients."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, *floats)]


def _forward(runs: str, hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor],
             key_of: list[Tensor | None], eps: float, dropout_p: float, output_dropout_p: float, seed: int, keep: bool
             ) -> tuple[Tensor, Tensor]:
    out, saved = _outputs(hidden, floats, keep)
    if runs == "reference":  # torch.compile cannot look into it: what it does depends on the offsets
        _check_contents(hidden, cu_hidden, floats[:: len(FLOATS)], cu_keys, key_of)
        sources = _sources(floats, cu_keys, key_of)
        return equations.cross_attention(hidden, cu_hidden, sources, eps, dropout_p, output_dropout_p, seed), saved.zero_()
    hidden, cu_hidden, floats, cu_keys, key_of = _laid_out(hidden, cu_hidden, floats, cu_keys, key_of)
    numbers = (eps, dropout_p, output_dropout_p, seed)
    if not hidden.is_cpu and (keep or hidden.shape[0] > FEW_ROWS or hidden.shape[1] > MAX_WIDTH):
        return _forward_composed(hidden, cu_hidden, floats, cu_keys, key_of, *numbers, out, saved if keep else None), saved
    call, given = _call(hidden, cu_hidden, floats, cu_keys, key_of, *numbers)
    if hidden.is_cpu:
        status = backend.native.cross_attention_forward(
            call, given, hidden.data_ptr(), out.data_ptr(), saved.data_ptr() if keep else 0, torch.get_num_threads()
        )
    else:
        status = on_cuda(f"{FAMILY}_forward", hidden.device, call, (), (given, hidden.data_ptr(), out.data_ptr()))
    if status:
        _raise(status, hidden, cu_hidden, floats, cu_keys, key_of)
    return out, saved


def _backward(runs: str, grad_out: Tensor, hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor],
              key_of: list[Tensor | None], saved: Tensor, eps: float, dropout_p: float, output_dropout_p: float, seed: int
              ) -> list[Tensor]:
    if runs == "reference":
        def plain(hidden: Tensor, *floats: Tensor) -> Tensor:
            sources = _sources(floats, cu_keys, key_of)
            return equations.cross_attention(hidden, cu_hidden, sources, eps, dropout_p, output_dropout_p, seed)

        return list(plain_gradients(plain, (hidden, *floats), grad_out))
    grad_out, saved = grad_out.contiguous(), saved.contiguous()
    hidden, cu_hidden, floats, cu_keys, key_of = _laid_out(hidden, cu_hidden, floats, cu_keys, key_of)
    found = _gradients(hidden, floats)
    if not hidden.is_cpu:
        numbers = (eps, dropout_p, output_dropout_p, seed)
        _backward_composed(grad_out, hidden, cu_hidden, floats, cu_keys, key_of, saved, *numbers, found)
        return found
    call, given = _call(hidden, cu_hidden, floats, cu_keys, key_of, eps, dropout_p, output_dropout_p, seed)
    each = len(FLOATS)
    gradients = [tuple(x.data_ptr() for x in found[at : at + each]) for at in range(1, len(found), each)]
    status = backend.native.cross_attention_backward(
        call, given, saved.data_ptr(), grad_out.data_ptr(), found[0].data_ptr(), gradients, torch.get_num_threads()
    )
    if status:
        _raise(status, hidden, cu_hidden, floats, cu_keys, key_of)
    return found


class _Kept(NamedTuple):
    """What backward needs of one source, where torch's products stand around the attention."""

    hidden: Tensor  # (T, d), before the layer norm
    query: Tensor  # (T, H, D)
    attended: Tensor  # (T, H, D)
    lse: Tensor  # (T, H), float32 (float64 for float64)


def _kept(saved: Tensor, rows: int, width: int, heads: int, dimension: int, sources: int) -> list[_Kept]:
    """Views of saved: lse of all sources first, so that float32 is aligned in it; then the others, source by source."""
    wide = saved.view(torch.float32) if saved.dtype in common.HALF else saved
    logs = wide[: sources * rows * heads].view(sources, rows, heads)
    inner = heads * dimension
    rest = saved[logs.numel() * wide.element_size() // saved.element_size() :]
    parts = rest[: sources * rows * (width + 2 * inner)].view(sources, -1).split([rows * width, rows * inner, rows * inner], 1)
    shapes = ((rows, width), (rows, heads, dimension), (rows, heads, dimension))
    return [
        _Kept(*[part[place].view(shape) for part, shape in zip(parts, shapes, strict=True)], logs[place])
        for place in range(sources)
    ]


def _plain(device_type: str) -> ExitStack:
    """Inside it torch's products are neither cast nor recorded."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(device_type):
        stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


def _forward_composed(hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor],
                      key_of: list[Tensor | None], eps: float, dropout_p: float, output_dropout_p: float, seed: int,
                      out: Tensor, saved: Tensor | None) -> Tensor:
    """Many rows on a GPU: torch's layer norm and products around our attention. The last source writes out."""
    rows, width = hidden.shape
    heads, dimension = floats[0].shape[1:]
    count, inner = len(cu_keys), heads * dimension
    if saved is None:
        saved = hidden.new_empty(_saved_size(hidden, floats[: len(FLOATS)]))
        kept = _kept(saved, rows, width, heads, dimension, 1) * count  # one place for all
    else:
        kept = _kept(saved, rows, width, heads, dimension, count)
    with _plain(hidden.device.type):
        kept[0].hidden.copy_(hidden)
        for place, (cu, of) in enumerate(zip(cu_keys, key_of, strict=True)):
            key, value, norm_weight, norm_bias, query_weight, output_weight = floats[place * len(FLOATS) :][: len(FLOATS)]
            state, query, attended, lse = kept[place]
            normed = F.layer_norm(state, (width,), norm_weight, norm_bias, eps)
            torch.mm(normed, query_weight.t(), out=query.view(rows, inner))
            numbers = (False, dimension**-0.5, dropout_p, equations.source_seed(seed, place, 0))
            attend(query, key, value, (cu_hidden, cu, of, None), numbers, attended, lse)
            added = torch.mm(attended.view(rows, inner), output_weight.t())
            following = kept[place + 1].hidden if place + 1 < count else out
            _drop(added, state, following, output_dropout_p, equations.source_seed(seed, place, 1))
    return out


def _backward_composed(grad_out: Tensor, hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor],
                       key_of: list[Tensor | None], saved: Tensor, eps: float, dropout_p: float, output_dropout_p: float,
                       seed: int, found: list[Tensor]) -> None:
    """Of `_forward_composed`, into found: the gradients of hidden and of floats."""
    rows, width = hidden.shape
    heads, dimension = floats[0].shape[1:]
    kept, each = _kept(saved, rows, width, heads, dimension, len(cu_keys)), len(FLOATS)
    grad = found[0].copy_(grad_out)
    added, grad_query = torch.empty_like(grad), torch.empty_like(kept[0].query)
    flat = (rows, heads * dimension)
    with _plain(hidden.device.type):
        for place in reversed(range(len(cu_keys))):
            key, value, norm_weight, norm_bias, query_weight, output_weight = floats[place * each :][:each]
            grads = found[1 + place * each :][:each]
            state, query, attended, lse = kept[place]
            if output_dropout_p > 0:
                _drop(grad, None, added, output_dropout_p, equations.source_seed(seed, place, 1))
            grad_added = added if output_dropout_p > 0 else grad
            torch.mm(grad_added.t(), attended.view(flat), out=grads[5])
            grad_attended = torch.mm(grad_added, output_weight)
            numbers = (False, dimension**-0.5, dropout_p, equations.source_seed(seed, place, 0))
            offsets = (cu_hidden, cu_keys[place], key_of[place], None)
            attend_backward(grad_attended, query, key, value, offsets, attended, lse, numbers, (grad_query, *grads[:2]))
            normed, mean, inverse = torch.native_layer_norm(state, (width,), norm_weight, norm_bias, eps)
            torch.mm(grad_query.view(flat).t(), normed, out=grads[4])
            grad_normed = torch.mm(grad_query.view(flat), query_weight)
            through, *norms = torch.ops.aten.native_layer_norm_backward(grad_normed, state, (width,), mean, inverse, norm_weight,
                                                                        norm_bias, [True] * 3)
            grad += through
            for to, norm in zip(grads[2:4], norms, strict=True):
                to.copy_(norm)


def _drop(x: Tensor, base: Tensor | None, to: Tensor, dropout_p: float, seed: int) -> None:
    """to = base + dropout(x), as the equation drops what a source adds."""
    if dropout_p == 0:
        torch.add(x, 0 if base is None else base, out=to)
    elif x.is_cpu:
        keep = equations.dropout_keep(x.numel(), 1, dropout_p, seed).view(x.shape)
        torch.add(x * keep / (1 - dropout_p), 0 if base is None else base, out=to)
    else:
        with torch.cuda.device(x.device):
            status = backend.native.cross_attention_drop_cuda(
                x.numel(), common.DTYPES[x.dtype], dropout_p, seed, x.data_ptr(), pointer(base), to.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )
        if status:
            refuse(FAMILY, status)


def _laid_out(hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor], key_of: list[Tensor | None]
              ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """As the kernels read them."""
    floats = [rows_apart(x) if place % len(FLOATS) < 2 else x.contiguous() for place, x in enumerate(floats)]
    key_of = [x if x is None else x.contiguous() for x in key_of]
    return hidden.contiguous(), cu_hidden.contiguous(), floats, [x.contiguous() for x in cu_keys], key_of


def _call(hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor], key_of: list[Tensor | None],
          eps: float, dropout_p: float, output_dropout_p: float, seed: int) -> tuple[tuple, list[tuple]]:
    """The members of struct case_fast_cross_attention, and those of each struct case_fast_source."""
    each, sources = len(FLOATS), []
    for place, (cu, of) in enumerate(zip(cu_keys, key_of, strict=True)):
        seeds = equations.source_seed(seed, place, 0), equations.source_seed(seed, place, 1)
        sources.append(_source_members(floats[place * each : place * each + each], cu, of, cu_hidden, *seeds))
    return _call_members(hidden, cu_hidden, floats[0].shape[1:], (eps, dropout_p, output_dropout_p), len(sources)), sources


def _call_members(hidden: Tensor, cu_hidden: Tensor, heads: Sequence[int], numbers: tuple, sources: int) -> tuple:
    return (
        cu_hidden.shape[0] - 1, hidden.shape[0], sources, hidden.shape[1], *heads, common.DTYPES[hidden.dtype], INDEX_BITS[cu_hidden.dtype],
        cu_hidden.data_ptr(), *numbers,
    )


def _source_members(floats: Sequence[Tensor], cu_keys: Tensor, key_of: Tensor | None, cu_hidden: Tensor, *seeds: int) -> tuple:
    key, value, *weights = floats
    return (
        cu_keys.shape[0] - 1, key.shape[0], row_stride(key), row_stride(value), cu_keys.data_ptr(), address(key_of, cu_hidden), 0,
        key.data_ptr(), value.data_ptr(), *[x.data_ptr() for x in weights], *seeds,
    )


def _raise(status: int, hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor],
           key_of: list[Tensor | None]) -> None:
    """The error that belongs to a status of enum case_fast_status, of source i with 16 i on top; nothing was written."""
    place, status = divmod(status, 16)
    if 7 <= status <= 10:
        _check_contents(hidden, cu_hidden, floats[:: len(FLOATS)], cu_keys, key_of)  # says which entry
        name = "cu_hidden" if status == 7 else f"sources[{place}].{'cu_keys' if status == 8 else 'key_of'}"
        raise IndexError(f"{name} names what does not exist")
    refuse(FAMILY, status)


def _backward_fake(runs, grad_out, hidden, cu_hidden, floats, *rest):
    return _gradients(hidden, floats)


for _device in ("CPU", "CUDA"):
    _library.impl(f"{FAMILY}_forward", _forward, _device)
    _library.impl(f"{FAMILY}_backward", _backward, _device)
torch.library.register_fake(
    f"case_fast::{FAMILY}_forward", lambda runs, hidden, cu, floats, *rest: _outputs(hidden, floats, rest[-1]), lib=_library
)
torch.library.register_fake(f"case_fast::{FAMILY}_backward", _backward_fake, lib=_library)


# --------------------------------------------------------------------------------------------------------------- autograd


class _CrossAttention(torch.autograd.Function):
    """Keeps, for each source, what its block made of the rows; computes the attention weights again."""

    @staticmethod
    def forward(ctx, runs, hidden, cu_hidden, eps, dropout_p, output_dropout_p, seed, sources, *tensors):
        floats, cu_keys, key_of = _parted(tensors, sources)
        ctx.runs, ctx.numbers, ctx.sources = runs, (eps, dropout_p, output_dropout_p, seed), sources
        out, saved = common.call(_forward_op, _forward, runs, hidden, cu_hidden, floats, cu_keys, key_of, *ctx.numbers, True)
        ctx.save_for_backward(saved, hidden, cu_hidden, *tensors)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        runs, numbers, sources = ctx.runs, ctx.numbers, ctx.sources

        def backward(grad_out, saved, hidden, cu_hidden, *tensors):
            return common.call(
                _backward_op, _backward, runs, grad_out, hidden, cu_hidden, *_parted(tensors, sources), saved, *numbers
            )

        grad_hidden, *grads = common.gradients(FAMILY, backward, (grad_out, *ctx.saved_tensors))
        return None, grad_hidden, *[None] * 6, *grads, *[None] * (2 * sources)


def _parted(tensors: tuple[Tensor | None, ...], sources: int) -> tuple[list, list, list]:
    """floats, cu_keys and key_of of so many sources that lie end to end."""
    floats = sources * len(FLOATS)
    return list(tensors[:floats]), list(tensors[floats : floats + sources]), list(tensors[floats + sources :])
