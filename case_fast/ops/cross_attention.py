"""A decoder's attention to several sources in turn, with gradients: one call a layer, for training and for decoding.

The equation in plain torch is `case_fast.ops.reference.cross_attention`: the oracle of the tests, and what runs where there is
no kernel. The registered ops `case_fast::cross_attention_forward` and `_backward` call the kernels; autograd stands outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from case_fast.ops import backend, common, reference
from case_fast.ops import cross_attention_composed as composed
from case_fast.ops.linear import linear

FAMILY = "cross_attention"
MAX_WIDTH = 4096  # what the GPU kernels of decoding take; beyond, torch's products stand around the attention
# Up to so many rows these kernels run. By counts, not measured: the first has a block a (row, head), of 512 threads, so that one
# multiprocessor holds one; each reads its head's part of the query weights, 180 KB of two heads of 150 and a width of 300, for
# its row alone. 66 rows fill the 132 multiprocessors of an H100 once; as many more take as long again and read 24 MB more a
# source, where torch's products read the weights once, by five launches a source in place of two.
FEW_ROWS = 64
_WEIGHTS = ("norm_weight", "norm_bias", "query_weight", "output_weight")


class _Normed:
    """Of a source, in place of a layer norm's weight and bias that are None: ones and zeros."""

    def __post_init__(self) -> None:
        for name, make in (("norm_weight", torch.ones_like), ("norm_bias", torch.zeros_like)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, make(self.query_weight[0].detach()))


@dataclass(frozen=True)
class Source(_Normed):
    """What a decoder attends to, and the weights it attends by. For many calls with the same ones: `prepare_sources`.

    Attributes:
        key, value: (Tk, H, D), projected already: once a reply, whatever its length. Any strides.
        cu_keys: (S + 1,) int32 or int64: where each sequence of keys starts. S = B unless ``key_of`` is given.
        norm_weight, norm_bias: (d,) of the layer norm before; None stands for ones and for zeros.
        query_weight: (H D, d); output_weight: (d, H D).
        key_of: (B,) in [0, S): the sequence of keys that each sequence of hidden attends to.
    """

    key: Tensor
    value: Tensor
    cu_keys: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    query_weight: Tensor
    output_weight: Tensor
    key_of: Tensor | None = None

    FLOATS: ClassVar = ("key", "value", *_WEIGHTS)
    TELLS: ClassVar = ("key", "(Tk, H, D)")  # what says heads and dimension

    def floats(self) -> tuple[Tensor, ...]:
        return self.key, self.value, self.norm_weight, self.norm_bias, self.query_weight, self.output_weight

    def shapes(self, width: int) -> tuple[Sequence[int], ...]:
        return self.key.shape, self.key.shape, *_weight_shapes(self.key.shape[1:], width)


@dataclass(frozen=True)
class RowSource(_Normed):
    """A source by the rows that keys and values are projections of: for rows of hidden fewer than its own, as in training.

    With W_key,h and W_value,h of a head and n_j the rows, its score q . (W_key,h n_j) is (W_key,h^T q) . n_j, and its output
    sum_j p_j W_value,h n_j is W_value,h (sum_j p_j n_j). The native kernels of the CPU so make neither keys nor values, and
    project each row of hidden instead; on a GPU they are made first (`projected`).

    Attributes:
        rows: (Tk, d), of hidden's width. Any strides.
        key_weight, value_weight: (H, D, d).
        Others: as of `Source`.
    """

    rows: Tensor
    key_weight: Tensor
    value_weight: Tensor
    cu_keys: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    query_weight: Tensor
    output_weight: Tensor
    key_of: Tensor | None = None

    FLOATS: ClassVar = ("rows", "key_weight", "value_weight", *_WEIGHTS)
    TELLS: ClassVar = ("key_weight", "(H, D, d)")

    def floats(self) -> tuple[Tensor, ...]:
        return tuple([getattr(self, name) for name in self.FLOATS])

    def shapes(self, width: int) -> tuple[Sequence[int], ...]:
        heads = self.key_weight.shape[:2]
        return (*self.rows.shape[:1], width), (*heads, width), (*heads, width), *_weight_shapes(heads, width)

    @property
    def key(self) -> Tensor:
        """(Tk, H, D), as the equation has it."""
        return _projected(self.rows, self.key_weight)

    @property
    def value(self) -> Tensor:
        return _projected(self.rows, self.value_weight)

    def projected(self) -> Source:
        """The same by keys and values, made by one product."""
        weights = [self.key_weight.flatten(0, 1), self.value_weight.flatten(0, 1)]
        key, value = (y.unflatten(-1, self.key_weight.shape[:2]) for y in linear(self.rows, weights, split=True))
        return Source(key, value, self.cu_keys, *[getattr(self, name) for name in _WEIGHTS], self.key_of)


def _weight_shapes(heads: Sequence[int], width: int) -> tuple[Sequence[int], ...]:
    inner = math.prod(heads)
    return (width,), (width,), (inner, width), (width, inner)


def _projected(rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])


@common.public
def cross_attention(hidden: Tensor, cu_hidden: Tensor, sources: Sequence[Source] | Sequence[RowSource] | PreparedSources,
                    eps: float = 1e-5, dropout_p: float = 0.0, output_dropout_p: float = 0.0, seed: int | Tensor = 0,
                    validate: bool | None = None) -> Tensor:
    """In order, for every source: hidden <- hidden + attention( layer_norm(hidden) W_query^T, key, value ) W_output^T.

    Replaces, for every source, with sequences padded and a mask of what is padding,
    ``hidden = hidden + dropout(F.linear(scaled_dot_product_attention(F.linear(F.layer_norm(hidden, (d,), norm_weight,
    norm_bias, eps), query_weight), key, value, attn_mask=mask), output_weight))``, each split into heads. A sequence
    without keys in a source gets 0 from it. One row a sequence is a step of decoding; beams are rows of one sequence, which
    share its keys.

    Args:
        hidden: (T, d), float32 or float64; half precision is computed in float32 on CPU.
        cu_hidden: (B + 1,) int32 or int64, from 0 to T: where each sequence starts.
        sources: all of one kind, of hidden's dtype and device, with any number of keys; or what `prepare_sources` made of them.
        eps: of the layer norms.
        dropout_p, output_dropout_p, seed: probabilities in [0, 1) that an attention weight, and that an element of what a
            source adds, is dropped; the others are divided by 1 - p. By counter, the same on every backend
            (`case_fast.ops.reference.cross_attention`). seed: in [0, 2^63), or an int64 tensor of one element on the device of
            hidden, whose value, modulo 2^63, is read when the kernels run.
        validate: as in `packed_attention`.

    Returns:
        (T, d), in the dtype of hidden. Under autocast: in autocast's dtype on GPU, in float32 on CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        IndexError: offsets that do not rise from 0 to the number of rows, or key_of out of range. All before any kernel runs.
        RuntimeError: a tensor of prepared sources has moved.
        ConfigError: CASE_FAST_BACKEND asks for a backend that cannot serve this call.

    Deterministic: equal inputs give equal bits, forward and backward, whatever the number of threads. No second derivative
    but on the reference backend.
    """
    if isinstance(sources, PreparedSources):
        keeps_all = dropout_p == 0 and output_dropout_p == 0 and type(seed) is int and 0 <= seed < 2**63
        if keeps_all and not torch.is_grad_enabled() and (stepped := sources.step(hidden, cu_hidden, eps)) is not None:
            return stepped
        sources = sources.sources
    device_type, given = common.device_type(hidden), hidden.dtype
    compute, differs = common.compute_dtype(hidden)
    if differs:
        (hidden,) = common.cast(compute, hidden)
        sources = _cast(sources, compute)
    _check(hidden, cu_hidden, sources)
    eps = common.finite("eps", eps)
    dropout_p = common.probability("dropout_p", dropout_p)
    output_dropout_p = common.probability("output_dropout_p", output_dropout_p)
    number, seed_at = common.seed_pair(seed, hidden.device)
    indices = common.like_indices(cu_hidden, *[x for s in sources for x in (s.cu_keys, s.key_of)])
    cu_hidden, cu_keys, key_of = indices[0], list(indices[1::2]), list(indices[2::2])

    runs = backend.choose(FAMILY, device_type, _beyond(sources, device_type))
    if device_type != "cpu":
        sources = _with_keys(sources)
    compiling = torch.compiler.is_compiling()
    if common.reads(validate, runs, device_type):
        _check_contents(hidden, cu_hidden, [s.floats()[0] for s in sources], cu_keys, key_of)
    floats, numbers = [x for s in sources for x in s.floats()], (eps, dropout_p, output_dropout_p, number, seed_at)
    if runs == "reference" and not compiling:
        with torch.autocast(device_type, enabled=False):
            plain, seed = _sources(floats, cu_keys, key_of), reference.seed_of(number, seed_at)
            out = reference.cross_attention(hidden, cu_hidden, plain, *numbers[:3], seed)
    elif torch.is_grad_enabled() and (hidden.requires_grad or any(x.requires_grad for x in floats)):
        tensors = (hidden, cu_hidden, *floats, *cu_keys, *key_of)
        hidden, cu_hidden, *tensors = common.distinct(tensors) if compiling else tensors
        out = _CrossAttention.apply(runs, hidden, cu_hidden, *numbers, len(sources), *tensors)
    else:
        out = common.call(_forward_op, _forward, runs, hidden, cu_hidden, floats, cu_keys, key_of, *numbers, False)[0]
    return common.restored(out, given)


# -------------------------------------------------------------------------------------------------------------------- steps


class PreparedSources:
    """Sources that were checked and laid out once, for every step of decoding a reply. Made by `prepare_sources`.

    Attributes:
        sources: the sources as the kernels read them.
    """

    def __init__(self, sources: Sequence[Source] | Sequence[RowSource]):
        first = sources[0] if sources else None
        width, like = (first.norm_weight.numel(), first.floats()[0]) if isinstance(first, Source | RowSource) else (0, None)
        if like is not None and torch.is_autocast_enabled(common.device_type(like)):
            sources = _cast(sources, common.compute_dtype(like)[0])
            first, like = sources[0], sources[0].floats()[0]
        _check_sources(sources, width, "sources[0]", like)
        common.check_dtype(f"sources[0].{first.FLOATS[0]}", like)
        for place, source in enumerate(sources):
            _check_lists(f"sources[{place}]", source, _sequences(first))
        sources, lists = _with_keys(sources), common.like_indices(*[x for s in sources for x in (s.cu_keys, s.key_of)])
        with torch.enable_grad():  # a copy keeps the way back to what it is of, for calls that are differentiated
            floats, cu_keys, key_of = _laid_out([x for s in sources for x in s.floats()], lists[::2], lists[1::2])
        self.sources = tuple(_sources(floats, cu_keys, key_of))
        key = floats[0]
        self._width, self._dtype, self._heads = width, key.dtype, tuple(key.shape[1:])
        self._batch = torch.Size([_sequences(self.sources[0]) + 1]), cu_keys[0].dtype  # what cu_hidden must be
        self._tensors = [x for x in (*floats, *cu_keys, *key_of) if x is not None]
        of_cpu = key.is_cpu and not common.watched(tuple(self._tensors))
        self._addresses = [x.data_ptr() for x in self._tensors] if of_cpu else []
        self._held = [x.detach() for x in self._tensors]  # so that nothing else comes to lie there
        self._members = None  # of struct case_fast_source, where the native kernel of the CPU takes them as they are
        if of_cpu and key.dtype not in common.HALF and not _beyond(self.sources, "cpu"):
            self._members = [_source_members(s.floats(), s.cu_keys, s.key_of, 0, 0) for s in self.sources]

    def step(self, hidden: Tensor, cu_hidden: Tensor, eps: float) -> Tensor | None:
        """`cross_attention` without gradients and dropout, on the CPU by the native module, with no more checks than these
        sources leave: all would be a quarter of the time. None where the call must go the whole way, if to an error.

        Raises:
            RuntimeError: a tensor of the sources has moved.
        """
        if self._members is None or common.watched((hidden, cu_hidden)) or torch.is_autocast_enabled("cpu"):
            return None
        if not (hidden.is_cpu and cu_hidden.is_cpu and hidden.is_contiguous() and cu_hidden.is_contiguous()):
            return None
        if hidden.dim() != 2 or hidden.shape[1] != self._width or hidden.dtype != self._dtype or not 0 <= eps < math.inf:
            return None
        if (cu_hidden.shape, cu_hidden.dtype) != self._batch or backend.choose(FAMILY, "cpu") != "native":
            return None
        if [x.data_ptr() for x in self._tensors] != self._addresses:
            raise RuntimeError("a tensor of the prepared sources has moved since; call prepare_sources again")
        out = torch.empty_like(hidden)
        call = _call_members(hidden, cu_hidden, self._heads, (eps, 0.0, 0.0), len(self._members), None)
        arguments = (hidden.data_ptr(), out.data_ptr(), 0, torch.get_num_threads())
        bad = backend.native.cross_attention_forward(call, self._members, *arguments)
        return None if bad else out


@common.public
def prepare_sources(sources: Sequence[Source] | Sequence[RowSource]) -> PreparedSources:
    """What `cross_attention` takes in place of sources that many calls share: prepare them once a reply, use them for each word.

    Tensors that lie as the kernels read them (rows of key and value dense, the others contiguous, all lists of one width) are not
    copied: values that change in place later are seen. Of others a copy is taken now, and later changes are not seen. Shapes,
    strides and storages may not change: on the CPU the next step raises RuntimeError where a tensor has moved (``.data =``,
    ``set_``, a storage that was freed), and never reads what else lies there now.

    Args:
        sources: of one kind, dtype, device and width d, for one number of sequences of hidden. Keys and values of a `RowSource`
            are made now.

    Raises:
        TypeError, ValueError: as `cross_attention`, of the sources. Contents of cu_keys and key_of are checked by each call.
    """
    return PreparedSources(sources)


# ------------------------------------------------------------------------------------------------------------------- checks


def _cast(sources: Sequence, compute: torch.dtype) -> Sequence:
    return [replace(s, **dict(zip(s.FLOATS, common.cast(compute, *s.floats()), strict=True))) for s in sources]


def _with_keys(sources: Sequence[Source] | Sequence[RowSource]) -> Sequence[Source]:
    return [s.projected() for s in sources] if isinstance(sources[0], RowSource) else sources


def _each(floats: Sequence[Tensor], sources: int) -> list[Sequence[Tensor]]:
    """The floats of each source, which tell its kind by their number."""
    each = len(floats) // sources
    return [floats[at : at + each] for at in range(0, len(floats), each)]


def _are_rows(floats: Sequence[Tensor]) -> bool:
    """Whether these are a RowSource's."""
    return len(floats) == len(RowSource.FLOATS)


def _heads(floats: Sequence[Tensor]) -> torch.Size:
    """(H, D) of a source."""
    return floats[1].shape[:2] if _are_rows(floats) else floats[0].shape[1:]


def _sources(floats: Sequence[Tensor], cu_keys: Sequence[Tensor], key_of: Sequence[Tensor | None]
             ) -> list[Source] | list[RowSource]:
    kind = RowSource if _are_rows(floats[: len(floats) // len(cu_keys)]) else Source
    return [
        kind(**dict(zip(kind.FLOATS, given, strict=True)), cu_keys=cu, key_of=of)
        for given, cu, of in zip(_each(floats, len(cu_keys)), cu_keys, key_of, strict=True)
    ]


def _beyond(sources: Sequence[Source] | Sequence[RowSource], device_type: str) -> str:
    """What about these sources the kernels do not take."""
    heads = {_heads(s.floats()) for s in sources}
    return "sources of different heads or dimensions" if len(heads) > 1 else common.beyond_gpu(heads.pop()[1], device_type)


def _sequences(source: Source | RowSource) -> int:
    """Of hidden, that it is for."""
    return source.cu_keys.shape[0] - 1 if source.key_of is None else source.key_of.shape[0]


def _check_lists(name: str, source: Source | RowSource, sequences: int) -> None:
    """As `common.check_sequences`, where no cu_hidden is known yet."""
    device, first = source.norm_weight.device, source.FLOATS[0]
    common.check_index(f"{name}.cu_keys", source.cu_keys, device, first)
    if source.key_of is not None:
        common.check_index(f"{name}.key_of", source.key_of, device, first)
    if source.cu_keys.shape[0] == 0:
        raise ValueError(f"{name}.cu_keys must hold one number more than there are sequences, so at least one")
    if _sequences(source) != sequences:
        raise ValueError(f"{name} must be for {sequences} sequences of hidden as sources[0], not for {_sequences(source)}")


def _check(hidden: Tensor, cu_hidden: Tensor, sources: Sequence[Source] | Sequence[RowSource]) -> None:
    """Shapes, dtypes and devices: whatever is known without reading a tensor."""
    common.check_dtype("hidden", hidden)
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be (T, d) with d above 0, not {tuple(hidden.shape)}")
    _check_sources(sources, hidden.shape[1], "hidden", hidden)
    for place, source in enumerate(sources):
        name = f"sources[{place}]"
        common.check_sequences("cu_hidden", cu_hidden, f"{name}.cu_keys", source.cu_keys, f"{name}.key_of", source.key_of,
                               hidden.device)


def _check_sources(sources: Sequence[Source] | Sequence[RowSource], width: int, like: str, of: Tensor) -> None:
    """Their float tensors, which have the dtype and device of ``of``."""
    if not sources:
        raise ValueError("sources must hold at least one source")
    kind = type(sources[0]) if isinstance(sources[0], RowSource) else Source
    for place, source in enumerate(sources):
        if not isinstance(source, kind):
            said = "Source or RowSource" if place == 0 else f"{kind.__name__} as sources[0]"
            raise TypeError(f"sources[{place}] must be a case_fast.ops.{said}, not {type(source).__name__}")
        name, (naming, wanted) = f"sources[{place}]", kind.TELLS
        told = getattr(source, naming)
        if told.dim() != 3 or 0 in _heads(source.floats()):
            raise ValueError(f"{name}.{naming} must be {wanted} with H and D above 0, not {tuple(told.shape)}")
        for part, x, shape in zip(kind.FLOATS, source.floats(), source.shapes(width), strict=True):
            said = like if part in (kind.FLOATS[0], naming) else f"{like} and {naming}"
            common.check_like(f"{name}.{part}", x, of.dtype, of.device, said)
            if x.shape != tuple(shape):
                raise ValueError(f"{name}.{part} must be {tuple(shape)} as {said} asks for, not {tuple(x.shape)}")


def _check_contents(hidden: Tensor, cu_hidden: Tensor, keys: Sequence[Tensor], cu_keys: Sequence[Tensor],
                    key_of: Sequence[Tensor | None]) -> None:
    """Reads all offsets and numbers, and raises IndexError at the first that is wrong."""
    common.check_offsets("cu_hidden", cu_hidden, hidden.shape[0], "rows of hidden")
    for place, (key, cu, of) in enumerate(zip(keys, cu_keys, key_of, strict=True)):
        common.check_offsets(f"sources[{place}].cu_keys", cu, key.shape[0], "rows of key")
        if of is not None:
            common.check_within(f"sources[{place}].key_of", of, cu.shape[0] - 1)


# ------------------------------------------------------------------------------------------------------------ registered ops


def _saved_size(hidden: Tensor, floats: Sequence[Tensor], sources: int) -> int:
    """Elements of saved. On CPU, for each source the normalised rows (T, d), 1 / deviation (T), query and attended (T, H, D),
    log of the softmax' divisor (T, H); of sources over rows also query by W_key and the weighted rows (T, H, d); elsewhere as
    `composed.views` reads it."""
    if not hidden.is_cpu:
        return composed.kept_size(hidden, floats)
    size, (rows, width) = 0, hidden.shape
    for of_source in _each(floats, sources):
        heads, dimension = _heads(of_source)
        size += rows * (width + 1 + heads * (2 * dimension + 1))
        size += 2 * rows * heads * width if _are_rows(of_source) else 0
    return size


def _outputs(hidden: Tensor, floats: Sequence[Tensor], sources: int, keep: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised out and saved."""
    size = _saved_size(hidden, floats, sources) if keep else 0
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return out, torch.empty(size, dtype=hidden.dtype, device=hidden.device)


def _gradients(hidden: Tensor, floats: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised gradients."""
    return common.empty_like(hidden, *floats)


def _forward(runs: str, hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor],
             key_of: list[Tensor | None], eps: float, dropout_p: float, output_dropout_p: float, seed: int,
             seed_at: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    out, saved = _outputs(hidden, floats, len(cu_keys), keep)
    if runs == "reference":  # torch.compile cannot look into it: what it does depends on the offsets
        _check_contents(hidden, cu_hidden, [of[0] for of in _each(floats, len(cu_keys))], cu_keys, key_of)
        sources, seed = _sources(floats, cu_keys, key_of), reference.seed_of(seed, seed_at)
        return reference.cross_attention(hidden, cu_hidden, sources, eps, dropout_p, output_dropout_p, seed), saved.zero_()
    hidden, cu_hidden = hidden.contiguous(), cu_hidden.contiguous()
    floats, cu_keys, key_of = _laid_out(floats, cu_keys, key_of)
    numbers = (eps, dropout_p, output_dropout_p, seed, seed_at)
    if not hidden.is_cpu and (keep or hidden.shape[0] > FEW_ROWS or hidden.shape[1] > MAX_WIDTH):
        return composed.forward(hidden, cu_hidden, floats, cu_keys, key_of, *numbers, out, saved if keep else None), saved
    _run("forward", hidden, cu_hidden, floats, cu_keys, key_of, numbers, (hidden, out, saved if keep else None), ())
    return out, saved


def _backward(runs: str, grad_out: Tensor, hidden: Tensor, cu_hidden: Tensor, floats: list[Tensor], cu_keys: list[Tensor],
              key_of: list[Tensor | None], saved: Tensor, eps: float, dropout_p: float, output_dropout_p: float, seed: int,
              seed_at: Tensor | None) -> list[Tensor]:
    if runs == "reference":
        def plain(hidden: Tensor, *floats: Tensor) -> Tensor:
            numbers = (eps, dropout_p, output_dropout_p, reference.seed_of(seed, seed_at))
            return reference.cross_attention(hidden, cu_hidden, _sources(floats, cu_keys, key_of), *numbers)

        return list(common.plain_gradients(plain, (hidden, *floats), grad_out))
    grad_out, saved = grad_out.contiguous(), saved.contiguous()
    hidden, cu_hidden = hidden.contiguous(), cu_hidden.contiguous()
    floats, cu_keys, key_of = _laid_out(floats, cu_keys, key_of)
    found, numbers = _gradients(hidden, floats), (eps, dropout_p, output_dropout_p, seed, seed_at)
    if not hidden.is_cpu:
        composed.backward(grad_out, hidden, cu_hidden, floats, cu_keys, key_of, saved, *numbers, found)
        return found
    gradients = [_gradient_members(of) for of in _each(found[1:], len(cu_keys))]
    _run("backward", hidden, cu_hidden, floats, cu_keys, key_of, numbers, (saved, grad_out, found[0]), (gradients,))
    return found


def _laid_out(floats: Sequence[Tensor], cu_keys: Sequence[Tensor], key_of: Sequence[Tensor | None]
              ) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """As the kernels read them."""
    laid = []
    for of_source in _each(floats, len(cu_keys)):
        if _are_rows(of_source):
            rows, *weights = of_source
            laid.append(common.rows_apart(rows.unsqueeze(1)).squeeze(1))
        else:
            key, value, *weights = of_source
            laid += [common.rows_apart(key), common.rows_apart(value)]
        laid += [x.contiguous() for x in weights]
    return laid, [x.contiguous() for x in cu_keys], common.contiguous(*key_of)


def _run(direction: str, hidden: Tensor, cu_hidden: Tensor, floats: Sequence[Tensor], cu_keys: Sequence[Tensor],
         key_of: Sequence[Tensor | None], numbers: tuple, others: tuple[Tensor | None, ...], more: tuple) -> None:
    """Runs the native kernel on what is laid out. others, more: what its arguments are beside the sources; without the last of
    others on CUDA, where forward keeps nothing for backward."""
    *scales, seed, seed_at = numbers
    given, sources = _each(floats, len(cu_keys)), []
    for place, (of_source, cu, of) in enumerate(zip(given, cu_keys, key_of, strict=True)):
        seeds = reference.source_seed(seed, place, 0), reference.source_seed(seed, place, 1)
        sources.append(_source_members(of_source, cu, of, *seeds))
    call = _call_members(hidden, cu_hidden, _heads(given[0]), scales, len(sources), seed_at)
    pointers = common.pointers(*(others if hidden.is_cpu else others[:-1]))
    status = common.run_native(f"{FAMILY}_{direction}", hidden, call, (sources, *pointers, *more))
    if status:
        place, status = divmod(status, 16)  # of source i, with 16 i on top
        names = {7: "cu_hidden", 8: f"sources[{place}].cu_keys", 9: f"sources[{place}].key_of"}
        common.refuse_contents(FAMILY, status, names,
                               lambda: _check_contents(hidden, cu_hidden, [of[0] for of in given], cu_keys, key_of))


def _call_members(hidden: Tensor, cu_hidden: Tensor, heads: Sequence[int], scales: Sequence[float], sources: int,
                  seed_at: Tensor | None) -> tuple:
    """Of struct case_fast_cross_attention. scales: eps, dropout_p, output_dropout_p."""
    return (
        cu_hidden.shape[0] - 1, hidden.shape[0], sources, hidden.shape[1], *heads, common.DTYPES[hidden.dtype],
        common.INDEX_BITS[cu_hidden.dtype], cu_hidden.data_ptr(), *scales, 0 if seed_at is None else seed_at.data_ptr(),
    )


def _source_members(floats: Sequence[Tensor], cu_keys: Tensor, key_of: Tensor | None, *seeds: int) -> tuple:
    """Of struct case_fast_source."""
    if _are_rows(floats):
        rows, *projections, norm_weight, norm_bias, query_weight, output_weight = floats
        key = value = rows.unsqueeze(1)
    else:
        key, value, norm_weight, norm_bias, query_weight, output_weight = floats
        projections = (None, None)
    weights = (norm_weight, norm_bias, query_weight, output_weight)
    return (
        cu_keys.shape[0] - 1, key.shape[0], common.row_stride(key), common.row_stride(value), cu_keys.data_ptr(),
        common.pointer_of(key_of, cu_keys), 0, *common.pointers(key, value, *weights), *seeds, *common.pointers(*projections),
    )


def _gradient_members(grads: Sequence[Tensor]) -> tuple:
    """Of struct case_fast_source_gradients."""
    if _are_rows(grads):
        rows, key_weight, value_weight, *weights = grads
        return tuple(common.pointers(rows, None, *weights, key_weight, value_weight))
    return tuple(common.pointers(*grads, None, None))


# floats: for each source, all of one kind, those that its FLOATS name, end to end.
_INPUTS = "Tensor hidden, Tensor cu_hidden, Tensor[] floats, Tensor[] cu_keys, Tensor?[] key_of"
# SymInt: a new seed does not compile again
_NUMBERS = "float eps, float dropout_p, float output_dropout_p, SymInt seed, Tensor? seed_at"
# out, and what backward needs of it, as the kernel lays it out; empty unless it is to be kept.
_forward_op = common.register(f"{FAMILY}_forward(str backend, {_INPUTS}, {_NUMBERS}, bool keep) -> (Tensor, Tensor)", _forward,
                              lambda runs, hidden, cu, floats, cu_keys, *rest: _outputs(hidden, floats, len(cu_keys), rest[-1]))
# Gradients of hidden and of floats.
_backward_op = common.register(
    f"{FAMILY}_backward(str backend, Tensor grad_out, {_INPUTS}, Tensor saved, {_NUMBERS}) -> Tensor[]", _backward,
    lambda runs, grad_out, hidden, cu, floats, *rest: _gradients(hidden, floats),
)


# --------------------------------------------------------------------------------------------------------------- autograd


class _CrossAttention(torch.autograd.Function):
    """Keeps, for each source, what its block made of the rows; computes the attention weights again."""

    @staticmethod
    def forward(ctx, runs, hidden, cu_hidden, eps, dropout_p, output_dropout_p, seed, seed_at, sources, *tensors):
        ctx.runs, ctx.numbers, ctx.sources = runs, (eps, dropout_p, output_dropout_p, seed), sources
        parted = _parted(tensors, sources)
        out, saved = common.call(_forward_op, _forward, runs, hidden, cu_hidden, *parted, *ctx.numbers, seed_at, True)
        ctx.save_for_backward(saved, seed_at, hidden, cu_hidden, *tensors)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        runs, numbers, sources = ctx.runs, ctx.numbers, ctx.sources

        def backward(grad_out, saved, seed_at, hidden, cu_hidden, *tensors):
            inputs = (hidden, cu_hidden, *_parted(tensors, sources))
            return common.call(_backward_op, _backward, runs, grad_out, *inputs, saved, *numbers, seed_at)

        grad_hidden, *grads = common.gradients(FAMILY, backward, (grad_out, *ctx.saved_tensors))
        return None, grad_hidden, *[None] * 7, *grads, *[None] * (2 * sources)


def _parted(tensors: tuple[Tensor | None, ...], sources: int) -> tuple[list, list, list]:
    """floats, cu_keys and key_of of so many sources that lie end to end."""
    floats = len(tensors) - 2 * sources
    return list(tensors[:floats]), list(tensors[floats : floats + sources]), list(tensors[floats + sources :])
