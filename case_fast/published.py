"""The folder of a published model: what `from_pretrained` takes, and what a text needs to be read as in training, without the
data that nobody may pass on. `case_fast.publishing` makes one of a run.

    FOLDER/model.safetensors, config.json   as `save_pretrained` writes them
    FOLDER/vocabulary.json                  the words
    FOLDER/features.json                    settings, concepts, where inferences came from; of each lexicon a count and a hash
    FOLDER/metrics.json                     the evaluations of these weights, every metric with its signature
    FOLDER/README.md                        the model card
    FOLDER/checksums.json                   of these but the card, which people edit

Left out are the emotion intensities, which come from NRC-VAD, the order of each word's concepts, which follows from them, and the
words of NRC EmoLex. Whoever loads the model gives these files, and a hash says whether they are those of the training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from case_fast import checksums
from case_fast.data import FeatureSettings, Featurizer, Vocabulary
from case_fast.data.pack import reads_inferences
from case_fast.errors import CheckpointError, ConfigError, DataError, PlaceError
from case_fast.files import write_json
from case_fast.knowledge import VADLexicon, read_emotion_words
from case_fast.models import DialogueModel
from case_fast.sources import SOURCES

KIND = "case_fast published model"
FORMAT = f"{KIND} 1"
METRICS, CARD = "metrics.json", "README.md"
_WEIGHTS, _FEATURES, _VOCABULARY = "model.safetensors", "features.json", "vocabulary.json"
LISTED = (*checksums.MODEL, _VOCABULARY, _FEATURES, METRICS)  # in its checksums.json
FILES = (*LISTED, CARD, checksums.NAME)
_LEXICONS = {"lexicon": "NRC-VAD", "emotion_words": "NRC EmoLex"}  # the option that gives it back -> what it is
_AGAIN = "Fetch or copy the folder again"


def is_published(folder: str | Path) -> bool:
    """Whether a folder is a published model's, sound or not."""
    return all(os.path.isfile(Path(folder) / name) for name in (_WEIGHTS, _FEATURES))  # False too where nobody may look


# ---- writing


def write(folder: Path, model: DialogueModel, vocabulary: Vocabulary, features: Mapping[str, Any], metrics: Mapping[str, Any],
          card: str) -> None:
    """Fill an empty folder; ``features`` and ``metrics``: what its features.json and metrics.json are to hold."""
    (folder / CARD).write_text(card, encoding="utf-8")  # before the weights: save_pretrained keeps a card that is there
    model.save_pretrained(folder)
    vocabulary.save(folder / _VOCABULARY)
    write_json(folder / _FEATURES, features)
    write_json(folder / METRICS, metrics)
    checksums.write(folder, names=LISTED)


def without_lexicons(featurizer: Featurizer, knowledge: Mapping[str, Any], needs: Collection[str]) -> dict[str, Any]:
    """What features.json holds: what a model that ``needs`` these parts of a batch reads, without what may not be passed on.

    Args:
        knowledge: where inferences came from, as `runs.load_features` gives it.

    Raises:
        ConfigError: the concepts of a word do not stand in the order of `read_concepts`, which could not be restored then.
    """
    concepts = featurizer.concepts if "concept" in needs else {}
    listed = featurizer.emotional.listed if "emotional" in needs else None
    by_intensity = "concept" in needs or ("emotional" in needs and listed is None)
    left_out = {"lexicon": _pairs(featurizer.intensity) if by_intensity else None,
                "emotion_words": None if listed is None else sorted(set(listed))}
    if any(_ranked(words, featurizer.intensity) != list(words) for words in concepts.values()):
        raise ConfigError("the concepts of a word are not sorted by falling intensity, as prepare sorts them, and that order "
                          "could not be put back. Prepare the store again and train on it")
    kind, colon, _ = str(knowledge["spec"]).partition(":")
    found = {"identity": ""} | {name: knowledge[name] for name in ("identity", "settings", "imported") if name in knowledge}
    return {
        "format": FORMAT,
        "settings": asdict(featurizer.settings),
        "concepts": {head: sorted(words) for head, words in concepts.items()},
        "left_out": {name: None if lines is None else _seal(lines) for name, lines in left_out.items()},
        "knowledge": {"spec": knowledge["spec"] if kind == "imported" else kind, **found} if reads_inferences(needs) else None,
    }


def _pairs(intensity: Mapping[str, float]) -> list[str]:
    """A line for each word and its intensity, to six digits: the last ones depend on the machine's arithmetic."""
    return sorted(f"{word}\t{round(w, 6) + 0.0:.6f}" for word, w in intensity.items())


def _seal(lines: Sequence[str]) -> dict[str, Any]:
    return {"words": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def _ranked(words: Iterable[str], intensity: Mapping[str, float]) -> list[str]:
    """The concepts of a word in the order of `read_concepts`."""
    return sorted(words, key=lambda word: (-intensity[word], word))


# ---- reading


def load_features(folder: str | Path, words: int, lexicon: str | Path | None = None, emotion_words: str | Path | None = None,
                  ) -> tuple[Featurizer, dict[str, Any]]:
    """The featurizer of a published model that knows so many ``words``, whole again, and where its knowledge came from.

    Args:
        lexicon: the file of NRC-VAD, in any layout that `prepare` reads, or "bundled". emotion_words: that of NRC EmoLex.

    Raises:
        ConfigError: a file that is needed is not given, or one is given that is not.
        DataError: it cannot be read, or is not the one that the model was trained with.
        CheckpointError: a part of the folder is missing or damaged.
    """
    folder = Path(folder)
    found = _read(folder)
    given = {"lexicon": lexicon, "emotion_words": emotion_words}
    for option, seal in found["left_out"].items():
        _check_given(folder, option, seal, given[option])
    intensity: dict[str, float] = {}
    listed = None
    if lexicon is not None:
        intensity = VADLexicon.read(_place(lexicon)).intensities()
        _check_seal(lexicon, "lexicon", _pairs(intensity), found["left_out"]["lexicon"])
    if emotion_words is not None:
        listed = read_emotion_words(emotion_words)[0]
        _check_seal(emotion_words, "emotion_words", sorted(set(listed)), found["left_out"]["emotion_words"])
    try:
        vocabulary = Vocabulary.load(folder / _VOCABULARY)
        concepts = {head: _ranked(words_of, intensity) for head, words_of in found["concepts"].items()}
        featurizer = Featurizer(vocabulary, concepts, intensity, FeatureSettings(**found["settings"]), listed)
        if strange := next((word for of in concepts.values() for word in of if word not in vocabulary), None):
            raise ValueError(f"the concept {strange!r} is not in the vocabulary")
    except DataError as error:
        raise CheckpointError(f"{error.path}: {error.problem}. {_AGAIN}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{folder / _FEATURES}: damaged ({error!r}). {_AGAIN}") from error
    if len(vocabulary) != words:
        raise CheckpointError(f"{folder}: {len(vocabulary)} words, the model has {words}: they are of different models. {_AGAIN}")
    return featurizer, found["knowledge"] or {"spec": ""}


def _read(folder: Path) -> dict[str, Any]:
    """What features.json holds, its form checked."""
    path = folder / _FEATURES
    try:
        for name in (_VOCABULARY, _FEATURES):
            checksums.check(folder / name)
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise CheckpointError(f"{path}: its format is {found['format']!r}, this version reads {FORMAT!r}. Use the version of "
                                  "case_fast that the model card names")
        for option in _LEXICONS:
            if (seal := found["left_out"][option]) is not None:
                int(seal["words"]), str(seal["sha256"])
        if (knowledge := found["knowledge"]) is not None and not isinstance(knowledge["spec"], str):
            raise TypeError("spec must be a text")
        return found
    except OSError as error:
        raise PlaceError(path, error, "cannot be read") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}). {_AGAIN}") from error


def _place(lexicon: str | Path) -> Path:
    from case_fast.data.prepare import bundled

    return bundled("lexicon") if str(lexicon) == "bundled" else Path(lexicon)


def _check_given(folder: Path, option: str, seal: Mapping[str, Any] | None, given: str | Path | None) -> None:
    name = _LEXICONS[option]
    if seal is None and given is not None:
        raise ConfigError(f"{folder}: this model reads nothing of {name}: leave {option} out")
    if seal is not None and given is None:
        what = "the emotion intensities" if option == "lexicon" else "the emotional words"
        raise ConfigError(
            f"{folder}: published without {what} of {seal['words']:,} words, since {name} may not be passed on. Get that lexicon "
            f"({SOURCES[name].published}) and give its file: case_fast.load(FOLDER, {option}=FILE), or case-fast chat FOLDER "
            f"--{option} FILE")


def _check_seal(path: str | Path, option: str, lines: Sequence[str], seal: Mapping[str, Any]) -> None:
    found = _seal(lines)
    if found != dict(seal):
        trained = f"{seal['words']:,} words"
        differs = (f"it has {found['words']:,} words, that one {trained}" if found["words"] != seal["words"] else
                   f"it has as many, {trained}, but not with the same values" if option == "lexicon" else
                   f"it has as many, {trained}, but not the same")
        raise DataError(path, f"not the {_LEXICONS[option]} that the model was trained with: {differs}",
                        "Give that version of it; the model card says which")
