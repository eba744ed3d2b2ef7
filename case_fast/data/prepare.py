"""From the official files to a store: read, infer, count words, choose concepts, pack."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from case_fast.data.embeddings import read_glove
from case_fast.data.empathetic_dialogues import SPLITS, DialogueExample, listener_turns, read_conversations
from case_fast.data.featurizer import FeatureSettings, Featurizer, Inferences, TextTable, prompts
from case_fast.data.store import KIND as STORE_KIND
from case_fast.data.store import SplitWriter, Store, open_store, write_store
from case_fast.data.text import stop_words, tokenize
from case_fast.data.vocabulary import UNK, Vocabulary
from case_fast.devices import resolve_device
from case_fast.errors import ConfigError, DataError, Interrupted
from case_fast.files import require_file_place, require_place, whole_folder, writing
from case_fast.knowledge import (
    RELATIONS,
    CachedSource,
    InferenceCache,
    VADLexicon,
    open_source,
    read_concepts,
    read_emotion_words,
)
from case_fast.text_files import ReadReport, read_json, require_file

Progress = Callable[[int, int], None]  # done, total
Infer = Callable[[CachedSource, Sequence[str], Sequence[str], int], list[dict[str, list[str]]]]
"""How texts are asked for: `CachedSource.infer`, or a way to share them out (`case_fast.training.processes`)."""


@dataclass(frozen=True)
class PrepareSettings:
    """What `prepare` reads and how.

    Attributes:
        dialogues: folder or .tar.gz of the EmpatheticDialogues release, or "bundled".
        knowledge: "atomic:PATH", "comet:DIR" or "bundled"; None: nothing is inferred, where inferences come with the dialogues.
        conceptnet: ConceptNet assertions, unpacked or not, or "bundled".
        lexicon: NRC-VAD text file, or "bundled".
        out: folder of the new store.
        embeddings: GloVe text file; None: random word vectors.
        emotion_words: NRC EmoLex text file (word, category, 0 or 1): its words count as emotional, stop words aside; None: those
            of the NRC-VAD lexicon do.
        limit: take only the first so many conversations of each split.
        min_count: least number of occurrences of a word in the vocabulary.
        cache: SQLite file of inferences; default OUT.knowledge.sqlite beside the store.
        device: where COMET runs: auto, cpu, cuda or cuda:N.
        features: sizes of context, knowledge and concepts.
    """

    dialogues: str
    knowledge: str | None
    conceptnet: str
    lexicon: str
    out: str
    embeddings: str | None = None
    emotion_words: str | None = None
    limit: int | None = None
    min_count: int = 1
    cache: str | None = None
    device: str = "auto"
    features: FeatureSettings = field(default_factory=FeatureSettings)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, not {self.limit}")
        if self.min_count < 1:
            raise ConfigError(f"min_count must be at least 1, not {self.min_count}")


@dataclass(frozen=True)
class Material:
    """The dialogues that a store is made of, and what came with them.

    Attributes:
        examples, conversations: of each split, its examples and the number of conversations that they are of.
        train_turns: the texts of the training split's turns, each turn once.
        reports: what was read and left out.
        inferences: of the texts whose inferences came with the dialogues.
        identity: kind and content hash of these; "" where there are none.
    """

    examples: dict[str, list[DialogueExample]]
    conversations: dict[str, int]
    train_turns: list[str]
    reports: list[ReadReport]
    inferences: Inferences = field(default_factory=dict)
    identity: str = ""


def read_release(settings: PrepareSettings, progress: Progress | None = None) -> Material:
    """The material in the official files of EmpatheticDialogues."""
    source = bundled("dialogues") if settings.dialogues == "bundled" else Path(settings.dialogues)
    examples, conversations, reports, turns = {}, {}, [], []
    for place, split in enumerate(SPLITS):
        found, report = read_conversations(source, split, settings.limit)
        examples[split], conversations[split] = list(listener_turns(found)), len(found)
        reports.append(report)
        if split == "train":
            turns = [turn.text for conversation in found for turn in conversation.turns]
        if progress:
            progress(place + 1, len(SPLITS))
    return Material(examples, conversations, turns, reports)


def bundled(part: str) -> Path:
    """A part of the sample that comes with the package: dialogues, conceptnet or lexicon."""
    sample = Path(str(resources.files("case_fast"))) / "sample"
    return {
        "dialogues": sample / "dialogues",
        "conceptnet": sample / "conceptnet" / "assertions.csv",
        "lexicon": sample / "lexicon" / "lexicon.txt",
    }[part]


class Stages:
    """Tells the caller which stage runs; the default says nothing. ``stage(name)`` gives a progress callback."""

    def stage(self, name: str) -> AbstractContextManager[Progress | None]:
        return nullcontext(None)

    def report(self, line: str) -> None:
        pass


@dataclass(frozen=True)
class Inferred:
    """What is known before anything is packed.

    Attributes:
        material: the dialogues. inferences: of their texts, ``asked`` of them. knowledge: where these came from.
        lexicon, emotion_words: the emotional words. reports: what was read and left out.
    """

    material: Material
    asked: int
    inferences: Inferences
    knowledge: dict[str, Any]
    lexicon: VADLexicon
    emotion_words: list[str] | None
    reports: list[ReadReport]


def _path(settings: PrepareSettings, part: str) -> Path:
    given = getattr(settings, part)
    return bundled(part) if given == "bundled" else Path(given)


def infer_knowledge(settings: PrepareSettings, stages: Stages | None = None,
                    read: Callable[[PrepareSettings, Progress | None], Material] = read_release,
                    infer: Infer = CachedSource.infer) -> Inferred:
    """The first part of `prepare`, and the longest: read the dialogues, and have the inferences of their texts in the cache."""
    stages = stages or Stages()
    out = Path(os.path.abspath(settings.out))
    cache_path = Path(settings.cache) if settings.cache else out.with_name(out.name + ".knowledge.sqlite")
    _check_place(out, cache_path)
    require_place(out)
    if settings.knowledge is not None:
        require_file_place(cache_path)
    reports: list[ReadReport] = []

    def noted(report: ReadReport) -> None:
        reports.append(report)
        stages.report(report.summary())

    # what is used late is looked for now: hours of inference may lie between
    resolve_device(settings.device)
    require_file(_path(settings, "lexicon"), "lexicon")
    require_file(_path(settings, "conceptnet"), "ConceptNet assertions file")
    if settings.embeddings:
        require_file(settings.embeddings, "file of word vectors")
    if settings.emotion_words:
        require_file(settings.emotion_words, "list of emotional words")
    with stages.stage("Reading dialogues") as progress:
        material = read(settings, progress)
        for report in material.reports:
            noted(report)
        lexicon = VADLexicon.read(_path(settings, "lexicon"))
        if lexicon.report:
            noted(lexicon.report)
        emotion_words = None
        if settings.emotion_words:
            emotion_words, report = read_emotion_words(settings.emotion_words)
            noted(report)

    asked = dict.fromkeys(sub for split in SPLITS for item in material.examples[split]
                          for sub in prompts(item.context, item.sub_utterances))
    inferences: Inferences = dict(material.inferences)
    knowledge: dict[str, Any] = {"spec": material.identity, "identity": material.identity, "settings": {}}
    if settings.knowledge is not None:
        with stages.stage("Opening knowledge"):
            source = open_source(settings.knowledge, settings.device)
            for report in getattr(source, "reports", ()):
                noted(report)
        texts_to_infer = [text for text in asked if text not in inferences]
        with stages.stage(f"Inferring commonsense for {len(texts_to_infer):,} texts") as progress:
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            with InferenceCache(cache_path) as cache:
                try:
                    cached = CachedSource(source, cache, progress)
                    answers = infer(cached, texts_to_infer, RELATIONS, settings.features.inferences_per_relation)
                except KeyboardInterrupt as error:
                    held = "has the inferences so far: the same command goes on there"
                    raise Interrupted(f"stopped; {cache_path} {held}") from error
        inferences |= dict(zip(texts_to_infer, answers, strict=True))
        knowledge = {"spec": _absolute(settings.knowledge), "cache": os.path.realpath(cache_path), "identity": source.identity,
                     "settings": source.settings, **({"imported": material.identity} if material.identity else {})}
    elif not inferences:
        raise ConfigError("no inferences came with the dialogues: give a source of them with --knowledge")
    return Inferred(material, len(asked), inferences, knowledge, lexicon, emotion_words, reports)


def prepare(settings: PrepareSettings, stages: Stages | None = None,
            read: Callable[[PrepareSettings, Progress | None], Material] = read_release,
            infer: Infer = CachedSource.infer) -> Store:
    """Make a store; replaces a store that is already at ``settings.out``.

    Inferences already in the cache are not asked for again, so that an interrupted run goes on where it stopped.

    Args:
        read: reads the dialogues; the default, those of the official files.
        infer: asks for the inferences.

    Raises:
        DataError: an input is missing or unusable.
        ConfigError: a setting is.
        PlaceError: store or cache cannot be written.
        Interrupted: Ctrl-C, the cache is kept.
    """
    stages = stages or Stages()
    out, started = Path(os.path.abspath(settings.out)), time.monotonic()
    found = infer_knowledge(settings, stages, read, infer)
    material, inferences, lexicon, reports = found.material, found.inferences, found.lexicon, found.reports
    examples = material.examples

    def noted(report: ReadReport) -> None:
        reports.append(report)
        stages.report(report.summary())

    with stages.stage("Building the vocabulary"):
        vocabulary = Vocabulary.build(_count_words(material.train_turns, examples["train"], inferences), settings.min_count)
        intensity = {word: lexicon.intensity(word) for word in lexicon.words}
    with stages.stage("Reading ConceptNet") as progress:
        concepts, report = read_concepts(
            _path(settings, "conceptnet"), vocabulary, intensity, stop_words(), settings.features.concepts_per_token,
            settings.features.minimum_intensity, progress=progress,
        )
        noted(report)
    featurizer = Featurizer(vocabulary, concepts, intensity, settings.features, found.emotion_words)
    vectors = None
    if settings.embeddings:
        with stages.stage("Reading word vectors"):
            ids, matrix, report = read_glove(settings.embeddings, vocabulary)
            noted(report)
            share = 100 * len(ids) / len(vocabulary)
            stages.report(f"word vectors cover {len(ids):,} of {len(vocabulary):,} words ({share:.1f} %)")
            vectors = (ids, matrix)

    texts = featurizer.text_table()
    writers: dict[str, SplitWriter] = {}
    counts: dict[str, Any] = {"conversations": material.conversations, "examples": {}}
    total = sum(len(examples[split]) for split in SPLITS)
    with stages.stage("Packing") as progress:
        done = 0
        for split in SPLITS:
            writer = writers[split] = SplitWriter()
            for item in examples[split]:
                writer.add(featurizer.example(item.context, inferences, texts, item.response, item.emotion, item.feedback,
                                              item.sub_utterances, id=item.id, situation=item.situation))
                done += 1
                if progress and done % 200 == 0:
                    progress(done, total)
            counts["examples"][split] = len(writer)
        if progress:
            progress(total, total)
    counts |= _statistics(writers, texts, vocabulary, found.asked)
    if counts["truncated_contexts"]:
        stages.report(f"{counts['truncated_contexts']:,} contexts cut to their latest {settings.features.max_context} words")
    if vectors is not None:
        counts["embedding_coverage"] = len(vectors[0]) / len(vocabulary)
    with stages.stage("Writing the store"), whole_folder(out) as folder, writing(out, SafetensorError):
        write_store(folder, featurizer, texts, writers, vectors, {
            "counts": counts,
            "settings": asdict(settings),
            "knowledge": found.knowledge,
            "sources": [report.as_dict() for report in reports],
            "bundled": settings.dialogues == "bundled",
            "seconds": round(time.monotonic() - started, 1),
        })
    return open_store(out)


def _check_place(out: Path, cache: Path) -> None:
    """Refuse to replace a folder that is no store, or one with files that would be lost with it."""
    if Path(os.path.realpath(cache)).is_relative_to(os.path.realpath(out)):
        raise ConfigError(f"--cache {cache} lies in --out {out}, which is replaced as a whole; put it elsewhere")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        manifest = read_json(out / "manifest.json", "manifest of the store", "")
        store, own = manifest["format"].startswith(STORE_KIND), {*manifest["files"], "manifest.json"}
    except (DataError, KeyError, TypeError, AttributeError):
        store = False
    if not store:
        raise ConfigError(f"--out {out} is there and is no store; give another folder, so that nothing is lost")
    if others := sorted(path.name for path in out.iterdir() if path.name not in own):
        raise ConfigError(f"--out {out} is a store that would be replaced, but {', '.join(others[:3])} in it is no part of it; "
                          "move that elsewhere or give another folder")


def _absolute(spec: str) -> str:
    """The knowledge spec with its path made absolute, so that chat finds it from any folder."""
    kind, colon, path = spec.partition(":")
    return f"{kind}:{os.path.realpath(path)}" if colon else spec


def _count_words(turns: Iterable[str], train: list[DialogueExample], inferences: Inferences) -> Counter[str]:
    """Words of the turns of the training dialogues, and of the knowledge inferred for its examples, each text once."""
    counts: Counter[str] = Counter()
    for turn in turns:
        counts.update(tokenize(turn))
    subs = {sub for item in train for sub in prompts(item.context, item.sub_utterances)}
    known = {text for sub in subs for found in inferences.get(sub, {}).values() for text in found}
    for text in known:
        counts.update(tokenize(text))
    return counts


def _statistics(writers: dict[str, SplitWriter], texts: TextTable, vocabulary: Vocabulary,
                distinct_prompts: int) -> dict[str, Any]:
    def size(name: str) -> dict[str, int]:
        return {split: len(w.ragged.data[name]) for split, w in writers.items()}

    unknown = {}
    for split, writer in writers.items():
        words = np.frombuffer(writer.ragged.data["response"], dtype=np.int32)
        unknown[split] = float((words == UNK).mean()) if len(words) else 0.0
    return {
        "vocabulary": len(vocabulary),
        "distinct_prompts": distinct_prompts,
        "distinct_texts": len(texts),
        "context_words": size("context"),
        "response_words": size("response"),
        "feedback_words": size("feedback"),
        "unknown_response_words": unknown,
        "knowledge_vertices": size("knowledge"),
        "concept_vertices": size("concept"),
        "truncated_contexts": sum(int(np.count_nonzero(w.scalars["truncated"])) for w in writers.values()),
    }
