"""Rough classifiers of what a reply does, learnt from the user's own copies of published data.

    Epitome   how much a reply reacts, interprets and explores, 0 to 2 each (Sharma et al., 2020), from its Reddit pairs
    Intents   which of eight intents a reply has, or none (Welivita and Pu, 2020), from EmpatheticIntents' texts

The authors' own classifiers are neural ones, whose weights are not published for all of it. These are logistic regression on
TF-IDF of words and characters; how often each is right on texts that it has not seen is part of every signature.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from case_fast.data.text import tokenize
from case_fast.errors import ConfigError, DataError
from case_fast.evaluation.measures import Measure, of_rows, percent
from case_fast.evaluation.measures import mean as mean_of
from case_fast.evaluation.metrics import INTENTS, signature_of
from case_fast.evaluation.replies import Reply
from case_fast.files import sha256
from case_fast.optional import needed
from case_fast.text_files import ReadReport, read_lines, reading, require_file, require_folder

HELD_OUT = 5  # every fifth seeker's pairs
INVERSE_REGULARISATION = 2.0


class Classifier:
    """Logistic regression on TF-IDF of words (1 to 2) and characters within words (2 to 5). It draws no random numbers.

    Args:
        texts: words parted by blanks; labels: one each.

    Raises:
        ConfigError: there is nothing to learn: a single label, or no word that two texts have.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[Any]):
        text = needed("sklearn.feature_extraction.text", "a classifier of replies")
        kinds = ({"ngram_range": (1, 2), "token_pattern": r"\S+"}, {"ngram_range": (2, 5), "analyzer": "char_wb"})
        parts = [(str(place), text.TfidfVectorizer(sublinear_tf=True, lowercase=False, min_df=2, **kind))
                 for place, kind in enumerate(kinds)]
        union = needed("sklearn.pipeline", "a classifier of replies").FeatureUnion(parts)
        linear = needed("sklearn.linear_model", "a classifier of replies")
        self._features = union
        self._model = linear.LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000)
        try:
            self._model.fit(union.fit_transform(texts), labels)
        except ValueError as error:  # no word that two texts have, a single label
            raise ConfigError(f"nothing can be learnt from {len(texts)} texts ({error}): give the published data") from error

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) labels; each different text is looked at once."""
        different, place = np.unique(np.array(texts, dtype=object), return_inverse=True)
        return self._model.predict(self._features.transform(different))[place]


@dataclass(frozen=True)
class Trial:
    """How a classifier does on texts that it has not seen: shares from 0 to 1."""

    accuracy: float
    macro_f1: float
    majority: float
    count: int

    @classmethod
    def of(cls, classifier: Classifier, texts: Sequence[str], labels: Sequence[Any]) -> Trial:
        """``majority``: how often the commonest label would be right."""
        metrics = needed("sklearn.metrics", "the accuracy of a classifier")
        found, labels = classifier(texts), np.array(labels)
        _, counts = np.unique(labels, return_counts=True)
        return cls(float((found == labels).mean()), float(metrics.f1_score(labels, found, average="macro", zero_division=0)),
                   float(counts.max() / len(labels)), len(labels))

    def __str__(self) -> str:
        return f"acc:{self.accuracy:.3f},macro_f1:{self.macro_f1:.3f},majority:{self.majority:.3f},n:{self.count}"


def _said(reply: Reply) -> str:
    return " ".join(reply.words)


# ---- EPITOME

_ASPECTS = {"er": "emotional-reactions", "ip": "interpretations", "ex": "explorations"}
_EPITOME = "Give the folder dataset of the repository behavioral-data/Empathy-Mental-Health, with its three CSV files"


class Epitome:
    """The three aspects, each learnt from four fifths of the seekers and tried on the rest.

    Args:
        folder: with emotional-reactions-reddit.csv, interpretations-reddit.csv and explorations-reddit.csv.

    Raises:
        DataError: one of them is missing or is no such table.
    """

    def __init__(self, folder: str | Path):
        folder = require_folder(folder, "EPITOME data", _EPITOME)
        self._words: dict[str, str] = {}  # the three tables hold the same responses
        self._aspects = {name: self._learnt(folder / f"{aspect}-reddit.csv") for name, aspect in _ASPECTS.items()}

    def _learnt(self, path: Path) -> tuple[Classifier, Trial, str]:
        rows = list(_pairs(path))
        seekers = {seeker: place for place, seeker in enumerate(dict.fromkeys(seeker for seeker, *_ in rows))}
        held = np.array([seekers[seeker] % HELD_OUT == 0 for seeker, *_ in rows], dtype=bool)
        texts, labels = np.array([self._cut(text) for _, text, _ in rows], dtype=object), np.array([level for *_, level in rows])
        if not held.any() or held.all():
            raise DataError(path, f"{len(rows)} pairs, too few to learn from", _EPITOME)
        classifier = Classifier(texts[~held], labels[~held])
        return classifier, Trial.of(classifier, texts[held], labels[held]), sha256(path)[:8]

    def _cut(self, text: str) -> str:
        if text not in self._words:
            self._words[text] = " ".join(tokenize(text))
        return self._words[text]

    def measures(self, replies: Sequence[Reply]) -> list[Measure]:
        """Mean level of each aspect."""
        found = []
        for name, (classifier, trial, digest) in self._aspects.items():
            rows = np.stack([classifier([_said(reply) for reply in replies]), np.ones(len(replies))], axis=1)
            signature = signature_of(f"epitome_{name}", by="tfidf+logistic", data=digest, held_out=f"by_seeker({trial})")
            found.append(of_rows(f"epitome_{name}", "empathy", signature, "higher", rows, mean_of))
        return found


def _pairs(path: Path) -> Iterator[tuple[str, str, int]]:
    """(seeker post's id, response, level) of one of the tables."""
    path = require_file(path, "table of EPITOME", _EPITOME)
    with reading(path, "table of EPITOME"), open(path, encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        try:
            for row in rows:
                if row["level"] not in ("0", "1", "2"):
                    raise DataError(path, f"the level is {row['level']!r}, not 0, 1 or 2", _EPITOME, rows.line_num)
                yield row["sp_id"], row["response_post"] or "", int(row["level"])
        except (KeyError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(path, f"no table with sp_id, response_post and level ({error})", _EPITOME, rows.line_num) from error


# ---- intents

_SPELT = {"acknowleding": "acknowledging"}  # the name of a file there
_INTENTS = ("Give the folder datasets of the repository anuradha1992/EmpatheticIntents, or its folder "
            "lexically_extended_intent_data with train/questioning.txt and so on")


class Intents:
    """The intents, learnt from train/NAME.txt of a folder, tried on its test/ and on manual_annotations/ beside it.

    Args:
        folder: datasets, or lexically_extended_intent_data in it.

    Raises:
        DataError: it lacks one of the nine files, or they hold no texts.
    """

    def __init__(self, folder: str | Path):
        folder = require_folder(folder, "EmpatheticIntents data", _INTENTS)
        inside = folder / "lexically_extended_intent_data"
        folder = inside if inside.is_dir() else folder
        texts, labels = _texts(folder / "train")
        if missing := [name for name in INTENTS if name not in labels]:
            raise DataError(folder / "train", f"no texts of the intent {', '.join(missing)}", _INTENTS)
        self._classifier = Classifier(texts, labels)
        tried = {"test": _texts(folder / "test"), "by_hand": _texts(folder.parent / "manual_annotations")}
        self._how = {"by": "tfidf+logistic"} | {
            name: str(Trial.of(self._classifier, *found)) for name, found in tried.items() if found[0]}

    def measures(self, replies: Sequence[Reply]) -> list[Measure]:
        """How often a reply has the intent of its reference; and the share of each intent."""
        own = self._classifier([_said(reply) for reply in replies])
        known = np.array([bool(reply.reference_words) for reply in replies])
        theirs = self._classifier([" ".join(reply.reference_words) for reply in replies])
        rows = np.stack([(own == theirs) & known, known], axis=1).astype(float)
        found = [of_rows("intent_agreement", "empathy", signature_of("intent_agreement", scale=100, **self._how), "higher", rows,
                         percent, "reply with a reference")]
        for intent in INTENTS:
            rows = np.stack([own == intent, np.ones(len(own))], axis=1).astype(float)
            signature = signature_of(f"intent_{intent}", scale=100, **self._how)
            found.append(of_rows(f"intent_{intent}", "empathy", signature, None, rows, percent))
        return found


def _texts(folder: Path) -> tuple[list[str], list[str]]:
    """The texts of NAME.txt of each intent, cut into words, and the intents; none where there is no such folder."""
    texts: list[str] = []
    labels: list[str] = []
    for path in sorted(folder.glob("*.txt")):
        intent = _SPELT.get(path.stem, path.stem)
        if intent not in INTENTS:
            continue
        for _, line in read_lines(path, ReadReport(str(path))):
            text = line.partition("<SEP>")[2] or line  # "39 <SEP> good luck!", by hand "good luck!"
            if words := tokenize(text):
                texts.append(" ".join(words))
                labels.append(intent)
    return texts, labels
