"""The ConceptNet reader: which assertions count, the best neighbours, malformed rows, memory."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
import tracemalloc
from pathlib import Path

import pytest

from case_fast.errors import ConfigError, DataError
from case_fast.knowledge import EXCLUDED_RELATIONS, VADLexicon, read_concepts

REAL = Path(os.environ.get("CASE_FAST_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
INTENSITY = {"joy": 0.9, "fun": 0.8, "love": 0.9, "grief": 0.7, "party": 0.6, "table": 0.1, "the": 0.95, "dance": 0.65}
VOCABULARY = set(INTENSITY) | {"unrated"}


def row(left: str, right: str, relation: str = "RelatedTo", data: str = '{"weight": 1.0}', language: str = "en") -> str:
    return f"/a/[whatever]\t/r/{relation}\t/c/{language}/{left}\t/c/{language}/{right}\t{data}\n"


def write(tmp_path: Path, *rows: str | bytes, name: str = "assertions.csv") -> Path:
    path = tmp_path / name
    content = b"".join(line if isinstance(line, bytes) else line.encode() for line in rows)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def concepts(path: Path, **settings):
    return read_concepts(path, VOCABULARY, INTENSITY, {"the", "a"}, **settings)


def test_the_best_three_are_those_by_hand(tmp_path):
    rows = [row("birthday", word) for word in ("party", "table", "dance", "fun", "love", "unrated", "joy", "grief")]
    best, report = concepts(write(tmp_path, *rows))
    assert best["birthday"] == ["joy", "love", "fun"]  # the tie of joy and love goes by the word
    assert report.rows == 6 and report.ignored == {"no end is a usable concept": 2} and not report.skipped
    assert set(best) == {"birthday"}  # birthday itself is no neighbour: not in the vocabulary
    assert concepts(write(tmp_path, *rows[::-1]))[0] == best
    assert concepts(write(tmp_path, *rows), per_token=1)[0] == {"birthday": ["joy"]}
    assert concepts(write(tmp_path, *rows), per_token=9, minimum_intensity=0.0)[0]["birthday"][-2:] == [
        "table",
        "unrated",
    ]


def test_both_directions_count(tmp_path):
    best, report = concepts(write(tmp_path, row("joy", "fun"), row("cake", "party"), row("grief", "death")))
    assert best == {"joy": ["fun"], "fun": ["joy"], "cake": ["party"], "death": ["grief"]}
    assert report.rows == 3


def test_repeats_count_once(tmp_path):
    rows = [
        row("cake", "fun"),
        row("cake", "fun", "UsedFor"),
        row("fun", "cake"),
        row("cake", "joy"),
        row("cake", "party"),
    ]
    assert concepts(write(tmp_path, *rows))[0] == {"cake": ["joy", "fun", "party"]}


@pytest.mark.parametrize("relation", [*sorted(EXCLUDED_RELATIONS), "dbpedia/genre", "dbpedia/occupation"])
def test_excluded_relations_do_not_count(tmp_path, relation):
    best, report = concepts(write(tmp_path, row("cake", "fun", relation)))
    assert best == {} and report.ignored == {"excluded relation": 1}


@pytest.mark.parametrize("relation", ["RelatedTo", "IsA", "Causes", "HasContext", "InstanceOf", "SimilarTo"])
def test_other_relations_count(tmp_path, relation):
    assert concepts(write(tmp_path, row("cake", "fun", relation)))[0] == {"cake": ["fun"]}


def test_there_are_sixteen_excluded_relations():
    assert len(EXCLUDED_RELATIONS) == 16


@pytest.mark.parametrize(
    "line, reason",
    [
        (row("gâteau", "joie", language="fr"), "not English on both ends"),
        ("/a/x\t/r/Synonym\t/c/en/fun\t/c/fr/amusement\t{}\n", "not English on both ends"),
        ("/a/x\t/r/ExternalURL\t/c/en/fun\thttp://x.org/fun\t{}\n", "not English on both ends"),
        (row("fun", "fun/n"), "both ends equal"),
        (row("birthday_cake", "fun"), "several words"),
        (row("cake", "much_fun"), "several words"),
        (row("the", "fun"), "no end is a usable concept"),  # a stop word is no head, and no neighbour
        (row("cake", "table"), "no end is a usable concept"),
        (row("cake", "unrated"), "no end is a usable concept"),
        (row("cake", "fun", data='{"weight": 0.99}'), "weight below 1"),
        (row("cake", "fun", data='{"weight": -2}'), "weight below 1"),
        ("\n", "blank line"),
    ],
)
def test_sound_rows_that_do_not_count_are_told_apart(tmp_path, line, reason):
    best, report = concepts(write(tmp_path, line, row("sea", "joy")))
    assert best == {"sea": ["joy"]} and report.ignored == {reason: 1} and not report.skipped
    assert "not needed 1" in report.summary()


def test_stop_words_are_neither_head_nor_neighbour(tmp_path):
    best, _ = concepts(write(tmp_path, row("the", "fun"), row("cake", "the"), row("fun", "the"), row("a", "joy")))
    assert best == {}


def test_suffixes_uris_and_weights_are_read(tmp_path):
    rows = [
        row("cake/n", "fun/n/wn/food"),
        "\t/r/IsA/\t/c/en/pie/n\t/c/en/joy\t" + json.dumps({"dataset": "/d/x", "weight": 2, "sources": [{"a": "\\t"}]}) + "\n",
        row("can't", "love", data='{"weight": 1}'),
    ]
    best, report = concepts(write(tmp_path, *rows))
    assert best == {"cake": ["fun"], "pie": ["joy"], "can't": ["love"]} and not report.skipped
    assert concepts(write(tmp_path, *rows), minimum_weight=1.5)[0] == {"pie": ["joy"]}


LAYOUT = "not 5 tab-separated columns with /r/ and /c/"
WEIGHT = "last column is not JSON with a number as weight"


@pytest.mark.parametrize(
    "line, reason",
    [
        ("cake fun\n", LAYOUT),
        ("/a/x\t/r/IsA\t/c/en/cake\t/c/en/fun\n", LAYOUT),
        ("/a/x\t/r/IsA\t/c/en/cake\t/c/en/fun\t{}\tmore\n", LAYOUT),
        ("/a/x\t/r/IsA\t/c/fr/cake\t/c/en/fun\n", LAYOUT),
        ("/a/x\tIsA\t/c/en/cake\t/c/en/fun\t{}\n", LAYOUT),
        ("/a/x\t/c/en/cake\t/r/IsA\t/c/en/fun\t{}\n", LAYOUT),
        ("a,b,c,d,e\n", LAYOUT),
        ("a\tb\tc\td\te\n", LAYOUT),
        (row("", "fun"), "concept is blank"),
        (row("cake", "/n"), "concept is blank"),
        (row("cake", "fun", data=""), WEIGHT),
        (row("cake", "fun", data="{weight: 1}"), WEIGHT),
        (row("cake", "fun", data='{"weight": "1.0"}'), WEIGHT),
        (row("cake", "fun", data='{"weight": true}'), WEIGHT),
        (row("cake", "fun", data='{"weight": NaN}'), WEIGHT),
        (row("cake", "fun", data='{"weight": 1e999}'), WEIGHT),
        (row("cake", "fun", data='{"weight": ' + "1" * 5000 + "}"), WEIGHT),
        (row("cake", "fun", data='{"weight": ' + "1" * 400 + "}"), WEIGHT),
        (row("cake", "fun", data='{"dataset": "x"}'), WEIGHT),
        (row("cake", "fun", data="[1.0]"), WEIGHT),
        (row("cake", "fun", data="1.0"), WEIGHT),
        (row("cake", "fun", data="[" * 200_000), WEIGHT),
        (row("cake", "fun").encode().replace(b"cake", b"c\xffke"), "not UTF-8"),
        (row("ca\0ke", "fun"), "NUL byte"),
        (row("cake", "x" * (1 << 20)), "line longer than 1048576 bytes"),
    ],
)
def test_malformed_rows_are_counted(tmp_path, line, reason):
    best, report = concepts(write(tmp_path, row("sea", "joy"), line, row("cake", "party")))
    assert best == {"sea": ["joy"], "cake": ["party"]} and not report.ignored
    assert report.skipped == {reason: 1} and report.lines == {reason: [2]} and report.rows == 2


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"Word\tValence\tArousal\tDominance\njoy\t1\t1\t1\n", f"{LAYOUT}: 2"),
        (b"\x89PNG\xff\n" * 3, "not UTF-8: 3"),
    ],
)
def test_no_row_of_this_layout_is_an_error(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(DataError) as error:
        concepts(path)
    assert str(error.value).startswith(f"{path}: no usable row") and message in str(error.value)
    assert "/c/en/a" in str(error.value)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"missing\.csv: ConceptNet assertions file not found"):
        concepts(tmp_path / "missing.csv")
    with pytest.raises(DataError, match="is a folder, not a file"):
        concepts(tmp_path)
    whole = gzip.compress(b"".join(row(f"w{i}", "joy").encode() for i in range(2000)))
    for name, content in (
        ("cut", whole[: len(whole) // 2]),
        ("flipped", whole[:50] + b"\0\1\2" + whole[53:]),
    ):
        path = tmp_path / f"{name}.csv.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.csv\.gz:\d+: damaged file .* Download it again"):
            concepts(path)


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="per_token: 0"):
        concepts(write(tmp_path, row("cake", "fun")), per_token=0)


def random_rows(rng: random.Random, count: int, words: int) -> list[str]:
    relations, languages = ["IsA", "RelatedTo", "Antonym", "Causes"], ["en"] * 3 + ["fr"]
    return [
        row(
            f"w{rng.randrange(words)}" + rng.choice(["", "", "/n", "/v/wn"]),
            f"w{rng.randrange(words)}" + rng.choice(["", "", "_x"]),
            rng.choice(relations),
            json.dumps({"weight": rng.choice([0.5, 1.0, 2.0])}),
            rng.choice(languages),
        )
        for _ in range(count)
    ]


def brute_force(lines: list[str], vocabulary, intensity, stop_words, per_token: int) -> dict[str, list[str]]:
    """Everything gathered first, sorted after: what the stream must equal."""
    neighbours: dict[str, set[str]] = {}
    for line in lines:
        _, relation, left, right, data = line.rstrip("\n").split("\t")
        ends = [uri.split("/") for uri in (left, right)]
        if relation.removeprefix("/r/") in EXCLUDED_RELATIONS or json.loads(data)["weight"] < 1:
            continue
        if any(end[2] != "en" or "_" in end[3] for end in ends) or ends[0][3] == ends[1][3]:
            continue
        for head, other in ((ends[0][3], ends[1][3]), (ends[1][3], ends[0][3])):
            usable = other in vocabulary and other not in stop_words and intensity(other) >= 0.6
            if usable and head not in stop_words:
                neighbours.setdefault(head, set()).add(other)
    return {head: sorted(found, key=lambda w: (-intensity(w), w))[:per_token] for head, found in neighbours.items()}


@pytest.mark.parametrize("seed", range(6))
def test_the_stream_finds_what_brute_force_finds(tmp_path, seed):
    rng = random.Random(seed)
    strength = {f"w{i}": rng.choice([0.5, 0.6, 0.7, 0.8, 0.9]) for i in range(60)}  # many ties
    vocabulary, stop_words = {f"w{i}" for i in range(0, 60) if i % 5}, {"w1", "w2", "w3"}
    lines = random_rows(rng, 3000, 60)
    for name in ("a.csv", "a.csv.gz"):
        path = write(tmp_path, *lines, name=name)
        best, report = read_concepts(path, vocabulary, strength, stop_words, per_token=1 + seed % 4)
        assert best == brute_force(lines, vocabulary, strength.get, stop_words, 1 + seed % 4)
        assert report.rows + report.ignored.total() == 3000 and not report.skipped
        assert read_concepts(path, vocabulary, strength.get, stop_words, per_token=1 + seed % 4)[0] == best


def test_progress_tells_bytes(tmp_path, monkeypatch):
    from case_fast.knowledge import conceptnet

    monkeypatch.setattr(conceptnet, "_LINES_PER_CALL", 500)
    for name in ("a.csv", "a.csv.gz"):
        path = write(tmp_path, *random_rows(random.Random(1), 2000, 50), name=name)
        seen: list[tuple[int, int]] = []
        concepts(path, progress=lambda done, total, seen=seen: seen.append((done, total)))
        size = path.stat().st_size
        assert len(seen) == 5 and seen[-1] == (size, size) and all(total == size for _, total in seen)
        assert seen == sorted(seen)


@pytest.mark.slow
def test_a_million_lines_are_read_in_bounded_memory(tmp_path):
    """A tenth English, as in the full file; the answer, not the file, is what memory holds, which is seen of its first part."""
    rng, path, part = random.Random(0), tmp_path / "big.csv.gz", tmp_path / "part.csv.gz"
    french = "".join(row(f"mot{rng.random()}", f"mot{rng.random()}", language="fr") for _ in range(90_000))
    for block in range(10):
        with gzip.open(path, "at", compresslevel=1) as file:
            file.writelines(random_rows(rng, 10_000, 2000))
            file.write(french)
        if block == 2:
            part.write_bytes(path.read_bytes())
    assert 3 * len(french) > 24e6
    strength = {f"w{i}": rng.random() for i in range(2000)}
    began = time.perf_counter()
    best, report = read_concepts(path, strength, strength, ())
    seconds = time.perf_counter() - began
    assert report.rows + report.ignored.total() == 1_000_000 and len(best) > 1900
    assert seconds < 60, f"{seconds:.1f} s for a million lines"
    tracemalloc.start()
    read_concepts(part, strength, strength, ())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20, f"{peak >> 20} MiB"


@pytest.mark.skipif(not (REAL / "conceptnet").is_dir(), reason=f"no real data at {REAL}")
def test_real_conceptnet_and_lexicon_give_the_known_numbers():
    lexicon = VADLexicon.read(REAL / "nrc_vad" / "NRC-VAD-Lexicon.txt")
    best, report = read_concepts(REAL / "conceptnet" / "assertions.csv", lexicon, lexicon.intensity, {"the", "a", "you"})
    assert report.rows + report.ignored.total() + report.skipped.total() == 101_200
    assert report.skipped.total() == 0 and 1500 < len(best) < 3000
    for head, words in best.items():
        assert 1 <= len(words) <= 3 and head not in words and "_" not in head
        strengths = [lexicon.intensity(word) for word in words]
        assert strengths == sorted(strengths, reverse=True) and strengths[-1] >= 0.6
    assert best["happy"] and best["dog"]
