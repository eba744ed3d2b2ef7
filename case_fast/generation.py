"""Replies word by word: greedy search, beam search and sampling on one decoder with a key-value cache.

A reply ends with EOS or after ``max_words`` steps. Special tokens other than EOS are never said: they leave the softmax,
so that every log-probability here is that of a word among those that may be said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from case_fast.batch import Batch
from case_fast.data.store import Store
from case_fast.data.vocabulary import BOS, EOS, SPECIALS, UNK
from case_fast.equations import greatest
from case_fast.errors import CheckpointError, ConfigError
from case_fast.models.base import DialogueModel, Reading, evaluating

_HEAD = 1024  # words within which top-p nearly always ends


@dataclass(frozen=True)
class GenerationConfig:
    """How replies are generated.

    Attributes:
        strategy: greedy, beam or sample.
        max_words: steps at most, the EOS counted.
        min_words: EOS is not said before so many words.
        beams: hypotheses kept by beam search.
        length_penalty: beam search ranks by log-probability / length**length_penalty (EOS counted); 0: no normalisation.
        top_k: sample among the k most probable words; 0: among all.
        top_p: sample among the fewest most probable words that hold this probability together.
        temperature: divides the logits before sampling.
        seed: of sampling; a reply depends on it and on the dialogue's number, not on the batch.
        allow_unk: whether the unknown word may be said.

    Raises:
        ConfigError: a value cannot work, or a setting of sampling is given to another strategy.
    """

    strategy: Literal["greedy", "beam", "sample"] = "greedy"
    max_words: int = 30
    min_words: int = 0
    beams: int = 5
    length_penalty: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    allow_unk: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in ("greedy", "beam", "sample"):
            raise ConfigError(f"strategy must be greedy, beam or sample, not {self.strategy!r}")
        for name, least in (("max_words", 1), ("min_words", 0), ("beams", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number, at least {least}, not {value!r}")
        if self.min_words > self.max_words:
            raise ConfigError(f"min_words must not be above max_words: {self.min_words} > {self.max_words}")
        if not 0 <= self.length_penalty <= 10:
            raise ConfigError(f"length_penalty must be in 0 .. 10, not {self.length_penalty}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be above 0, not {self.temperature}; near 0, use strategy greedy")
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("temperature", 1.0)):
            if self.strategy != "sample" and getattr(self, name) != neutral:
                raise ConfigError(f"{name} has no effect with strategy {self.strategy}; use strategy sample")


@dataclass(frozen=True)
class Generated:
    """A reply: word ids without EOS, the sum of its log-probabilities (EOS included), and what ended it.

    ``score`` is the model's, before temperature, top-k and top-p.
    """

    words: tuple[int, ...]
    score: float
    ended_by: Literal["eos", "length"]


def generate(model: DialogueModel, batch: Batch, config: GenerationConfig, first_index: int | Sequence[int] = 0,
             reading: Reading | None = None) -> list[Generated]:
    """One reply for each dialogue of ``batch``; its own reply and emotion are not looked at.

    Among equal scores the lowest word id wins, and of hypotheses the one that ranked higher before.

    Args:
        batch: on the model's device.
        first_index: the first dialogue's number in the whole run, or the number of each; a sample depends on it.
        reading: ``model.read(batch)``, if it is there already.

    Raises:
        CheckpointError: the model's scores are NaN.
    """
    with evaluating(model):
        reading = model.read(batch) if reading is None else reading
        if config.strategy == "beam":
            return _beam(model, reading, config, batch.size)
        numbers = range(first_index, first_index + batch.size) if isinstance(first_index, int) else first_index
        if len(numbers) != batch.size:
            raise ValueError(f"first_index names {len(numbers)} dialogues, the batch holds {batch.size}")
        return _one_by_one(model, reading, config, numbers)


def generate_all(model: DialogueModel, store: Store, split: str, indices: Sequence[int] | None = None,
                 config: GenerationConfig | None = None, batch_size: int = 16, device: torch.device | str | None = None,
                 progress: Callable[[int, int], None] | None = None) -> list[Generated]:
    """Replies to the examples ``indices`` (None: all) of a store's split, in their order.

    Dialogues of like length share a batch. A sample depends on the example's index in the split alone.

    Args:
        device: where ``model`` is; None: asked from its parameters.
        progress: called with (done, total) after each batch.
    """
    config = config or GenerationConfig()
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    indices = list(range(store.size(split)) if indices is None else indices)
    device = device or next(model.parameters()).device
    length = {index: len(store.example(split, index).context) for index in set(indices)}
    order = sorted(range(len(indices)), key=lambda place: -length[indices[place]])  # too long for memory shows at once
    found: dict[int, Generated] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        chosen = [indices[place] for place in places]
        batch = store.batch(split, chosen, model.needs, seed=0).to(device)
        found.update(zip(places, generate(model, batch, config, chosen), strict=True))
        if progress:
            progress(len(found), len(order))
    return [found[place] for place in range(len(order))]


# ---- choosing words


def _never(config: GenerationConfig, step: int) -> list[int]:
    """The words that may not be said."""
    never = [word for word in range(len(SPECIALS)) if word != EOS and not (word == UNK and config.allow_unk)]
    return [*never, EOS] if step < config.min_words else never


def _forbid(logits: Tensor, config: GenerationConfig, step: int) -> Tensor:
    """Take the words that may not be said out of ``logits`` (n, V), in place."""
    logits[:, _never(config, step)] = -math.inf
    return logits


def _draw(logits: Tensor, config: GenerationConfig, uniform: Tensor) -> Tensor:
    """(n,) places in ``logits`` (n, m) by inversion of the distribution function at ``uniform`` (n,) in [0, 1)."""
    logits = logits.double()
    probability = ((logits - logits.amax(1, keepdim=True)) / config.temperature).softmax(1)
    vocabulary, word = logits.shape[1], None
    if config.top_k:
        probability, word = greatest(probability, min(config.top_k, vocabulary))
        probability = probability / probability.sum(1, keepdim=True)
    elif config.top_p < 1:
        # sorting the whole vocabulary is slow, and seldom needed
        head, word = greatest(probability, min(_HEAD, vocabulary))
        probability, word = (head, word) if (head.sum(1) >= config.top_p).all() else greatest(probability, vocabulary)
    if config.top_p < 1:
        # the words before it hold less than top_p, so the word that crosses top_p is kept
        probability = probability * (probability.cumsum(1) - probability < config.top_p)
    mass = probability.cumsum(1)
    place = torch.searchsorted(mass, (uniform * mass[:, -1]).unsqueeze(1), right=True).clamp(max=mass.shape[1] - 1)
    return (place if word is None else word.gather(1, place)).squeeze(1)


def _checked(score: float) -> float:
    if math.isnan(score):
        raise CheckpointError("the model's scores are not numbers (NaN): its weights are damaged, or its training diverged")
    return score


# ---- the three strategies


def _one_by_one(model: DialogueModel, reading: Reading, config: GenerationConfig, numbers: Sequence[int]) -> list[Generated]:
    """Greedy search and sampling: one hypothesis a dialogue; a dialogue that has ended leaves the batch."""
    device = reading.device
    state = model.start_decoding(reading)
    going = list(range(len(numbers)))  # the dialogues still in the batch
    words = torch.full((len(going),), BOS, device=device)
    said: list[list[int]] = [[] for _ in going]
    score = [0.0] * len(going)
    done: dict[int, Generated] = {}
    if config.strategy == "sample":
        # all draws of a dialogue in advance, from its own stream
        draws = [np.random.default_rng((config.seed, number)).random(config.max_words) for number in numbers]
        uniform = torch.from_numpy(np.stack(draws)).to(device)
    greedy = config.strategy == "greedy"
    few = 1 if greedy else min(config.top_k, model.config.vocab_size)  # words to choose from; 0: all
    for step in range(config.max_words):
        if few:
            gain, found = model.next_words(words, step, state, few, _never(config, step))
            place = torch.zeros_like(words) if greedy else _draw(gain, config, uniform[going, step])
            words = found.gather(1, place.unsqueeze(1)).squeeze(1)
        else:
            gain = _forbid(model.next_word_logits(words, step, state), config, step).log_softmax(1)
            words = place = _draw(gain, config, uniform[going, step])
        gain = gain.gather(1, place.unsqueeze(1)).squeeze(1)
        for dialogue, word, value in zip(going, words.tolist(), gain.tolist(), strict=True):
            score[dialogue] += _checked(value)
            if word != EOS:
                said[dialogue].append(word)
            if word == EOS or step + 1 == config.max_words:
                ended = "eos" if word == EOS else "length"
                done[dialogue] = Generated(tuple(said[dialogue]), score[dialogue], ended)
        if len(done) == len(numbers):
            break
        kept = [place for place, dialogue in enumerate(going) if dialogue not in done]
        if len(kept) < len(going):
            going = [going[place] for place in kept]
            index = torch.tensor(kept, device=device)
            state.keep(index)
            words = words[index]
    return [done[dialogue] for dialogue in range(len(numbers))]


def _normalised(score: float, length: int, config: GenerationConfig) -> float:
    return score / length**config.length_penalty


def _beam(model: DialogueModel, reading: Reading, config: GenerationConfig, dialogues: int) -> list[Generated]:
    """Beam search: at each step the ``beams`` best continuations of a dialogue live on; those that end with EOS compete for
    the reply. It ends when no open hypothesis can beat the best ended one, whatever its length; one beam is greedy search.
    """
    device, beams = reading.device, config.beams
    state = model.start_decoding(reading, beams)
    going = list(range(dialogues))
    words = torch.full((dialogues * beams,), BOS, device=device)
    score = torch.full((dialogues, beams), -math.inf, device=device)
    score[:, 0] = 0  # the hypotheses start alike: one of them is enough; -inf marks a free place
    said: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in going]
    best: list[Generated | None] = [None] * dialogues
    best_value = [-math.inf] * dialogues
    for step in range(config.max_words):
        most = min(beams, model.config.vocab_size)  # one hypothesis has no more survivors than that
        value, word = model.next_words(words, step, state, most, _never(config, step))
        total = score.flatten().unsqueeze(1) + value
        score, place = greatest(total.reshape(len(going), -1), beams)
        origin = place // value.shape[1]
        newest = word.reshape(len(going), -1).gather(1, place)

        length, last = step + 1, step + 1 == config.max_words
        kept = []
        for row, (scores, origins, latest) in enumerate(zip(score.tolist(), origin.tolist(), newest.tolist(), strict=True)):
            dialogue, before = going[row], said[row]
            said[row] = [[*before[source], new] for source, new in zip(origins, latest, strict=True)]
            highest = -math.inf  # what an open hypothesis can reach: scores only fall, so at best at the greatest length
            for hypothesis, reached, new in zip(said[row], scores, latest, strict=True):
                if _checked(reached) == -math.inf:
                    continue
                if new != EOS and not last:
                    highest = max(highest, _normalised(reached, config.max_words, config))
                elif _normalised(reached, length, config) > best_value[dialogue]:
                    best_value[dialogue] = _normalised(reached, length, config)
                    reply, ended = (hypothesis[:-1], "eos") if new == EOS else (hypothesis, "length")
                    best[dialogue] = Generated(tuple(reply), reached, ended)
            if highest > best_value[dialogue]:
                kept.append(row)
        if not kept:
            break
        state.reorder((torch.arange(len(going), device=device).unsqueeze(1) * beams + origin).flatten())
        score = score.masked_fill(newest == EOS, -math.inf)
        if len(kept) < len(going):
            going, said = [going[row] for row in kept], [said[row] for row in kept]
            index = torch.tensor(kept, device=device)
            state.keep(index)
            score, newest = score[index], newest[index]
        words = newest.flatten()
    return [reply for reply in best if reply is not None]


# ---- the reference


def generate_uncached(model: DialogueModel, batch: Batch, config: GenerationConfig) -> list[Generated]:
    """What `generate` must give for greedy and beam search, as plainly as it can be said.

    One dialogue at a time; the decoder reads the whole of every hypothesis again for each word; nothing stops early.
    """
    if config.strategy == "sample":
        raise ConfigError("generate_uncached knows the strategies greedy and beam")
    beams = config.beams if config.strategy == "beam" else 1
    replies = []
    with evaluating(model):
        reading = model.read(batch)
        for dialogue in range(batch.size):
            open_, ended = [((), 0.0)], []
            for step in range(config.max_words):
                logits = _next_logits(model, reading, dialogue, [words for words, _ in open_])
                score = torch.log_softmax(_forbid(logits, config, step), dim=1)
                score = score + torch.tensor([s for _, s in open_], device=score.device, dtype=score.dtype).unsqueeze(1)
                value, place = score.flatten().sort(descending=True, stable=True)
                best = [(v, p) for v, p in zip(value[:beams].tolist(), place[:beams].tolist(), strict=True) if v > -math.inf]
                grown = [((*open_[p // score.shape[1]][0], p % score.shape[1]), v) for v, p in best]
                ended += [hypothesis for hypothesis in grown if hypothesis[0][-1] == EOS]
                open_ = [hypothesis for hypothesis in grown if hypothesis[0][-1] != EOS]
                if not open_:
                    break
            words, score = max(ended + open_, key=lambda found: _normalised(found[1], len(found[0]), config))
            eos = words[-1] == EOS
            replies.append(Generated(words[:-1] if eos else words, score, "eos" if eos else "length"))
    return replies


def _next_logits(model: DialogueModel, reading: Reading, dialogue: int, hypotheses: list[tuple[int, ...]]) -> Tensor:
    """(n, V) scores of the word after each hypothesis, all of one length, by the decoder over the whole of them."""
    count = len(hypotheses)
    words = torch.tensor([[BOS, *hypothesis] for hypothesis in hypotheses], device=reading.device)
    cu = torch.arange(count + 1, device=reading.device) * words.shape[1]
    return model.reply_logits(words.flatten(), cu, reading.repeat(dialogue, count), last_only=True)
