"""From the texts of a dialogue to what the model reads: word ids, roles, intensities, knowledge and both graphs.

Preparing a store and answering a raw sentence go through the same `Featurizer`, so that they cannot differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from case_fast.data.empathetic_dialogues import EMOTION_IDS, Turn
from case_fast.data.graphs import CONCEPT, CSR, cognition_graph, concept_graph
from case_fast.data.ragged import Ragged
from case_fast.data.text import is_word, normalize_space, split_sentences, tokenize
from case_fast.data.vocabulary import LISTENER, SPEAKER, UNK, Vocabulary
from case_fast.errors import ConfigError, DataError
from case_fast.knowledge.source import COGNITION_RELATIONS, REACTION_RELATION
from case_fast.text_files import read_json

Inferences = Mapping[str, Mapping[str, Sequence[str]]]  # sub-utterance -> relation -> texts, best first


@dataclass(frozen=True)
class FeatureSettings:
    """What decides the features of an example, besides its texts and the knowledge itself.

    Attributes:
        max_context: context words kept, the latest ones (the [CLS] in front not counted).
        inferences_per_relation: l of the paper.
        concepts_per_token: concepts kept for one word.
        concepts_per_dialogue: N' of the paper.
        minimum_intensity: least emotion intensity of a concept.
    """

    max_context: int = 512
    inferences_per_relation: int = 5
    concepts_per_token: int = 3
    concepts_per_dialogue: int = 10
    minimum_intensity: float = 0.6

    def __post_init__(self) -> None:
        for name, least in (("max_context", 1), ("inferences_per_relation", 1), ("concepts_per_token", 1),
                            ("concepts_per_dialogue", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")


class EmotionWords:
    """Which words are emotional: no stop words, and of a list; where there is none, those that have an intensity."""

    def __init__(self, vocabulary: Vocabulary, intensity: Mapping[str, float], listed: Collection[str] | None = None):
        self.vocabulary, self.intensity, self.listed = vocabulary, intensity, listed

    @cached_property
    def known(self) -> np.ndarray:
        """(V,) bool, of each word of the vocabulary. Looked up when it is first asked for, as the stop words are."""
        words = {word for word, value in self.intensity.items() if value} if self.listed is None else set(self.listed)
        return np.array([word in words for word in self.vocabulary.words]) & ~self.vocabulary.is_stop_word

    def of_context(self, words: np.ndarray, intensity: np.ndarray) -> np.ndarray:
        """(n,) bool, of the words (n,) of contexts, whose intensities say which unknown ones among them are of the lexicon."""
        found = self.known[words]
        return found if self.listed is not None else found | ((words == UNK) & (intensity != 0))


@dataclass
class TextTable:
    """Distinct knowledge texts (sub-utterances and inferences) as word ids; a text's id is its place of first use.

    `Featurizer.text_table` makes one that can say which words are ``emotional``.
    """

    vocabulary: Vocabulary
    emotional: EmotionWords | None = None
    texts: list[str] = field(default_factory=list)
    words: list[np.ndarray] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        index = self.ids.get(text)
        if index is None:
            index = self.ids[text] = len(self.texts)
            self.texts.append(text)
            self.words.append(np.array(self.vocabulary.encode(tokenize(text)), dtype=np.int32))
        return index

    def __len__(self) -> int:
        return len(self.texts)

    def tokens(self, index: int) -> np.ndarray:
        return self.words[index]

    def rows(self, ids: np.ndarray) -> Ragged:
        return Ragged.of([self.words[index] for index in ids.tolist()])

    def text(self, index: int) -> str:
        return self.texts[index]


@dataclass(frozen=True)
class Example:
    """One listener turn as arrays (int32 unless said otherwise); text fields hold ids into a table of texts.

    Attributes:
        context, context_role, context_intensity: (n,) words, role tokens, emotion intensities (float32); [CLS] not included.
        response: (m,) words, without BOS and EOS.
        feedback: (f,) words of what the speaker says after it, none where nothing follows; None in a store without that field.
        sub_utterance: (t + 1,) texts u_0 .. u_t.
        knowledge, knowledge_sub, knowledge_relation: (k,) inferred text, its sub-utterance, its relation (0..3).
        reaction, reaction_sub: (r,) inferred reaction text and its sub-utterance.
        concept, concept_position, concept_intensity: (c,) word, position of its first token (1 .. n), intensity (float32).
        cognition_graph, concept_graph: the two graphs.
        truncated: context words that `max_context` cut off.
        source: the texts it was made from, for people.
    """

    context: np.ndarray
    context_role: np.ndarray
    context_intensity: np.ndarray
    response: np.ndarray
    emotion: int
    sub_utterance: np.ndarray
    knowledge: np.ndarray
    knowledge_sub: np.ndarray
    knowledge_relation: np.ndarray
    reaction: np.ndarray
    reaction_sub: np.ndarray
    concept: np.ndarray
    concept_position: np.ndarray
    concept_intensity: np.ndarray
    cognition_graph: CSR
    concept_graph: CSR
    truncated: int
    source: dict
    feedback: np.ndarray | None = None

    def column(self, name: str) -> np.ndarray:
        """A field as it is stored and packed; of a graph its degrees (vertices), neighbours or relations (edges):
        cognition_degree, cognition_indices, cognition_relation, and the same of concept."""
        graph, _, part = name.partition("_")
        if graph not in ("cognition", "concept") or part not in ("degree", "indices", "relation"):
            if (values := getattr(self, name)) is None:
                raise ConfigError(f"the example has no field {name}: its store was made by a version without that; make it again "
                                  "with case-fast prepare")
            return values
        csr = getattr(self, f"{graph}_graph")
        return np.diff(csr.indptr) if part == "degree" else getattr(csr, part)

    def tokens_of_concepts(self, words: Sequence[str]) -> list[tuple[str, ...]]:
        """The distinct context words that each concept is joined to; ``words`` (n,): the context's, as many as were kept."""
        found: list[dict[str, None]] = [{} for _ in self.concept]
        first = 1 + len(words)
        for vertex, neighbour, relation in self.concept_graph.edges():
            if relation == CONCEPT and vertex >= first:
                found[vertex - first][words[neighbour - 1]] = None
        return [tuple(tokens) for tokens in found]


def sub_utterances(utterance: str) -> list[str]:
    """u_0 .. u_t: the whole utterance, then its sentences (t >= 1; equal texts when it has one sentence)."""
    return [normalize_space(utterance), *split_sentences(utterance)]


def prompts(context: Sequence[Turn], cut: Sequence[str] = ()) -> list[str]:
    """What knowledge is inferred from: u_0 .. u_t of the last speaker turn; ``cut``, if it is known how that is cut."""
    if cut:
        return list(cut)
    last = next((turn for turn in reversed(context) if turn.by_speaker), None)
    if last is None:
        raise ValueError("context must hold at least one turn of the speaker's")
    return sub_utterances(last.text)


class Featurizer:
    """Vocabulary, concepts and intensities, and how a dialogue is turned into an `Example` with them.

    Args:
        vocabulary: the words.
        concepts: head word -> its best concepts (as `read_concepts` gives them).
        intensity: word -> emotion intensity w; a word not in it has 0.
        emotion_words: those that count as emotional, stop words aside; None: those that have an intensity.
    """

    def __init__(self, vocabulary: Vocabulary, concepts: Mapping[str, Sequence[str]], intensity: Mapping[str, float],
                 settings: FeatureSettings | None = None, emotion_words: Collection[str] | None = None):
        self.vocabulary, self.concepts, self.intensity = vocabulary, concepts, intensity
        self.settings = settings or FeatureSettings()
        self.emotional = EmotionWords(vocabulary, intensity, emotion_words)

    def text_table(self) -> TextTable:
        """An empty table for the texts of its examples."""
        return TextTable(self.vocabulary, self.emotional)

    def example(self, context: Sequence[Turn], inferences: Inferences, texts: TextTable, response: str = "",
                emotion: str | None = None, feedback: str = "", cut: Sequence[str] = (), **source: str) -> Example:
        """The example of a dialogue; ``inferences`` are those of its `prompts`, ``feedback`` what the speaker says after the
        response.

        Args:
            cut: u_0 .. u_t where they are known.

        Raises:
            ValueError: the context holds no turn of the speaker's.
        """
        subs = prompts(context, cut)
        words: list[str] = []
        roles: list[int] = []
        for turn in context:
            tokens = tokenize(turn.text)
            words += tokens
            roles += [SPEAKER if turn.by_speaker else LISTENER] * len(tokens)
        truncated = max(0, len(words) - self.settings.max_context)
        words, roles = words[truncated:], roles[truncated:]
        knowledge, reactions = self._knowledge(subs, inferences, texts)
        concepts, edges = self._concepts(words)
        first = {}
        for token, concept in edges:
            first.setdefault(concept, token + 1)
        return Example(
            context=np.array(self.vocabulary.encode(words), dtype=np.int32),
            context_role=np.array(roles, dtype=np.int32),
            context_intensity=np.array([self.intensity.get(word, 0.0) for word in words], dtype=np.float32),
            response=np.array(self.vocabulary.encode(tokenize(response)), dtype=np.int32),
            emotion=EMOTION_IDS[emotion] if emotion is not None else -1,
            sub_utterance=np.array([texts.add(sub) for sub in subs], dtype=np.int32),
            knowledge=knowledge[:, 0],
            knowledge_sub=knowledge[:, 1],
            knowledge_relation=knowledge[:, 2],
            reaction=reactions[:, 0],
            reaction_sub=reactions[:, 1],
            concept=np.array([self.vocabulary.ids[word] for word in concepts], dtype=np.int32),
            concept_position=np.array([first[i] for i in range(len(concepts))], dtype=np.int32),
            concept_intensity=np.array([self.intensity[word] for word in concepts], dtype=np.float32),
            cognition_graph=cognition_graph(len(subs), knowledge[:, 1], knowledge[:, 2]),
            concept_graph=concept_graph(len(words), edges, len(concepts)),
            truncated=truncated,
            source={**source, "emotion": emotion, "context": [turn.text for turn in context],
                    "by_speaker": [turn.by_speaker for turn in context], "response": response, "feedback": feedback},
            feedback=np.array(self.vocabulary.encode(tokenize(feedback)), dtype=np.int32),
        )

    def _knowledge(self, subs: list[str], inferences: Inferences, texts: TextTable) -> tuple[np.ndarray, np.ndarray]:
        knowledge, reactions = [], []
        limit = self.settings.inferences_per_relation
        for place, sub in enumerate(subs):
            found = inferences.get(sub, {})
            for relation, name in enumerate(COGNITION_RELATIONS):
                knowledge += [(texts.add(text), place, relation) for text in found.get(name, ())[:limit]]
            reactions += [(texts.add(text), place) for text in found.get(REACTION_RELATION, ())[:limit]]
        return (np.array(knowledge, dtype=np.int32).reshape(-1, 3), np.array(reactions, dtype=np.int32).reshape(-1, 2))

    def _concepts(self, words: list[str]) -> tuple[list[str], list[tuple[int, int]]]:
        """The concepts of a dialogue, and (token, concept) for each occurrence of a word that a kept concept belongs to."""
        candidates: dict[str, list[str]] = {
            word: list(self.concepts.get(word, ()))[: self.settings.concepts_per_token]
            for word in dict.fromkeys(words)
            if is_word(word)
        }
        distinct = {concept for found in candidates.values() for concept in found}
        ranked = sorted(distinct, key=lambda concept: (-self.intensity[concept], concept))
        kept = ranked[: self.settings.concepts_per_dialogue]
        place = {concept: index for index, concept in enumerate(kept)}
        edges = [
            (token, place[concept])
            for token, word in enumerate(words)
            for concept in candidates.get(word, ())
            if concept in place
        ]
        return kept, edges

    # ---- on disk: readable JSON, small next to the data

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.vocabulary.save(folder / "vocabulary.json")
        listed = self.emotional.listed
        features = {"settings": asdict(self.settings), "concepts": dict(self.concepts), "intensity": dict(self.intensity),
                    "emotion_words": None if listed is None else list(listed)}
        (folder / "features.json").write_text(json.dumps(features, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Featurizer:
        """Read what `save` wrote; `DataError` names what is missing or damaged."""
        folder = Path(folder)
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        path = folder / "features.json"
        found = read_json(path, "feature file", "Prepare the store again")
        try:
            concepts, intensity, settings = found["concepts"], found["intensity"], FeatureSettings(**found["settings"])
            listed = found.get("emotion_words")  # of a version without them: None
            if listed is not None and not (isinstance(listed, list) and all(isinstance(word, str) for word in listed)):
                raise ValueError("emotion_words is no list of words")
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in intensity.values()):
                raise ValueError("an intensity is no finite number")
            for head, words in concepts.items():
                if not isinstance(words, list) or not all(word in vocabulary and word in intensity for word in words):
                    raise ValueError(f"a concept of {head!r} is not in the vocabulary or has no intensity")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise DataError(path, f"not a feature file ({error!r})", "Prepare the store again") from error
        return cls(vocabulary, concepts, intensity, settings, listed)
