"""What of a dialogue a model reads, line by line, as a person is shown it, and what each line weighs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from case_fast.data import edited
from case_fast.data.featurizer import Example, TextTable
from case_fast.data.text import tokenize
from case_fast.data.vocabulary import SPEAKER, UNK
from case_fast.knowledge import COGNITION_RELATIONS
from case_fast.models.results import Choice
from case_fast.serving.reasons import Concept, Inference, Reaction, Spread, Weighed, Word

KINDS = ("inferences", "reactions", "concepts", "context")
_WITHOUT = {"inferences": edited.without_inferences, "reactions": edited.without_reactions,
            "concepts": edited.without_concepts, "context": edited.without_words}


@dataclass(frozen=True)
class Line:
    """Something that is shown, and the rows of an example that it stands for.

    Attributes:
        kind: of `KINDS`. rows: of the example's fields of this kind, those of equal relation and text together; none of [CLS].
        vertices: the same among the rows of a model's choice of the name ``choice``, which reactions have none of.
    """

    kind: str
    item: Weighed
    rows: tuple[int, ...]
    choice: str | None = None
    vertices: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        relation = getattr(self.item, "relation", None)
        return f"{relation} {self.item.text}" if relation else self.item.text

    def without(self, example: Example) -> Example:
        """The example with all of this left out."""
        return _WITHOUT[self.kind](example, list(self.rows))


def reads_inferences(needs: Collection[str], sub: int | None = None) -> bool:
    """Whether a model with these `DialogueModel.needs` reads inferences and reactions: any, or those of a sub-utterance."""
    return "case" in needs or ("relations" in needs and not sub)


def lines_of(example: Example, texts: TextTable, needs: Collection[str]) -> list[Line]:
    """Of all that a model with these `DialogueModel.needs` reads of an example, in the example's order."""
    return [*_inferences(example, texts, needs), *_reactions(example, texts, needs),
            *(_concepts(example, texts) if "concept" in needs else ()), *_context(example, texts, "concept" in needs)]


def words_of(example: Example, texts: TextTable) -> list[str]:
    """The words of the context as they were written, those that were kept; as the vocabulary has them in a store whose texts were
    cut in another way."""
    words = [word for text in example.source["context"] for word in tokenize(text)][example.truncated :]
    return words if len(words) == len(example.context) else texts.vocabulary.decode(example.context.tolist())


def _inferences(example: Example, texts: TextTable, needs: Collection[str]) -> Iterable[Line]:
    """Vertices of equal relation and text are one line: u_0 and u_1 of a one-sentence utterance have the same inferences."""
    found: dict[tuple[int, str], list[int]] = {}
    subs = example.knowledge_sub.tolist()
    for row, (text, relation) in enumerate(zip(example.knowledge.tolist(), example.knowledge_relation.tolist(), strict=True)):
        if reads_inferences(needs, subs[row]):
            found.setdefault((relation, texts.text(text)), []).append(row)
    for (relation, text), rows in found.items():
        item = Inference(relation=COGNITION_RELATIONS[relation], text=text, of=_distinct(subs[row] for row in rows))
        yield Line("inferences", item, tuple(rows), "inferences", tuple(rows))


def _reactions(example: Example, texts: TextTable, needs: Collection[str]) -> Iterable[Line]:
    found: dict[str, list[int]] = {}
    subs = example.reaction_sub.tolist()
    for row, text in enumerate(example.reaction.tolist()):
        if reads_inferences(needs, subs[row]):
            found.setdefault(texts.text(text), []).append(row)
    for text, rows in found.items():
        yield Line("reactions", Reaction(text=text, of=_distinct(subs[row] for row in rows)), tuple(rows))


def _concepts(example: Example, texts: TextTable) -> Iterable[Line]:
    words = words_of(example, texts)
    fields = zip(texts.vocabulary.decode(example.concept.tolist()), example.tokens_of_concepts(words),
                 example.concept_intensity.tolist(), example.concept_position.tolist(), strict=True)
    for row, (text, tokens, intensity, position) in enumerate(fields):
        item = Concept(text=text, tokens=tokens, intensity=intensity, position=position)
        yield Line("concepts", item, (row,), "concepts", (1 + len(words) + row,))


def _context(example: Example, texts: TextTable, weighed: bool) -> Iterable[Line]:
    """``weighed``: whether they are vertices of G_EC, of which [CLS] is one too."""
    choice = "concepts" if weighed else None
    if weighed:
        yield Line("context", Word(text="[CLS]", position=0, by_speaker=True, known=True), (), choice, (0,))
    roles, ids = example.context_role.tolist(), example.context.tolist()
    for row, text in enumerate(words_of(example, texts)):
        item = Word(text=text, position=row + 1, by_speaker=roles[row] == SPEAKER, known=ids[row] != UNK)
        yield Line("context", item, (row,), choice, (row + 1,) if weighed else ())


def _distinct(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(values))


def weighed(lines: Sequence[Line], choices: Mapping[str, Choice], effects: Mapping[int, float] | None = None) -> list[Line]:
    """The lines with their numbers.

    Args:
        choices: of the one dialogue that the lines are of. effects: of the lines that have one, by their places.
    """
    found = []
    prior = {name: choice.prior.tolist() for name, choice in choices.items()}
    posterior = {name: choice.posterior.tolist() for name, choice in choices.items() if choice.posterior is not None}
    for place, line in enumerate(lines):
        numbers = {"effect": (effects or {}).get(place)}
        if line.choice in prior:
            weights = prior[line.choice]
            share = math.fsum(weights[vertex] for vertex in line.vertices)
            numbers |= {"prior": share, "lift": share * len(weights) / len(line.vertices)}
        if line.choice in posterior:
            numbers["posterior"] = math.fsum(posterior[line.choice][vertex] for vertex in line.vertices)
        found.append(replace(line, item=replace(line.item, **numbers)))
    return found


def items_of(lines: Sequence[Line]) -> dict[str, tuple[Weighed, ...]]:
    """The items of each kind: knowledge by falling prior, or by falling effect without one; words in their order."""
    found = {kind: [line.item for line in lines if line.kind == kind] for kind in KINDS}
    for kind in KINDS[:3]:
        found[kind].sort(key=lambda item: -(item.prior if item.prior is not None else item.effect or 0.0))
    return {kind: tuple(items) for kind, items in found.items()}


def spreads(choices: Mapping[str, Choice], items: Mapping[str, Sequence[Weighed]]) -> dict[str, Spread]:
    """How the weight of each choice that is not empty is spread."""
    found = {}
    for name, choice in choices.items():
        if not len(choice.prior):
            continue
        prior = choice.prior.double().clamp(min=1e-45)  # a product that is far below the others leaves 0
        posterior = None if choice.posterior is None else choice.posterior.double()
        shown = [*items[name], *(items["context"] if name == "concepts" else ())]
        found[name] = Spread(
            number=len(prior), prior=_as_if(prior), posterior=None if posterior is None else _as_if(posterior),
            kl=None if posterior is None else float((torch.xlogy(posterior, posterior) - torch.xlogy(posterior, prior)).sum()),
            largest_lift=max(item.lift for item in shown if item.lift is not None),
        )
    return found


def _as_if(probability: torch.Tensor) -> float:
    """exp of the entropy."""
    return float(torch.special.entr(probability).sum().exp())
