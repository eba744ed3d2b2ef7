"""The decoder of a model and both searches as they are usually written: padded, dense, every row to the end. Plain eager torch.

The same weights, the same `Reading`; a dialogue that has its reply stays in the batch until the last one has. Two forms: `Cached`
keeps the keys and values of what was said and projects the memories once, `Uncached` reads all that was said again for each word,
as the released code of CASE does. A step of either is one batched call a layer; attention is `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_fast.data.vocabulary import BOS, EOS, SPECIALS
from case_fast.equations import sinusoidal_position
from case_fast.generation import Generated, GenerationConfig
from case_fast.models import DialogueModel
from case_fast.models.base import Reading, evaluating
from case_fast.models.layers import Attention, DecoderLayer, Memory

Step = Callable[..., tuple]


def padded(memory: Memory, copies: int) -> tuple[Tensor, Tensor]:
    """(B copies, n, d) rows, 0 where there is none, and (B copies, 1, 1, n) where there is one."""
    sizes = memory.cu.diff()
    rows = nn.utils.rnn.pad_sequence(list(memory.rows.split(sizes.tolist())), batch_first=True)
    mask = torch.arange(rows.shape[1], device=rows.device) < sizes.unsqueeze(1)
    return rows.repeat_interleave(copies, 0), mask[:, None, None].repeat_interleave(copies, 0)


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    """By torch, as such code has it; the layer of the model itself computes by `case_fast.ops.linear`."""
    return F.linear(x, layer.weight, layer.bias)


def split(x: Tensor, heads: int) -> Tensor:
    """(R, n, d) to (R, H, n, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def projected(attention: Attention, memory: Tensor) -> tuple[Tensor, Tensor]:
    key, value = product(attention.key, memory), product(attention.value, memory)
    return split(key, attention.heads), split(value, attention.heads)


def attend(attention: Attention, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
           ) -> Tensor:
    """What is added to x (R, n, d); nothing where the mask leaves no key."""
    query = split(product(attention.query, x), attention.heads)
    found = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
    if mask is not None:
        found = found.masked_fill(~mask.any(-1, keepdim=True), 0)
    return product(attention.output, found.transpose(1, 2).flatten(2))


def after_self(layer: DecoderLayer, x: Tensor, memories: Sequence[tuple[Tensor, Tensor]], masks: Sequence[Tensor]) -> Tensor:
    """The sources in turn, by their keys and values, then the feed-forward net."""
    for norm, attention, (key, value), mask in zip(layer.cross_norm, layer.cross_attention, memories, masks, strict=True):
        x = x + attend(attention, norm(x), key, value, mask)
    inner, _, outer = layer.ffn
    return x + product(outer, F.relu(product(inner, layer.ffn_norm(x))))


def cached_step(model: DialogueModel, x: Tensor, past: list[tuple[Tensor, Tensor]], memories: list[list[tuple[Tensor, Tensor]]],
                masks: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Scores (R, V) after the newest word x (R, 1, d), and the longer past of each layer, (R, H, n, D) each."""
    longer = []
    for layer, before, keys in zip(model.decoder.layers, past, memories, strict=True):
        normed = layer.self_norm(x)
        key, value = (torch.cat(pair, 2) for pair in zip(before, projected(layer.self_attention, normed), strict=True))
        longer.append((key, value))
        x = after_self(layer, x + attend(layer.self_attention, normed, key, value), keys, masks)
    return model.output(model.decoder.norm(x))[:, 0], longer


class Cached:
    """Keys and values of the words so far, longer by one `cat` a word; those of the memories once."""

    def __init__(self, model: DialogueModel, reading: Reading, beams: int, step: Step = cached_step):
        self.model, self.run = model, step
        memories = [padded(memory, beams) for memory in reading.memories]
        self.masks = [mask for _, mask in memories]
        self.keys = [[projected(attention, rows) for attention, (rows, _) in zip(layer.cross_attention, memories, strict=True)]
                     for layer in model.decoder.layers]
        empty = [keys[0][0][:, :, :0] for keys in self.keys]
        self.past = [(x, x) for x in empty]
        self.position = 0

    def scores(self, words: Tensor) -> Tensor:
        """(R, V) of the next word after the newest words (R,)."""
        x = self.model.embedding(words) * self.model.config.d_model**0.5
        x = x + sinusoidal_position(torch.tensor([self.position], device=x.device), x.shape[-1], x.dtype)
        logits, self.past = self.run(self.model, x.unsqueeze(1), self.past, self.keys, self.masks)
        self.position += 1
        return logits

    def reorder(self, origin: Tensor) -> None:
        self.past = [(key[origin], value[origin]) for key, value in self.past]


class Uncached:
    """Reads all words so far, and projects the memories, again for each word."""

    def __init__(self, model: DialogueModel, reading: Reading, beams: int):
        self.model = model
        self.memories = [padded(memory, beams) for memory in reading.memories]
        self.words = torch.empty(reading.size * beams, 0, dtype=torch.int64, device=reading.device)

    def scores(self, words: Tensor) -> Tensor:
        self.words = torch.cat((self.words, words.unsqueeze(1)), 1)
        x = self.model.embedding(self.words) * self.model.config.d_model**0.5
        x = x + sinusoidal_position(torch.arange(x.shape[1], device=x.device), x.shape[2], x.dtype)
        masks = [mask for _, mask in self.memories]
        for layer in self.model.decoder.layers:
            normed = layer.self_norm(x)
            x = x + attend(layer.self_attention, normed, *projected(layer.self_attention, normed), causal=True)
            keys = [projected(a, rows) for a, (rows, _) in zip(layer.cross_attention, self.memories, strict=True)]
            x = after_self(layer, x, keys, masks)
        return self.model.output(self.model.decoder.norm(x[:, -1]))

    def reorder(self, origin: Tensor) -> None:
        self.words = self.words[origin]


def log_probabilities(decoder: Cached | Uncached, words: Tensor) -> Tensor:
    logits = decoder.scores(words)
    logits[:, [word for word in range(len(SPECIALS)) if word != EOS]] = -math.inf
    return logits.log_softmax(1)


def greedy(decoder: Cached | Uncached, dialogues: int, config: GenerationConfig, device: torch.device) -> list[Generated]:
    words = torch.full((dialogues,), BOS, device=device)
    done = torch.zeros(dialogues, dtype=torch.bool, device=device)
    score, said = torch.zeros(dialogues, dtype=torch.float64, device=device), []
    for _ in range(config.max_words):
        gain, words = log_probabilities(decoder, words).max(1)
        score += gain.double().masked_fill(done, 0)
        words = words.masked_fill(done, EOS)
        said.append(words)
        done = done | (words == EOS)
        if done.all():
            break
    found = []
    for row, reached in zip(torch.stack(said, 1).tolist(), score.tolist(), strict=True):
        ended = EOS in row
        found.append(Generated(tuple(row[: row.index(EOS)] if ended else row), reached, "eos" if ended else "length"))
    return found


def beam(decoder: Cached | Uncached, dialogues: int, config: GenerationConfig, device: torch.device) -> list[Generated]:
    """By hypotheses that are lists of words, and a note of the best ended one of each dialogue."""
    beams = config.beams
    words = torch.full((dialogues * beams,), BOS, device=device)
    score = torch.full((dialogues, beams), -math.inf, device=device)
    score[:, 0] = 0
    first = torch.arange(dialogues, device=device).unsqueeze(1) * beams
    open_: list[list[tuple[int, ...]]] = [[()] * beams for _ in range(dialogues)]
    best: list[tuple[float, Generated | None]] = [(-math.inf, None)] * dialogues
    done = [False] * dialogues
    for length in range(1, config.max_words + 1):
        total = score.view(-1, 1) + log_probabilities(decoder, words)
        score, place = total.view(dialogues, -1).topk(beams, 1)
        origin, newest = place // total.shape[1], place % total.shape[1]
        for d, (scores, origins, latest) in enumerate(zip(score.tolist(), origin.tolist(), newest.tolist(), strict=True)):
            open_[d] = [(*open_[d][source], word) for source, word in zip(origins, latest, strict=True)]
            if done[d]:
                continue
            reachable = -math.inf
            for said, reached, word in zip(open_[d], scores, latest, strict=True):
                if word != EOS and length < config.max_words:
                    reachable = max(reachable, reached / config.max_words**config.length_penalty)
                elif (rank := reached / length**config.length_penalty) > best[d][0]:
                    eos = word == EOS
                    best[d] = rank, Generated(said[:-1] if eos else said, reached, "eos" if eos else "length")
            done[d] = reachable <= best[d][0]
        if all(done):
            break
        decoder.reorder((first + origin).flatten())
        score = score.masked_fill(newest == EOS, -math.inf)
        words = newest.flatten()
    return [reply for _, reply in best if reply is not None]


def generate(model: DialogueModel, reading: Reading, config: GenerationConfig, form: Callable[..., Cached | Uncached]
             ) -> list[Generated]:
    """Replies by one of the two forms. For models without ``start`` and ``added`` in their reading; no word is forbidden but the
    special ones."""
    assert reading.start is None and reading.added is None and not config.min_words and not config.allow_unk
    with evaluating(model):
        beams = config.beams if config.strategy == "beam" else 1
        search = beam if config.strategy == "beam" else greedy
        return search(form(model, reading, beams), reading.size, config, reading.device)
