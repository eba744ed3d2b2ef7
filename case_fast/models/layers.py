"""Layers that the models share: packed Transformer encoders, graph encoders, and a decoder with several sources.

All of them take rows of sequences that lie end to end, with offsets; none of them knows padding.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from case_fast.equations import segment_ids, superimpose_intensity, take
from case_fast.errors import ConfigError
from case_fast.ops import (
    RowSource,
    Source,
    cross_attention,
    graph_attention,
    linear,
    packed_attention,
    pooled_attention,
    prepare_sources,
    reference,
    residual,
    residual_norm,
)
from case_fast.ops.transforms import constant_when_compiled


@constant_when_compiled  # a compiler does not see into zlib
def _number(place: str) -> int:
    return zlib.crc32(place.encode())


@dataclass
class Seed:
    """The seed of one place in a model, factor * step + shift modulo 2^63, from the seed of the step, as of `Batch.seed`.

    It stays in these parts until an op draws by it (`drawn`): one launch on the device, and none where nothing is drawn.
    """

    step: int | Tensor
    factor: int = 1
    shift: int = 0


AnySeed = Seed | Tensor | int


def _wrapped(number: int) -> int:
    """Modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


def seed_at(seed: AnySeed, place: str | int) -> Seed:
    """The seed of a place in what ``seed`` is for: apart from those of all other places.

    Odd factors (those of Knuth's MMIX), so that steps and places permute the seeds and none meets another of its kind.
    """
    outer = seed if isinstance(seed, Seed) else Seed(seed)
    number = _number(place) if isinstance(place, str) else place
    shift = outer.shift * 6364136223846793005 + number * 1442695040888963407 + 1
    return Seed(outer.step, _wrapped(outer.factor * 6364136223846793005), _wrapped(shift))


def drawn(seed: AnySeed) -> int | Tensor:
    """The seed as the ops take it: an int in [0, 2^63), or a tensor that they take modulo 2^63, never read on the host."""
    if not isinstance(seed, Seed):
        return seed
    if isinstance(seed.step, Tensor):
        return torch.rsub(seed.step, seed.shift, alpha=-seed.factor)  # shift + factor * step in one launch; int64 wraps
    return (seed.factor * seed.step + seed.shift) % 2**63


def product(x: Tensor, weight: Tensor | Sequence[Tensor], bias: Tensor | None = None, activation: str | None = None,
            split: bool = False) -> Any:
    """`case_fast.ops.linear`; under autocast on CPU torch's products, since those have half precision there and ours have not."""
    if not (x.is_cpu and torch.is_autocast_enabled("cpu")):
        return linear(x, weight, bias, activation, split)
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    y = reference.linear(x, weights, bias, activation)
    return y.split([w.shape[-2] for w in weights], -1) if split else y


def product_of_parts(weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """W_1 x and W_2 y of W = [W_1 W_2], (out, 2 d): their sum is W [x ; y], where x (n, d) and y (m, d) are of unlike rows and
    what is the same for many of them is made once."""
    of_x, of_y = weight.chunk(2, dim=1)
    return product(x, of_x), product(y.to(x.dtype), of_y)


class Linear(nn.Linear):
    """`torch.nn.Linear` for rows (n, d) by the package's own product."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def heads_of(x: Tensor, projections: Sequence[Linear], heads: int) -> tuple[Tensor, ...]:
    """x (T, d) through several projections by one product, (T, H, D) each."""
    return tuple([y.unflatten(-1, (heads, -1)) for y in product(x, [part.weight for part in projections], split=True)])


def normalized(x: Tensor, norm: nn.LayerNorm, update: Tensor | None = None, dropout_p: float = 0.0, seed: int | Tensor = 0
               ) -> tuple[Tensor, Tensor]:
    """x + dropout(update), or x alone, and the layer norm of that, (n, d) each."""
    return residual_norm(x, update, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p, seed=seed)


class Dropping(nn.Module):
    """A layer with dropout by counter, inside the kernels: which weights go depends on a seed alone, not on any random state."""

    def __init__(self, dropout_p: float):
        super().__init__()
        self.dropout_p = dropout_p

    def drop(self, seed: AnySeed) -> tuple[float, int | Tensor]:
        """Probability and seed for an op's dropout; none outside training."""
        p = self.dropout_p if self.training else 0.0
        return p, drawn(seed) if p else 0

    def added(self, x: Tensor, update: Tensor, norm: nn.LayerNorm, seed: AnySeed) -> tuple[Tensor, Tensor]:
        """x + dropout(update) and its layer norm, (n, d) each."""
        return normalized(x, norm, update, *self.drop(seed))


class Attention(Dropping):
    """Multi-head attention over packed sequences; projections without bias. ``width``: of all heads together, default d_model."""

    def __init__(self, d_model: int, heads: int, dropout: float, width: int | None = None):
        super().__init__(dropout)
        self.heads, width = heads, width or d_model
        self.query, self.key, self.value = (Linear(d_model, width, bias=False) for _ in range(3))
        self.output = Linear(width, d_model, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """(..., d) to (..., H, D)."""
        return x.unflatten(-1, (self.heads, -1))

    def projected(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (T, H, D) of rows (T, d), by one product."""
        return heads_of(rows, (self.query, self.key, self.value), self.heads)

    def of_rows(self) -> tuple[Tensor, Tensor]:
        """What makes keys and values of rows, by heads: (H, D, d) each."""
        return self.key.weight.unflatten(0, (self.heads, -1)), self.value.weight.unflatten(0, (self.heads, -1))

    def forward(self, rows: Tensor, cu: Tensor, causal: bool = False, seed: AnySeed = 0, index: Tensor | None = None) -> Tensor:
        """rows (T, d) attend to the rows of their own sequence; returns (T, d). ``seed``: of dropout. ``index`` (T,): row j is
        rows[index[j]] of fewer rows, whose queries, keys and values are made once."""
        dropout_p, own_seed = self.drop(seed)
        projected = self.projected(rows)
        if index is not None:
            projected = [take(part, index) for part in projected]
        attended = packed_attention(*projected, cu, cu, causal, dropout_p=dropout_p, seed=own_seed)
        return self.output(attended.flatten(-2))

    def pooled(self, first: Tensor, rows: Tensor, cu: Tensor, seed: AnySeed = 0) -> Tensor:
        """One row a sequence, first (s, d), attends to the rows (T, d) of its sequence; returns (s, d), as `forward` does for it.

        q . (W_k n) = (W_k^T q) . n and sum_j p_j (W_v n_j) = W_v (sum_j p_j n_j): keys and values are not made.
        """
        key, value = self.of_rows()
        query = product(self.split(self.query(first)), key.transpose(1, 2))
        dropout_p, own_seed = self.drop(seed)
        pooled = pooled_attention(query, rows, cu, key.shape[1] ** -0.5, dropout_p=dropout_p, seed=own_seed)
        return self.output(product(pooled, value).flatten(-2))


class FeedForward(nn.Sequential):
    """Two products with an activation ("relu" or "gelu") between them; its parameters are those of layers 0 and 2."""

    def __init__(self, d_model: int, width: int, activation: str = "relu"):
        super().__init__(Linear(d_model, width), nn.Identity(), Linear(width, d_model))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        inner, _, outer = self
        return outer(product(x, inner.weight, inner.bias, self.activation))


class EncoderLayer(Dropping):
    """Pre-LN Transformer encoder layer, from its first layer norm up to the one that follows it."""

    def __init__(self, d_model: int, heads: int, ffn: int, dropout: float, width: int | None = None):
        super().__init__(dropout)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = Attention(d_model, heads, dropout, width)
        self.ffn = FeedForward(d_model, ffn)

    def forward(self, x: Tensor, normed: Tensor, cu: Tensor, next_norm: nn.LayerNorm, first_only: bool = False,
                seed: AnySeed = 0, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (T, d) and its attention_norm -> the layer's (T, d) and its next_norm; ``first_only``: those of the first row of
        each sequence alone, (s, d). ``index`` (T,): row j of the sequences is x[index[j]] of fewer rows x."""
        if first_only:
            firsts, rows = (cu[:-1], normed) if index is None else (index.index_select(0, cu[:-1]), take(normed, index))
            x = take(x, firsts)
            attended = self.attention.pooled(take(normed, firsts), rows, cu, seed)
        else:
            x = x if index is None else take(x, index)
            attended = self.attention(normed, cu, seed=seed, index=index)
        x, normed = self.added(x, attended, self.ffn_norm, seed_at(seed, "attended"))
        return self.added(x, self.ffn(normed), next_norm, seed_at(seed, "feed-forward"))


class Encoder(nn.Module):
    """Pre-LN Transformer encoder with a final layer norm. ``width``: of the attention, default d_model."""

    def __init__(self, layers: int, d_model: int, heads: int, ffn: int, dropout: float, width: int | None = None):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d_model, heads, ffn, dropout, width) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, cu: Tensor, first_only: bool = False, seed: AnySeed = 0, index: Tensor | None = None) -> Tensor:
        """x (T, d) -> (T, d). ``first_only``: only the [CLS] rows (s, d), for which the last layer computes nothing else.
        ``index`` (T,): row j of the sequences is x[index[j]]; what depends on a row alone is computed once for its equals."""
        norms = [layer.attention_norm for layer in self.layers] + [self.norm]
        x, normed = normalized(x, norms[0])
        for place, layer in enumerate(self.layers):
            first = first_only and place == len(self.layers) - 1
            x, normed = layer(x, normed, cu, norms[place + 1], first, seed_at(seed, place), None if place else index)
        return normed


class GraphEncoderLayer(Dropping):
    """Post-LN graph Transformer layer (Eq. 1-2); with relations the relation-enhanced one of G_CS."""

    def __init__(self, d_model: int, heads: int, ffn: int, dropout: float, relations: bool):
        super().__init__(dropout)
        self.heads = heads
        self.query, self.key, self.value, self.output = (Linear(d_model, d_model, bias=False) for _ in range(4))
        self.relation = Linear(d_model, 2 * d_model, bias=False) if relations else None
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.ffn = FeedForward(d_model, ffn, "gelu")

    def forward(self, x: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None, relation_embedding: Tensor | None,
                intensity: Tensor | None = None, seed: AnySeed = 0, index: Tensor | None = None) -> Tensor:
        """x (V, d) -> (V, d). ``intensity`` (V,) scales the input of the closing layer norm. ``index``: as of `GraphEncoder`."""
        q, k, v = heads_of(x, (self.query, self.key, self.value), self.heads)
        if index is not None:
            x, q, k, v = (take(part, index) for part in (x, q, k, v))
        relation_query = relation_key = None
        if self.relation is not None and relation_embedding is not None:
            # projected once for the R types, never per edge
            relation_query, relation_key = (
                half.unflatten(-1, (self.heads, -1)) for half in self.relation(relation_embedding).chunk(2, dim=-1)
            )
        dropout_p, own_seed = self.drop(seed)
        attended = graph_attention(
            q, k, v, indptr, indices, relation if relation_query is not None else None, relation_query, relation_key,
            dropout_p=dropout_p, seed=own_seed,
        )
        _, x = self.added(x, self.output(attended.flatten(-2)), self.attention_norm, seed_at(seed, "attended"))
        of_ffn = seed_at(seed, "feed-forward")
        if intensity is None:
            return self.added(x, self.ffn(x), self.ffn_norm, of_ffn)[1]
        return normalized(superimpose_intensity(residual(x, self.ffn(x), *self.drop(of_ffn)), intensity), self.ffn_norm)[1]


class GraphEncoder(nn.Module):
    """Stack of graph layers; ``relations`` types of edges, or None for the vanilla graph Transformer."""

    def __init__(self, layers: int, d_model: int, heads: int, ffn: int, dropout: float, relations: int | None = None):
        super().__init__()
        self.relation_embedding = nn.Parameter(torch.randn(relations, d_model) * d_model**-0.5) if relations else None
        self.layers = nn.ModuleList(
            GraphEncoderLayer(d_model, heads, ffn, dropout, relations is not None) for _ in range(layers)
        )

    def forward(self, x: Tensor, indptr: Tensor, indices: Tensor, relation: Tensor | None = None,
                intensity: Tensor | None = None, seed: AnySeed = 0, index: Tensor | None = None) -> Tensor:
        """x (V, d) -> (V, d). ``intensity`` (V,) enters the last layer. ``index`` (V,): vertex i is x[index[i]] of fewer rows x,
        whose queries, keys and values are made once."""
        for place, layer in enumerate(self.layers):
            last = place == len(self.layers) - 1
            x = layer(x, indptr, indices, relation, self.relation_embedding, intensity if last else None, seed_at(seed, place),
                      None if place else index)
        return x


def refuse_halves(kind: str, weight: Tensor) -> None:
    """`ConfigError` where a model's weights are of half precision, in which losses and Adam lose what they would learn from."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"the weights of {kind} are {weight.dtype}, and it needs them in float32: call model.float(), and for half precision "
            "run it inside torch.autocast(device, torch.bfloat16), or train with --precision bf16"
        )


@dataclass
class Memory:
    """What a decoder attends to: rows (T, d) of all dialogues end to end, and their offsets cu (B + 1,)."""

    rows: Tensor
    cu: Tensor

    def repeat(self, dialogue: int, count: int) -> Memory:
        """The rows of one dialogue, ``count`` times."""
        rows = self.rows[self.cu[dialogue] : self.cu[dialogue + 1]]
        return Memory(rows.repeat(count, 1), torch.arange(count + 1, device=rows.device) * rows.shape[0])


class DecoderState:
    """Key-value cache of one-token decoding for B dialogues with ``beams`` hypotheses each, of at most ``words`` words.

    Which word is next, and what each hypothesis goes on from, is known to the device alone: nothing here asks it. With ``fixed``
    a step is moreover the same work for every word and for every batch that is loaded (`load`), in the same memory, so that one
    CUDA graph serves them all.

    Attributes:
        sources: of each layer, keys and values projected once, when decoding starts; all beams of a dialogue read the same.
        dialogues: a step reads so many; those that go on are the first.
        position: () int64, on the device: how many words the cache holds, the place of the next.
        places: (words, d) what a word's place adds to it, or None; the model sets it.
    """

    def __init__(self, sources: list[list[Source]], beams: int, words: int, start: Tensor | None = None,
                 added: Tensor | None = None, fixed: bool = False):
        like = sources[0][0].key
        self.beams, self.words, self.fixed = beams, words, fixed
        self.size = sources[0][0].cu_keys.numel() - 1  # dialogues that there is room for
        self.sources = [[_with_room(source) for source in layer] for layer in sources] if fixed else sources
        self.start, self.added = (x.clone() if fixed and x is not None else x for x in (start, added))
        self.places: Tensor | None = None
        hypotheses = self.size * beams
        self.position = torch.zeros((), dtype=torch.int64, device=like.device)
        # each hypothesis writes the keys and values of its newest word into a row of its own, which nobody writes again
        self.past = like.new_zeros(len(sources), hypotheses * words, 2, *like.shape[1:])
        self.own = torch.arange(hypotheses, device=like.device) * words
        # the rows of the words of each hypothesis, its ancestors' among them; and the place of each dialogue in the sources
        self.rows = self.own.unsqueeze(1) + torch.arange(words, device=like.device)
        self.key_of = torch.arange(self.size, device=like.device)
        self.filled = 0  # what position holds; with ``fixed`` only the device knows
        self._views: dict[int, tuple] = {}
        self.narrow(self.size)

    def narrow(self, dialogues: int) -> None:
        """From now on a step reads the first so many dialogues."""
        self.dialogues = dialogues
        if dialogues not in self._views:  # kept: a captured step reads them where they lie
            cu_words = torch.arange(dialogues * self.beams + 1, device=self.key_of.device)
            key_of = self.key_of[:dialogues]
            self._views[dialogues] = (
                cu_words, cu_words[:: self.beams].contiguous(),
                [prepare_sources([replace(source, key_of=key_of) for source in layer]) for layer in self.sources],
            )
        self.cu_words, self.cu_beams, self.prepared = self._views[dialogues]  # beams are rows of one sequence

    def reorder(self, origin: Tensor) -> None:
        """Go on from the hypotheses ``origin`` (dialogues * beams,), in that order."""
        self.rows[: len(origin)] = self.rows.index_select(0, origin)

    def keep(self, kept: Tensor, dialogues: int | None = None) -> None:
        """Go on with the dialogues ``kept`` (n,), ascending, which become the first; ``dialogues``: as of `narrow`, by default n.
        What fills up to so many is some dialogue that is read for nothing."""
        self.reorder((kept[:, None] * self.beams + torch.arange(self.beams, device=kept.device)).flatten())
        self.key_of[: len(kept)] = self.key_of.index_select(0, kept)
        self.narrow(len(kept) if dialogues is None else dialogues)

    def load(self, sources: list[list[Source]], start: Tensor | None, added: Tensor | None) -> bool:
        """Start anew, into the same memory, with another batch of at most as many dialogues; False where it has no room."""
        pairs = [pair for room, given in zip(self.sources, sources, strict=True) for pair in zip(room, given, strict=True)]
        if not self.fixed or not all(_fits(room, source) for room, source in pairs):
            return False
        for room, source in pairs:
            _fill(room, source)
        for room, given in ((self.start, start), (self.added, added)):
            if given is not None:
                room[: len(given)] = given
        torch.arange(self.size, out=self.key_of)
        self.position.zero_()
        return True

    def of_hypotheses(self, rows: Tensor) -> Tensor:
        """Rows (size, d) of dialogues in the order of the sources, for each hypothesis that a step reads."""
        return rows.index_select(0, self.key_of[: self.dialogues]).repeat_interleave(self.beams, 0)

    def next_place(self) -> Tensor:
        """(1, d) what its place adds to the next word."""
        if self.filled == self.words:
            raise IndexError(f"there is room for {self.words} words, and all of them are said")
        return self.places.index_select(0, self.position.view(1))

    def begin(self) -> None:
        """Find where the newest word's keys and values go, and which rows each hypothesis sees; once for all layers."""
        count, seen = self.dialogues * self.beams, self.words
        if not self.fixed:
            self.filled += 1
            seen = self.filled
        self.newest = self.own[:count] + self.position
        self.rows[:count].index_copy_(1, self.position.view(1), self.newest.unsqueeze(1))
        self.seen = self.rows[:count, :seen].flatten()
        self.cu_seen = self.cu_words * seen
        self.position += 1
        self.seen_length = self.position.repeat(count)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (hypotheses, H, D) of the newest words into the cache; returns what each hypothesis sees of this
        layer, packed: by cu_seen, of each sequence the first seen_length rows."""
        newest = torch.stack((key, value), 1).to(self.past.dtype)  # under autocast on CPU they come in half precision
        past = self.past[layer].index_copy_(0, self.newest, newest)
        return past.index_select(0, self.seen).unbind(1)


def _with_room(source: Source) -> Source:
    """A copy of it with room for batches like it, a quarter larger: behind the sequences there is one that no dialogue reads."""
    room = -(-source.key.shape[0] * 5 // 4 // 256) * 256 + 256
    cu = source.cu_keys.new_empty(source.cu_keys.numel() + 1)
    copy = replace(source, key=source.key.new_zeros(room, *source.key.shape[1:]),
                   value=source.value.new_zeros(room, *source.value.shape[1:]), cu_keys=cu)
    _fill(copy, source)
    return copy


def _fits(room: Source, source: Source) -> bool:
    return source.key.shape[0] <= room.key.shape[0] and source.cu_keys.numel() < room.cu_keys.numel()


def _fill(room: Source, source: Source) -> None:
    keys, dialogues = source.key.shape[0], source.cu_keys.numel() - 1
    room.key[:keys], room.value[:keys] = source.key, source.value
    room.cu_keys[: dialogues + 1] = source.cu_keys
    room.cu_keys[dialogues + 1 : -1] = keys
    room.cu_keys[-1] = room.key.shape[0]


class DecoderLayer(Dropping):
    """Pre-LN decoder layer: causal self-attention, one cross-attention for each source in turn, feed-forward."""

    def __init__(self, d_model: int, heads: int, ffn: int, dropout: float, sources: int, width: int | None = None):
        super().__init__(dropout)
        self.self_norm, self.self_attention = nn.LayerNorm(d_model), Attention(d_model, heads, dropout, width)
        self.cross_norm = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(sources))
        self.cross_attention = nn.ModuleList(Attention(d_model, heads, dropout, width) for _ in range(sources))
        self.ffn_norm, self.ffn = nn.LayerNorm(d_model), FeedForward(d_model, ffn)

    def forward(self, x: Tensor, normed: Tensor, cu: Tensor, memories: Sequence[Memory],
                next_norm: nn.LayerNorm | None = None, added: Tensor | None = None, seed: AnySeed = 0,
                watched: list[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """x (M, d) and its self_norm -> the layer's (M, d) and its next_norm, None where none follows. ``added`` (B, d): a row
        for each dialogue, added to all of its rows after the sources, as `addition` makes it. ``watched``: gets what the
        sources are read with (M, d)."""
        attended = self.self_attention(normed, cu, causal=True, seed=seed_at(seed, "self"))
        x = residual(x, attended, *self.drop(seed_at(seed, "attended")))
        if watched is not None:
            watched.append(x)
        p, of_cross = self.drop(seed_at(seed, "cross"))
        x = cross_attention(x, cu, self.sources(memories), dropout_p=p, output_dropout_p=p, seed=of_cross)
        if added is not None:
            x = x + take(self.addition(added), segment_ids(cu, x.shape[0]))
        x, normed = normalized(x, self.ffn_norm)
        of_ffn = seed_at(seed, "feed-forward")
        if next_norm is None:
            return residual(x, self.ffn(normed), *self.drop(of_ffn)), None
        return self.added(x, self.ffn(normed), next_norm, of_ffn)

    def addition(self, added: Tensor) -> Tensor:
        """What this layer adds to a dialogue's rows, (B, d), of what its `Reading` has."""
        return added

    def sources(self, memories: Sequence[Memory]) -> list[RowSource]:
        """The memories' rows, and the weights that make keys and values of them and attend to these."""
        return [
            RowSource(memory.rows, *attention.of_rows(), memory.cu, norm.weight, norm.bias, attention.query.weight,
                      attention.output.weight)
            for norm, attention, memory in zip(self.cross_norm, self.cross_attention, memories, strict=True)
        ]

    def step(self, x: Tensor, layer: int, state: DecoderState) -> Tensor:
        """One word for each hypothesis: x (B * beams, d) -> (B * beams, d)."""
        attention = self.self_attention
        normed = self.self_norm(x)
        query, key, value = attention.projected(normed)
        keys, values = state.append(layer, key, value)
        attended = packed_attention(query, keys, values, state.cu_words, state.cu_seen, key_length=state.seen_length)
        x = x + attention.output(attended.flatten(1))
        x = cross_attention(x, state.cu_beams, state.prepared[layer])
        if state.added is not None:
            x = x + self.addition(state.of_hypotheses(state.added))
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nn.Module):
    """Pre-LN Transformer decoder over several sources, for whole replies (`forward`) and word by word (`start`, `step`)."""

    def __init__(self, layers: int, d_model: int, heads: int, ffn: int, dropout: float, sources: int, width: int | None = None,
                 layer: type[DecoderLayer] = DecoderLayer):
        super().__init__()
        self.layers = nn.ModuleList(layer(d_model, heads, ffn, dropout, sources, width) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, cu: Tensor, memories: Sequence[Memory], added: Tensor | None = None, seed: AnySeed = 0,
                watched: list[Tensor] | None = None) -> Tensor:
        """x (M, d) packed decoder inputs, cu (B + 1,); returns (M, d). ``added`` (B, d) and, of the last layer, ``watched``: see
        `DecoderLayer`."""
        norms = [layer.self_norm for layer in self.layers] + [self.norm]
        x, normed = normalized(x, norms[0])
        for place, layer in enumerate(self.layers):
            last = place == len(self.layers) - 1
            x, normed = layer(x, normed, cu, memories, norms[place + 1], added, seed_at(seed, place), watched if last else None)
        return normed

    @torch.no_grad()
    def start(self, memories: Sequence[Memory], beams: int, words: int, start: Tensor | None = None,
              added: Tensor | None = None, fixed: bool = False) -> DecoderState:
        """``start``, ``added`` (B, d): of the `Reading`; ``words``, ``fixed``: see `DecoderState`."""
        return DecoderState(self._keys_and_values(memories), beams, words, start, added, fixed)

    @torch.no_grad()
    def restart(self, state: DecoderState, memories: Sequence[Memory], start: Tensor | None, added: Tensor | None) -> bool:
        """Start anew in the memory of a fixed state; False where it has no room for these."""
        return state.load(self._keys_and_values(memories), start, added)

    def _keys_and_values(self, memories: Sequence[Memory]) -> list[list[Source]]:
        """Of each layer, made once for all words."""
        return [[source.projected() for source in layer.sources(memories)] for layer in self.layers]

    @torch.no_grad()
    def step(self, x: Tensor, state: DecoderState) -> Tensor:
        """x (dialogues * beams, d), the embedded newest words; returns (dialogues * beams, d) and lengthens the cache."""
        state.begin()
        for place, layer in enumerate(self.layers):
            x = layer.step(x, place, state)
        return self.norm(x)
