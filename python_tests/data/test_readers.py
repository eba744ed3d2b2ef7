"""What every reader of somebody's file does: it accounts for each line, and tells gzip by the content."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from case_fast.data.embeddings import read_glove
from case_fast.data.empathetic_dialogues import COLUMNS, read_conversations
from case_fast.data.vocabulary import SPECIALS, Vocabulary
from case_fast.errors import DataError
from case_fast.knowledge import VADLexicon, read_concepts, read_emotion_words
from case_fast.knowledge.atomic import AtomicRetrieval
from case_fast.text_files import ReadReport

VOCABULARY = Vocabulary([*SPECIALS, "sea", "joy", "cake"])


def dialogues(path: Path) -> ReadReport:
    return read_conversations(path.parent, "train")[1]


def lexicon(path: Path) -> ReadReport:
    return VADLexicon.read(path).report


def emotion_words(path: Path) -> ReadReport:
    return read_emotion_words(path)[1]


def concepts(path: Path) -> ReadReport:
    return read_concepts(path, VOCABULARY, {"sea": 1.0, "joy": 1.0, "cake": 1.0}, ())[1]


def events(path: Path) -> ReadReport:
    return AtomicRetrieval(path).reports[0]


def vectors(path: Path) -> ReadReport:
    return read_glove(path, VOCABULARY)[2]


READERS: dict[str, tuple[Callable[[Path], ReadReport], str, list[str]]] = {
    "dialogues": (dialogues, "train.csv", [
        ",".join(COLUMNS), *(f"c:{i // 4},{i % 4 + 1},sad,p,{i % 2},some words,5|5|5_4|5|5," for i in range(24)),
    ]),
    "lexicon": (lexicon, "lexicon.txt", [
        "term\tarousal\tvalence\tdominance", *(f"word{i}\t0.{i}\t-0.{i}\t0.5" for i in range(20)),
    ]),
    "EmoLex": (emotion_words, "emolex.txt", [f"word{i // 2}\tjoy\t{i % 2}" for i in range(20)]),
    "ConceptNet": (concepts, "assertions.csv", [
        f'/a\t/r/RelatedTo\t/c/{"en" if i % 3 else "de"}/sea\t/c/en/{"joy" if i % 2 else "x"}\t{{"weight": 1.0}}'
        for i in range(24)
    ]),
    "ATOMIC-2020": (events, "events.tsv", [f"PersonX paints a wall\txWant\tto rest {i}" for i in range(20)]),
    "ATOMIC": (events, "v4_atomic_all.csv", [
        "event,xWant,xReact,split",
        *(f'PersonX paints {"wall" if i % 2 else "___"},"[""none"", ""rest""]",[],trn' for i in range(20)),
    ]),
    "GloVe": (vectors, "glove.txt", [f"{word} 0.1 0.2 0.3" for word in ("sea", "joy", "cake", "other", "sea") * 4]),
}
each_reader = pytest.mark.parametrize("name", READERS)


@each_reader
def test_gzip_is_told_by_content_and_not_by_name(tmp_path, name):
    read, file, lines = READERS[name]
    content = "\n".join(lines).encode()
    found = set()
    for place, (packed, suffix) in enumerate([(False, ""), (True, ".gz"), (True, ""), (False, ".gz")]):
        folder = tmp_path / str(place)
        folder.mkdir()
        path = folder / (file + suffix)
        path.write_bytes(gzip.compress(content) if packed else content)
        report = read(path)
        found.add((report.read, report.rows, report.skipped.total(), report.ignored.total()))
    assert len(found) == 1


@each_reader
@pytest.mark.parametrize("seed", range(8))
def test_every_line_is_accounted_for(tmp_path, name, seed):
    """Damaged as files are: lines cut, doubled, moved, blank, too long, of another file, with bytes that are no text."""
    read, file, lines = READERS[name]
    rng = random.Random(seed)
    others = [line for _, _, lines in READERS.values() for line in lines]
    damaged = [line.encode() for line in lines]
    for _ in range(rng.randint(1, 12)):
        place = rng.randrange(1, len(damaged))
        line = damaged[place]
        damaged[place : place + 1] = rng.choice([
            [line[: rng.randrange(len(line) + 1)]], [line, line], [], [b"", line], [b"  "], [b"\xff" + line], [line + b"\0"],
            [line + b"," * rng.randint(1, 3)], [line.replace(b"\t", b" ")], [line.replace(b"0", b"nan")], [b"x" * (1 << 20)],
            [line, rng.choice(others).encode()], [line.replace(b" ", b", ")], [b'"' + line], [line + b"\r"],
        ])
    path = tmp_path / file
    path.write_bytes(b"\n".join(damaged) + b"\n")
    try:
        report = read(path)
    except DataError as error:
        assert str(error).startswith(str(path))
        return
    assert report.read == len(damaged) == report.rows + report.skipped.total() + report.ignored.total()
    assert report.as_dict()["read"] == report.read and f"{report.read} lines, {report.rows} rows" in report.summary()
