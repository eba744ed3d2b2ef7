"""What a reply and its reasons are made of: plain values, ready for JSON (docs/explain.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from case_fast.data.empathetic_dialogues import Turn

FORMAT = "case_fast explanation 1"
EVEN = 1.05  # no lift reaches this: the weight is spread evenly
NO_CHANGE = 0.001  # nats; no effect reaches this: nothing depends on it


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """Something that a model reads, and what that did.

    Attributes:
        prior: its share of the weight before a reply is known (Eq. 4); None where the model does not weigh it.
        posterior: the same once the reply is known (Eq. 5, 6).
        lift: the prior over what it would be, were the weight spread evenly.
        effect: log P(reply) - log P(reply without it), in nats; None where it was not asked for.
    """

    prior: float | None = None
    posterior: float | None = None
    lift: float | None = None
    effect: float | None = None


@dataclass(frozen=True, kw_only=True)
class Inference(Weighed):
    """A commonsense inference; ``of``: the sub-utterances u_0, u_1, ... that it was inferred from, all of which count."""

    relation: str
    text: str
    of: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Reaction(Weighed):
    """An inferred reaction of the speaker's; ``of``: as of an `Inference`."""

    text: str
    of: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Concept(Weighed):
    """An emotional concept: the context's words that it belongs to, its emotion intensity, and the place of the first of these
    words, from 1. Its weight is a share of that of [CLS], the words and the concepts together."""

    text: str
    tokens: tuple[str, ...]
    intensity: float
    position: int


@dataclass(frozen=True, kw_only=True)
class Word(Weighed):
    """A word of the context as the model reads it, at ``position`` 1, 2, ...; at 0 [CLS], which cannot be left out.

    Attributes:
        by_speaker: whose word it is. known: whether the vocabulary has it.
    """

    text: str
    position: int
    by_speaker: bool
    known: bool


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply and its reasons.

    Attributes:
        text: the reply; ``words`` before they were joined.
        emotion: the speaker's predicted emotion; ``emotions``: all with their probabilities, which fall. None and empty where the
            model predicts none.
        sub_utterances: u_0, the speaker's last utterance, and its sentences u_1, ...
        inferences, concepts: by falling prior. The priors of the inferences add up to 1 when there are any. Those, reactions and
            concepts are empty where the model reads no such thing.
        reactions: inferred reactions of the speaker.
        unknown_words: context words that the vocabulary lacks. truncated: how many context words were cut off at the front.
        gate: share of the first side of the ``balance`` that the model's gate weighs (mu of Eq. 15: concepts, reactions); None
            where it has none.
        score: log-probability of the reply among those that may be said; None of one that was given.
    """

    text: str
    words: tuple[str, ...]
    emotion: str | None
    emotions: tuple[tuple[str, float], ...]
    sub_utterances: tuple[str, ...]
    inferences: tuple[Inference, ...]
    reactions: tuple[Reaction, ...]
    concepts: tuple[Concept, ...]
    unknown_words: tuple[str, ...]
    truncated: int
    gate: float | None
    balance: tuple[str, str] | None
    score: float | None

    def __str__(self) -> str:
        return self.text

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """How the weight is spread over ``number`` things.

    Attributes:
        prior, posterior: exp of the entropy: as if the weight were even over so many.
        kl: of posterior to prior, in nats (Eq. 7, one of its terms).
        largest_lift: of the lines shown.
    """

    number: int
    prior: float
    posterior: float | None
    kl: float | None
    largest_lift: float


@dataclass(frozen=True)
class Node:
    """A vertex, or several with one text; ``kind``: sub-utterance, inference, start, word or concept.

    Attributes:
        lift: as of `Weighed`. left_out: an edit took it out.
    """

    id: str
    kind: str
    text: str
    relation: str | None = None
    lift: float | None = None
    intensity: float | None = None
    left_out: bool = False


@dataclass(frozen=True)
class Edge:
    """An edge between two nodes, either way; ``weight``: the prior of the vertex that this edge joins, where it is weighed."""

    source: str
    target: str
    relation: str
    weight: float | None = None
    left_out: bool = False


@dataclass(frozen=True)
class Graph:
    """G_CS ("cognition") or G_EC ("concepts") without loops."""

    name: str
    title: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Attention:
    """How much each word of the reply reads each row of a source, averaged over the heads of the decoder's last layer.

    Attributes:
        source: "inferences", "concepts", "context", "context, emotional". rows: what they are.
        words: of the reply, "<eos>" last. weights: a row a word, each adds up to 1 where the source has any.
    """

    source: str
    rows: tuple[str, ...]
    words: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Moved:
    """A weight before and after edits; None where the thing is not there."""

    kind: str
    relation: str | None
    text: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Change:
    """What edits changed.

    Attributes:
        before, after: the model's replies without and with them.
        words: what became of the words, (equal | replace | delete | insert, words before, words after) in order.
        emotions: (emotion, probability before, after), the largest change first. gate: before, after.
        weights: of inferences and concepts, the largest change first.
        log_p: of the reply explained without edits, before and now: what the edits make of what was said.
    """

    before: str
    after: str
    words: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    emotions: tuple[tuple[str, float, float], ...]
    gate: tuple[float, float] | None
    weights: tuple[Moved, ...]
    log_p: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Explanation(Reply):
    """A reply, said by the model or given to it, and all that can be said of its reasons.

    Attributes:
        model: its kind. turns: the dialogue, edits carried out. edits: as they were given.
        given: whether the reply was given. unknown_in_reply: its words that the vocabulary lacks.
        log_p: log-probability of the reply's words and of its end among all words of the vocabulary, in nats; what an effect is a
            difference of. perplexity: exp of minus its mean over these.
        context: the words as the model reads them.
        spreads: of "inferences" and "concepts", where they are weighed.
        attention: empty where it was not asked for. change: None without edits.
    """

    model: str
    turns: tuple[Turn, ...]
    edits: tuple[dict[str, Any], ...]
    given: bool
    unknown_in_reply: tuple[str, ...]
    log_p: float
    perplexity: float
    context: tuple[Word, ...]
    spreads: dict[str, Spread] = field(default_factory=dict)
    graphs: tuple[Graph, ...] = ()
    attention: tuple[Attention, ...] = ()
    change: Change | None = None

    @property
    def notes(self) -> dict[str, list[str]]:
        """What has to be said of each kind of thing before any of its numbers is read; see docs/explain.md."""
        kinds: dict[str, Sequence[Weighed]] = {"inferences": self.inferences, "reactions": self.reactions,
                                               "concepts": self.concepts, "context": self.context}
        return {kind: [*self._evenly(kind), *_unmoved(items)] for kind, items in kinds.items() if items}

    def _evenly(self, kind: str) -> list[str]:
        spread = self.spreads.get(kind)
        if spread is None or spread.largest_lift >= EVEN:
            return []
        what = "inferences" if kind == "inferences" else "vertices: [CLS], words and concepts"
        return [f"weight is spread evenly over {spread.number} {what}"]

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "notes": self.notes}


def _unmoved(items: Sequence[Weighed]) -> list[str]:
    effects = [abs(item.effect) for item in items if item.effect is not None]
    return ["leaving any of them out does not change the reply"] if effects and max(effects) < NO_CHANGE else []
