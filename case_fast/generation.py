"""Replies word by word: greedy search, beam search and sampling on one decoder with a key-value cache.

A reply ends with EOS or after ``max_words`` steps. Special tokens other than EOS are never said: they leave the softmax,
so that every log-probability here is that of a word among those that may be said.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from case_fast.arguments import plain, settle, whole
from case_fast.batch import Batch
from case_fast.data.store import Store
from case_fast.data.vocabulary import BOS, EOS, SPECIALS, UNK
from case_fast.equations import full_precision, greatest
from case_fast.errors import CheckpointError, ConfigError
from case_fast.models.base import DialogueModel, Reading, evaluating

_HEAD = 1024  # words within which top-p nearly always ends
LOOK_EVERY = 8  # words on a GPU between two looks at what has ended; on a CPU a look costs nothing
_log = logging.getLogger("case_fast")


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
        settle(self)
        if self.strategy not in ("greedy", "beam", "sample"):
            raise ConfigError(f"strategy must be greedy, beam or sample, not {self.strategy!r}")
        for name, least in (("max_words", 1), ("min_words", 0), ("beams", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
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
    numbers = _numbers(batch, first_index)
    with evaluating(model):
        search = _search(model, config, model.read(batch) if reading is None else reading)
        search.begin(numbers)
        return _carry_out(search, search.step, 1 if search.device.type == "cpu" else LOOK_EVERY)


def _numbers(batch: Batch, first_index: int | Sequence[int]) -> Sequence[int]:
    """See `generate`."""
    first_index = plain(first_index)
    numbers = range(first_index, first_index + batch.size) if isinstance(first_index, int) else first_index
    if len(numbers) != batch.size:
        raise ValueError(f"first_index names {len(numbers)} dialogues, the batch holds {batch.size}")
    return numbers


def generate_all(model: DialogueModel, store: Store, split: str, indices: Sequence[int] | None = None,
                 config: GenerationConfig | None = None, batch_size: int = 32, device: torch.device | str | None = None,
                 progress: Callable[[int, int], None] | None = None) -> list[Generated]:
    """Replies to the examples ``indices`` (None: all) of a store's split, in their order.

    Dialogues of like length share a batch. A sample depends on the example's index in the split alone.

    Args:
        device: where ``model`` is; None: asked from its parameters.
        progress: called with (done, total) after each batch.
    """
    config = config or GenerationConfig()
    if (batch_size := whole("batch_size", batch_size)) < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    indices = list(range(store.size(split)) if indices is None else indices)
    device = device or next(model.parameters()).device
    length = {index: len(store.example(split, index).context) for index in set(indices)}
    order = sorted(range(len(indices)), key=lambda place: -length[indices[place]])  # too long for memory shows at once
    replayed = Replayed(model, config) if torch.device(device).type == "cuda" and not model.asks else None
    found: dict[int, Generated] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        chosen = [indices[place] for place in places]
        batch = store.batch(split, chosen, model.needs, seed=0).to(device)
        replies = generate(model, batch, config, chosen) if replayed is None else replayed.generate(batch, chosen)
        found.update(zip(places, replies, strict=True))
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
        # sorting the whole vocabulary is slow, and seldom needed; a GPU is not asked whether it is
        few = min(_HEAD, vocabulary) if logits.is_cpu else vocabulary
        head, word = greatest(probability, few)
        enough = few == vocabulary or (head.sum(1) >= config.top_p).all()
        probability, word = (head, word) if enough else greatest(probability, vocabulary)
    if config.top_p < 1:
        # the words before it hold less than top_p, so the word that crosses top_p is kept
        probability = probability * (probability.cumsum(1) - probability < config.top_p)
    mass = probability.cumsum(1)
    place = torch.searchsorted(mass, (uniform * mass[:, -1]).unsqueeze(1), right=True).clamp(max=mass.shape[1] - 1)
    return (place if word is None else word.gather(1, place)).squeeze(1)


def _penalty(model: DialogueModel, config: GenerationConfig, step: int, device: torch.device) -> Tensor:
    """(V,) what is added to the scores of the word at ``step``: -inf where it may not be said, else 0."""
    zero = full_precision(model.output.weight[:1, :1]).new_zeros(1, model.output.weight.shape[0])
    return _forbid(zero, config, step)[0]


# ---- the searches


class _Search:
    """The search for the replies to a batch. A `step` says one word and asks the device for nothing; what it changes stays where
    it lies, in tensors of the search, the dialogues that go on in the first rows: the steps of a fixed state can be captured.

    Attributes:
        going: places in the batch of the dialogues that have no reply yet, in the order of their rows.
        over: (rows,) whether a dialogue has its reply, or is read for nothing.
    """

    beams = 1

    def __init__(self, model: DialogueModel, config: GenerationConfig, reading: Reading, fixed: bool):
        self.model, self.config, self.device = model, config, reading.device
        self.state = model.start_decoding(reading, self.beams, config.max_words, fixed)
        self.penalty = _penalty(model, config, config.min_words, self.device)
        self.early = _penalty(model, config, 0, self.device) if config.min_words else None
        self.over = torch.empty(reading.size, dtype=torch.bool, device=self.device)

    def begin(self, numbers: Sequence[int]) -> None:
        """Stand before the first word of so many dialogues of the state; ``numbers``: see `generate`."""
        self.going = list(range(len(numbers)))
        self.over[: len(numbers)] = False
        self.over[len(numbers) :] = True

    def step(self) -> None:
        raise NotImplementedError

    def wrong(self) -> Tensor:
        """() whether a score was NaN."""
        raise NotImplementedError

    def replies(self, rows: Tensor) -> list[Generated]:
        """Of the dialogues at ``rows`` (n,), which are over."""
        raise NotImplementedError

    def moving(self) -> list[Tensor]:
        """What has a row for each dialogue, beside ``over``."""
        raise NotImplementedError

    def keep(self, rows: list[int], dialogues: int) -> None:
        """Go on with these rows; a step reads ``dialogues`` of them, the last of them for nothing where that is more."""
        kept = torch.tensor(rows, device=self.device)
        for x in self.moving():
            x[: len(rows)] = x.index_select(0, kept)
        self.over[: len(rows)] = False
        self.over[len(rows) :] = True
        self.state.keep(kept, dialogues)

    def now_penalty(self) -> Tensor:
        """(V,) what is added to the scores of the next word."""
        if self.early is None:
            return self.penalty
        return torch.where(self.state.position < self.config.min_words, self.early, self.penalty)


class _OneByOne(_Search):
    """Greedy search and sampling: one hypothesis a dialogue."""

    def __init__(self, model: DialogueModel, config: GenerationConfig, reading: Reading, fixed: bool):
        super().__init__(model, config, reading, fixed)
        size, most = reading.size, config.max_words
        self.said = torch.empty(size, most + 1, dtype=torch.int64, device=self.device)  # after BOS; EOS from the end on
        self.score = torch.empty(size, dtype=torch.float64, device=self.device)
        self.uniform = torch.zeros(size, most if config.strategy == "sample" else 0, dtype=torch.float64, device=self.device)

    def begin(self, numbers: Sequence[int]) -> None:
        super().begin(numbers)
        self.said.fill_(BOS)
        self.score.zero_()
        if self.config.strategy == "sample":  # all draws of a dialogue in advance, from its own stream
            draws = [np.random.default_rng((self.config.seed, number)).random(self.config.max_words) for number in numbers]
            self.uniform[: len(numbers)] = torch.from_numpy(np.stack(draws))

    def moving(self) -> list[Tensor]:
        return [self.said, self.score, self.uniform]

    def step(self) -> None:
        model, config, state = self.model, self.config, self.state
        said, score, uniform, over = (x[: state.dialogues] for x in (self.said, self.score, self.uniform, self.over))
        at, penalty = state.position.view(1).clone(), self.now_penalty()
        newest = said.index_select(1, at).squeeze(1)
        if few := 1 if config.strategy == "greedy" else min(config.top_k, model.config.vocab_size):
            gain, word = model.next_words(newest, state, few, penalty)
        else:  # among all words
            gain, word = (model.next_word_logits(newest, state) + penalty).log_softmax(1), None
        if config.strategy == "sample":
            place = _draw(gain, config, uniform.index_select(1, at).squeeze(1)).unsqueeze(1)
            gain, word = gain.gather(1, place), place if word is None else word.gather(1, place)
        score += gain.squeeze(1).double().masked_fill(over, 0)
        word = word.squeeze(1).masked_fill(over, EOS)
        said.index_copy_(1, at + 1, word.unsqueeze(1))
        over |= word == EOS

    def wrong(self) -> Tensor:
        return self.score[: len(self.going)].isnan().any()

    def replies(self, rows: Tensor) -> list[Generated]:
        found = []
        for (_, *said), score in zip(self.said[rows].tolist(), self.score[rows].tolist(), strict=True):
            eos = EOS in said
            found.append(Generated(tuple(said[: said.index(EOS)] if eos else said), score, "eos" if eos else "length"))
        return found


def _normalised(score: float, length: int, config: GenerationConfig) -> float:
    return score / length**config.length_penalty


class _BeamSearch(_Search):
    """Beam search: at each step the ``beams`` best continuations of a dialogue live on; those that end with EOS compete for
    the reply. It is over when no open hypothesis can beat the best ended one, whatever its length; one beam is greedy search.
    """

    def __init__(self, model: DialogueModel, config: GenerationConfig, reading: Reading, fixed: bool):
        self.beams = config.beams
        super().__init__(model, config, reading, fixed)
        most = config.max_words

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(reading.size, *shape, dtype=dtype, device=self.device)

        self.score = empty(self.beams, dtype=self.penalty.dtype)  # -inf marks a free place
        # the word of each hypothesis after so many words, and which hypothesis before it goes on from
        self.word, self.origin = empty(most + 1, self.beams), empty(most + 1, self.beams)
        # of the best ended hypothesis: rank, score, how many words it has and its place then
        self.best, self.best_score = empty(dtype=torch.float64), empty(dtype=torch.float64)
        self.best_at, self.best_place = empty(), empty()
        self.nan = torch.empty((), dtype=torch.bool, device=self.device)
        lengths = [max(length, 1) ** config.length_penalty for length in range(most + 1)]
        self.divisor = torch.tensor(lengths, dtype=torch.float64, device=self.device)
        self.first = torch.arange(reading.size, device=self.device).unsqueeze(1) * self.beams  # hypothesis of each dialogue

    def begin(self, numbers: Sequence[int]) -> None:
        super().begin(numbers)
        self.score.fill_(-math.inf)
        self.score[:, 0] = 0  # the hypotheses start alike: one of them is enough
        self.word.fill_(BOS)
        self.best.fill_(-math.inf)
        self.nan.fill_(False)

    def moving(self) -> list[Tensor]:
        return [self.score, self.word, self.origin, self.best, self.best_score, self.best_at, self.best_place]

    def step(self) -> None:
        model, state, beams, count = self.model, self.state, self.beams, self.state.dialogues
        score, words, origins, best, best_score, best_at, best_place = (x[:count] for x in self.moving())
        over, before = self.over[:count], state.position.view(1).clone()
        few = min(beams, model.config.vocab_size)  # one hypothesis has no more survivors than that
        newest = words.index_select(1, before).flatten()
        gain, word = model.next_words(newest, state, few, self.now_penalty())
        total = (score.view(-1, 1) + gain).view(count, -1)
        reached, place = (x[:, :beams] for x in total.sort(dim=1, descending=True, stable=True))
        origin, newest = place // few, word.view(count, -1).gather(1, place)
        at = before + 1
        origins.index_copy_(1, at, origin.unsqueeze(1))
        words.index_copy_(1, at, newest.unsqueeze(1))
        self.nan |= reached.isnan().any()

        eos, living = newest == EOS, reached > -math.inf
        ended = living & (eos | (at == self.config.max_words))
        # the best comes first. An open hypothesis can reach no more than its score at the greatest length: scores only fall
        exact = reached.double()
        rank, first = (exact / self.divisor[at]).masked_fill(~ended, -math.inf).amax(1), ended.int().argmax(1)
        highest = (exact / self.divisor[-1]).masked_fill(~living | ended, -math.inf).amax(1)
        better = (rank > best) & ~over
        found = (rank, exact.gather(1, first.unsqueeze(1)).squeeze(1), at, first)
        for kept, new in zip((best, best_score, best_at, best_place), found, strict=True):
            kept.copy_(torch.where(better, new, kept))
        over |= ~(highest > best)

        state.reorder((self.first[:count] + origin).flatten())
        score.copy_(reached.masked_fill(eos, -math.inf))

    def wrong(self) -> Tensor:
        return self.nan

    def replies(self, rows: Tensor) -> list[Generated]:
        words, origins = self.word[rows].tolist(), self.origin[rows].tolist()
        best = zip(self.best_score[rows].tolist(), self.best_at[rows].tolist(), self.best_place[rows].tolist(), strict=True)
        found = []
        for word, origin, (score, length, place) in zip(words, origins, best, strict=True):
            said = []
            for at in range(length, 0, -1):
                said.append(word[at][place])
                place = origin[at][place]
            eos = said[0] == EOS
            found.append(Generated(tuple(said[:0:-1] if eos else said[::-1]), score, "eos" if eos else "length"))
        return found


def _search(model: DialogueModel, config: GenerationConfig, reading: Reading, fixed: bool = False) -> _Search:
    return (_BeamSearch if config.strategy == "beam" else _OneByOne)(model, config, reading, fixed)


def _carry_out(search: _Search, step: Callable[[], None], look_every: int, rows_for: Callable[[int], int] = int
               ) -> list[Generated]:
    """The replies, in the order of the batch: after every ``look_every`` words those that are there are taken, and their
    dialogues leave. ``rows_for``: how many rows a step reads for so many dialogues."""
    most, done = search.config.max_words, {}
    for words in range(1, most + 1):
        step()
        if words % look_every and words < most:
            continue
        wrong, *over = torch.cat([search.wrong().view(1), search.over[: len(search.going)]]).tolist()
        if wrong:
            raise CheckpointError("the model's scores are not numbers (NaN): its weights are damaged, or its training diverged")
        ended = [row for row, is_over in enumerate(over) if is_over or words == most]
        if not ended:
            continue
        replies = search.replies(torch.tensor(ended, device=search.device))
        done.update(zip((search.going[row] for row in ended), replies, strict=True))
        kept = [row for row, dialogue in enumerate(search.going) if dialogue not in done]
        search.going = [search.going[row] for row in kept]
        if not kept:
            break
        search.keep(kept, rows_for(len(kept)))
    return [done[dialogue] for dialogue in range(len(done))]


# ---- many batches on a GPU


def _captured(step: Callable[[], None]) -> Callable[[], object]:
    """What replays a step, as a CUDA graph; the step itself where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        _log.info("decoding word by word is not captured in a CUDA graph: %s", str(error).split("\n", 1)[0])
        return step
    return graph.replay


class Replayed:
    """Generates replies to batch after batch in the same memory, each step of a search one CUDA graph: on a GPU, to launch a step
    takes longer than to compute it.

    There is a graph for each number of rows: the size of the first batch, and powers of two below. The first step of so many
    rows runs as it is (libraries and kernels are made ready at their first call), the second is captured.

    Args:
        record: makes of a step what repeats it; for tests.

    Raises:
        ConfigError: the model asks the device for what a tensor holds.
    """

    def __init__(self, model: DialogueModel, config: GenerationConfig,
                 record: Callable[[Callable[[], None]], Callable[[], object]] = _captured, look_every: int = LOOK_EVERY):
        if model.asks:
            raise ConfigError(f"what {model.config.kind} decodes cannot be replayed: {model.asks}. Use generate")
        self.model, self.config, self.record, self.look_every = model, config, record, look_every
        self.search: _Search | None = None
        self.steps: dict[int, Callable[[], object] | None] = {}

    def generate(self, batch: Batch, first_index: int | Sequence[int] = 0, reading: Reading | None = None) -> list[Generated]:
        """As `generate`."""
        numbers = _numbers(batch, first_index)
        with evaluating(self.model):
            reading = self.model.read(batch) if reading is None else reading
            if self.search is None or not self.model.restart_decoding(self.search.state, reading):
                self.steps.clear()  # their memory goes first
                self.search = _search(self.model, self.config, reading, fixed=True)
            self.search.begin(numbers)
            self.search.state.narrow(self._rows_for(len(numbers)))
            return _carry_out(self.search, self._step, self.look_every, self._rows_for)

    def _rows_for(self, dialogues: int) -> int:
        return min(1 << (dialogues - 1).bit_length(), len(self.search.over))

    def _step(self) -> None:
        rows = self.search.state.dialogues
        if rows not in self.steps:
            self.steps[rows] = None
            self.search.step()
            return
        if self.steps[rows] is None:
            self.steps[rows] = self.record(self.search.step)
        self.steps[rows]()


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
