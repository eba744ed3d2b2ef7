"""Real dialogues of a store, as a case of the benchmark asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from case_fast.data import Store
from case_fast.data.featurizer import Example, TextTable
from case_fast.data.graphs import cognition_graph
from case_fast.data.vocabulary import UNK

POOL = 2048  # training examples that contexts of a length are sought among
CONTEXTS = {"short": 0.1, "middle": 0.5, "long": 0.9, "longest": 0.995}  # the share of dialogues whose context is shorter


@dataclass(frozen=True)
class Choice:
    """Which dialogues, and how much of them.

    Attributes:
        size: dialogues a batch; count: batches.
        words: vocabulary of the model; rarer words of the store become unknown ones.
        inferences: most of a relation and sub-utterance, None for all that the store has.
        context: of `CONTEXTS`, or None for dialogues as they come.
    """

    size: int
    count: int
    words: int
    inferences: int | None = None
    context: str | None = None


def indices_of(store: Store, choice: Choice) -> list[list[int]]:
    """The examples of each batch, of the split "train": drawn once and for all, again from the start where there are too few."""
    order = np.random.default_rng(0).permutation(store.size("train"))
    wanted = choice.size * choice.count
    if choice.context is not None:
        pool = order[:POOL]
        by_length = pool[np.argsort([len(store.example("train", int(i)).context) for i in pool], kind="stable")]
        first = round(CONTEXTS[choice.context] * len(by_length)) - wanted // 2
        order = np.random.default_rng(1).permutation(by_length[max(0, min(first, len(by_length) - wanted)) :][:wanted])
    return np.resize(order, (choice.count, choice.size)).tolist()


def examples_of(store: Store, choice: Choice) -> tuple[list[list[Example]], TextTable]:
    """The examples of each batch, and the table that their text ids point into."""
    table, place = TextTable(store.featurizer.vocabulary), {}

    def clipped(ids: np.ndarray) -> np.ndarray:
        return np.where(ids < choice.words, ids, UNK).astype(ids.dtype)

    def text(index: int) -> int:
        if index not in place:
            place[index] = len(table)
            table.texts.append("")
            table.words.append(clipped(np.asarray(store.texts.tokens(index))))
        return place[index]

    def texts(ids: np.ndarray) -> np.ndarray:
        return np.array([text(index) for index in ids.tolist()], dtype=np.int32)

    def made(example: Example) -> Example:
        e = example if choice.inferences is None else capped(example, choice.inferences)
        return replace(
            e, context=clipped(e.context), response=clipped(e.response), concept=clipped(e.concept),
            sub_utterance=texts(e.sub_utterance), knowledge=texts(e.knowledge), reaction=texts(e.reaction),
        )

    return [[made(store.example("train", i)) for i in batch] for batch in indices_of(store, choice)], table


def capped(e: Example, most: int) -> Example:
    """The first so many inferences of each sub-utterance and relation, and the graph of what is left."""
    kept = _first(list(zip(e.knowledge_sub.tolist(), e.knowledge_relation.tolist(), strict=True)), most)
    felt = _first(e.reaction_sub.tolist(), most)
    return replace(
        e, knowledge=e.knowledge[kept], knowledge_sub=e.knowledge_sub[kept], knowledge_relation=e.knowledge_relation[kept],
        reaction=e.reaction[felt], reaction_sub=e.reaction_sub[felt],
        cognition_graph=cognition_graph(len(e.sub_utterance), e.knowledge_sub[kept], e.knowledge_relation[kept]),
    )


def _first(keys: Sequence[object], most: int) -> np.ndarray:
    """(n,) whether an entry is among the first ``most`` of its key."""
    seen: Counter[object] = Counter()
    kept = []
    for key in keys:
        seen[key] += 1
        kept.append(seen[key] <= most)
    return np.array(kept, dtype=bool)
