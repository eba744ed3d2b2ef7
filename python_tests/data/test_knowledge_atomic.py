"""Retrieval from ATOMIC: normalisation, wording, the reader, nearest events, and --knowledge specs."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import limited_memory

from case_fast.errors import ConfigError, DataError
from case_fast.knowledge import COGNITION_RELATIONS, REACTION_RELATION, RELATIONS, clean_inferences, open_source
from case_fast.knowledge import atomic as atomic_module
from case_fast.knowledge.atomic import AtomicRetrieval, neutral_wording
from case_fast.knowledge.events import event_terms

REAL = Path(os.environ.get("CASE_FAST_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
ROWS = [
    ("PersonX fails PersonX's exam", "xReact", "sad"),
    ("PersonX fails PersonX's exam", "xReact", "ashamed"),
    ("PersonX fails PersonX's exam", "xReact", "ashamed"),
    ("PersonX fails PersonX's exam", "xWant", "to study harder"),
    ("PersonX fails the test", "xReact", "disappointed"),
    ("PersonX fails the test", "xEffect", "PersonX cries"),
    ("PersonX loses PersonX's dog", "xReact", "none"),
    ("PersonX loses PersonX's dog", "xWant", "to look for PersonX's dog"),
    ("PersonX loses PersonX's dog", "xNeed", ""),
    ("PersonX loses PersonX's dog", "oReact", "sorry for PersonX"),
]


def write(path: Path, rows) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path) -> AtomicRetrieval:
    return AtomicRetrieval(write(tmp_path / "events.tsv", ROWS), minimum_similarity=0.2)


# --- what the texts become


@pytest.mark.parametrize(
    "utterance, event",
    [
        ("I failed my exam", "PersonX fails PersonX's exam"),
        ("I lost my dog!", "John loses John's dog"),
        ("My car broke down...", "PersonX's car breaks down"),
        ("We went hiking", "PersonX goes hiking"),
        ("he didn’t like it at all, I cried", "PersonX does not like ___ . PersonX cries"),
        ("I cant sleep", "PersonX can n't sleep"),
        ("I've been fired", "PersonX is fired"),
    ],
)
def test_an_utterance_and_its_event_have_the_same_terms(utterance, event):
    assert event_terms(utterance) == event_terms(event) != []


def test_terms_are_those_by_hand():
    # "broke" -> break; light "down" only in the pair; "my", "the" and the clitic go; no pair starts with a particle
    assert event_terms("My car's broken down near the bridge") == [
        *("car", "break", "near", "bridg"),
        *("car break", "break down", "near bridg"),
    ]
    assert event_terms("I know! Oh well, yeah") == ["know well"]
    assert event_terms("It was not easy") == ["easi", "not easi"]
    for nothing in ("", "  ", "?!", "Yes, it is!", "PersonX ___ PersonY", "数学 ünï", "I do"):
        assert not [term for term in event_terms(nothing) if term.isascii() and " " not in term and len(term) > 2], nothing


@pytest.mark.parametrize(
    "tail, wording",
    [
        ("PersonX gets wet", "gets wet"),
        ("person x is happy", "is happy"),
        ("to find PersonX's dog", "to find their dog"),
        ("to thank PersonX", "to thank them"),
        ("to call PersonY", "to call someone"),
        ("to call Tom's mother", "to call someone's mother"),
        ("get Toms permission", "get someone's permission"),
        ("John is sad about leaving John's dog", "is sad about leaving their dog"),
        ("X and Y part", "them and someone part"),
        ("to go to y’s house", "to go to someone's house"),
        ("PersonZ 's car", "someone else's car"),
        ("gets an x-ray", "gets an x-ray"),
        ("gets an x ray", "gets an x ray"),
        ("buys a tomato from johnny", "buys a tomato from johnny"),
        ("yay", "yay"),
        ("", ""),
    ],
)
def test_people_are_worded_alike(tail, wording):
    assert neutral_wording(tail) == wording


def test_inferences_are_cleaned():
    texts = [
        " none",
        "Happy",
        "",
        "happy  ",
        "None.",
        "very   sad",
        "HAPPY!",
        "N/A",
        "no effect",
        "very sad",
        "calm",
        "x",
    ]
    assert clean_inferences(texts, 3) == ["Happy", "very sad", "calm"]
    assert clean_inferences(texts, 99) == ["Happy", "very sad", "calm", "x"]
    assert clean_inferences([], 5) == []

    def endless():
        while True:
            yield from ("a", "b")

    assert clean_inferences(endless(), 2) == ["a", "b"]


def test_the_relations_are_four_of_cognition_and_the_reaction():
    assert RELATIONS == (*COGNITION_RELATIONS, REACTION_RELATION) == ("xIntent", "xNeed", "xWant", "xEffect", "xReact")


# --- retrieval


def test_answers_are_those_by_hand(source):
    exam, nothing = source.infer(["I failed my exam", "purple numbers"], RELATIONS, 5)
    # the exact event first, its most frequent reaction first; then the other failing
    assert exam == {
        "xIntent": [],
        "xNeed": [],
        "xWant": ["to study harder"],
        "xEffect": ["cries"],
        "xReact": ["ashamed", "sad", "disappointed"],
    }
    assert nothing == {relation: [] for relation in RELATIONS}
    assert source.infer(["I failed my exam"], ["xReact"], 1) == [{"xReact": ["ashamed"]}]
    assert source.infer(["I lost my dog"], ["xReact", "xWant"], 5) == [{"xReact": [], "xWant": ["to look for their dog"]}]
    assert source.infer([], RELATIONS, 5) == []


def test_similarity_is_that_by_hand(source):
    # three events of three terms each; smooth idf = ln(4 / (1 + df)) + 1
    assert source.events == sorted([("fail", "exam", "fail exam"), ("fail", "test", "fail test"), ("lose", "dog", "lose dog")])
    one, two = math.log(4 / 2) + 1, math.log(4 / 3) + 1
    length = math.sqrt(two**2 + 2 * one**2)
    ((first, second),) = source.nearest(["I failed the exam"])
    assert source.events[first[0]] == ("fail", "exam", "fail exam") and first[1] == 1.0
    assert source.events[second[0]] == ("fail", "test", "fail test")
    assert second[1] == pytest.approx((two / length) ** 2, abs=1e-6)


def test_an_answer_is_the_same_in_any_chunk_order_and_company(source, monkeypatch):
    texts = ["I failed my exam", "my dog is lost", "", "I failed a test", "I lost"] * 3
    together = source.infer(texts, RELATIONS, 5)
    assert together == [source.infer([text], RELATIONS, 5)[0] for text in texts]
    monkeypatch.setattr(atomic_module, "_CHUNK", 2)
    assert source.infer(texts, RELATIONS, 5) == together


def test_the_nearest_are_those_of_a_dense_cosine(tmp_path):
    rng = random.Random(5)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aio" for c in "mnrt"]
    heads = {" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(400)}
    path = write(tmp_path / "events.tsv", [(head, "xWant", f"tail {i}") for i, head in enumerate(sorted(heads))])
    source = AtomicRetrieval(path, neighbours=3, minimum_similarity=0.2)
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 6))) for _ in range(60)]
    events = source._vectorizer.transform(source.events).toarray()
    queries = source._vectorizer.transform([event_terms(text) for text in texts]).toarray()
    for text, row, found in zip(texts, queries @ events.T, source.nearest(texts), strict=True):
        steps = np.rint(row * 1e6)
        expected = sorted(np.flatnonzero(steps >= 200_000).tolist(), key=lambda i: (-steps[i], i))[:15]
        assert [index for index, _ in found] == expected, text
        assert [similarity for _, similarity in found] == pytest.approx(row[expected], abs=1e-6)


def test_neighbours_and_similarity_limit_what_is_used(tmp_path):
    rows = [(f"PersonX paints a {thing}", "xWant", f"tail {i}") for i, thing in enumerate("wall door roof bed".split())]
    rows += [("PersonX paints", "xWant", "tail 4"), ("PersonX paints", "xWant", "tail 5")]
    path = write(tmp_path / "events.tsv", rows)
    assert len(AtomicRetrieval(path, neighbours=2).infer(["I painted"], ["xWant"], 5)[0]["xWant"]) == 3
    assert len(AtomicRetrieval(path).infer(["I painted"], ["xWant"], 5)[0]["xWant"]) == 5
    assert AtomicRetrieval(path, minimum_similarity=0.99).infer(["I painted"], ["xWant"], 5)[0]["xWant"] == [
        "tail 4",
        "tail 5",
    ]


def test_an_event_without_the_relation_is_not_a_used_neighbour(tmp_path):
    rows = [("PersonX paints", "xNeed", "paint"), ("PersonX paints a wall", "xWant", "rest")]
    source = AtomicRetrieval(write(tmp_path / "events.tsv", rows), neighbours=1)
    assert source.infer(["I painted"], ["xWant", "xNeed"], 5) == [{"xWant": ["rest"], "xNeed": ["paint"]}]


# --- reading


def test_columns_in_any_order_headers_and_folders_are_read(tmp_path, source):
    head, tail = "PersonX loses PersonX's dog", "to cry"
    folder = tmp_path / "many"
    folder.mkdir()
    write(folder / "a.tsv", [("head", "relation", "tail"), (head, "xWant", tail)])
    write(
        folder / "b.tsv",
        [("relation", "head_event", "tail_event"), ("xWant", head, "to search"), ("xAttr", head, "sad")],
    )
    write(folder / "c.tsv", [(head, "to grieve", "xWant"), ("",), (head, "Causes", "x"), (head, "isAfter", "y")])
    (folder / "notes.txt").write_text("not read")
    many = AtomicRetrieval(folder)
    assert many.infer(["I lost my dog"], ["xWant"], 5) == [{"xWant": ["to cry", "to search", "to grieve"]}]
    assert [report.rows for report in many.reports] == [1, 1, 1]
    assert [dict(report.ignored) for report in many.reports] == [
        {"header": 1},
        {"header": 1, "other relation": 1},
        {"blank line": 1, "other relation": 2},
    ]
    assert not any(report.skipped for report in many.reports)


# ATOMIC's own release: CSV, an event a line, lists in JSON

V4 = ["event", "oEffect", "oReact", "oWant", "xAttr", "xEffect", "xIntent", "xNeed", "xReact", "xWant", "prefix", "split"]


def v4_row(event: str, **lists: object) -> list[str]:
    cells = {name: "[]" for name in V4} | {name: json.dumps(values) for name, values in lists.items()}
    return list((cells | {"event": event, "prefix": '["a", "b"]', "split": "trn"}).values())


V4_ROWS = [
    V4,
    v4_row("PersonX fails PersonX's exam", xReact=["sad", "ashamed", "none", "ashamed"], xWant=["to study harder"], xAttr=["x"]),
    v4_row("PersonX fails a test", xReact=["disappointed", "none"], xEffect=["cries, a lot"]),
    v4_row("PersonX loses PersonX's dog", xWant=["to look for PersonX's dog", 'to call "Rex"'], oReact=["sad"]),
    v4_row("PersonX sleeps", xReact=["none", "none"], xNeed=[]),
    v4_row("PersonX ___ PersonY", xReact=["sad"]),
]


def write_csv(path: Path, rows: list[list[str]], **dialect: Any) -> Path:
    with open(path, "w", newline="") as out:
        csv.writer(out, **dialect).writerows(rows)
    return path


def of_columns(*names: str) -> list[list[str]]:
    return [[row[V4.index(name)] for name in names] for row in V4_ROWS]


@pytest.mark.parametrize(
    ("name", "rows", "dialect"),
    [
        ("v4_atomic_all_agg.csv", V4_ROWS, {}),
        ("events.tsv", V4_ROWS, {}),  # the content tells
        ("events.txt", V4_ROWS, {"quoting": csv.QUOTE_ALL}),
        ("events.csv", V4_ROWS, {"lineterminator": "\n"}),
        ("events.csv", V4_ROWS, {"delimiter": "\t"}),
        ("reversed.csv", [row[::-1] for row in V4_ROWS], {}),
        ("numbered.csv", [[str(i) if i else "", *row] for i, row in enumerate(V4_ROWS)], {}),
        ("some.csv", of_columns("xReact", "event", "xWant", "xEffect", "xNeed"), {}),
    ],
)
def test_an_event_a_line_is_read(tmp_path, name, rows, dialect):
    source = AtomicRetrieval(write_csv(tmp_path / name, rows, **dialect), minimum_similarity=0.1)
    assert source.infer(["I failed my exam", "I lost my dog"], RELATIONS, 5) == [
        {"xIntent": [], "xNeed": [], "xWant": ["to study harder"], "xEffect": ["cries, a lot"],
         "xReact": ["ashamed", "sad", "disappointed"]},
        {"xIntent": [], "xNeed": [], "xWant": ["to look for their dog", 'to call "Rex"'], "xEffect": [], "xReact": []},
    ]
    (report,) = source.reports
    assert report.read == 6 and report.rows == 3 and not report.skipped
    assert report.ignored == {"header": 1, "no inference (blank or none)": 1, "event without content words": 1}


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"xWant": "to rest"}, "xWant is no list of texts in JSON"),
        ({"xWant": "['to rest']"}, "xWant is no list of texts in JSON"),
        ({"xIntent": '["to rest"'}, "xIntent is no list of texts in JSON"),
        ({"xNeed": '{"a": 1}'}, "xNeed is no list of texts in JSON"),
        ({"xReact": "[1]"}, "xReact is no list of texts in JSON"),
        ({"xReact": "[" * 100_000}, "xReact is no list of texts in JSON"),
        ({"event": " "}, "event is blank"),
        ({"event": "___"}, "event is blank"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_event_line_is_counted(tmp_path, cells, reason):
    bad = list((dict(zip(V4, V4_ROWS[1], strict=True)) | cells).values())
    (report,) = AtomicRetrieval(write_csv(tmp_path / "a.csv", [V4_ROWS[0], bad, *V4_ROWS[1:]])).reports
    assert report.skipped == {reason: 1} and report.lines == {reason: [2]} and report.rows == 3


@pytest.mark.parametrize("line", ["PersonX runs", "PersonX runs,[],[]", '"PersonX runs,[],[]', '"a" b' + ",[]" * 12, "a\tb\tc"])
def test_a_line_that_does_not_fit_the_header_is_counted(tmp_path, line):
    path = write_csv(tmp_path / "a.csv", V4_ROWS, lineterminator="\n")
    path.write_text(path.read_text() + line + "\n")
    (report,) = AtomicRetrieval(path).reports
    assert report.lines == {"fewer columns than the header, or quotes that do not close": [7]} and report.rows == 3


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (["v4_atomic_all.csv", "v4_atomic_all_agg.csv", "v4_atomic_dev.csv"], ["v4_atomic_all_agg.csv"]),
        (["v4_atomic_all.csv", "v4_atomic_trn.csv"], ["v4_atomic_all.csv"]),
        (["v4_atomic_trn.csv", "v4_atomic_dev.csv"], ["v4_atomic_dev.csv", "v4_atomic_trn.csv"]),
        (["v4_atomic_all_agg.csv.gz", "v4_atomic_all.csv", "readme.md"], ["v4_atomic_all_agg.csv.gz"]),
        (["a.csv", "b.tsv", "c.tsv.gz"], ["b.tsv", "c.tsv.gz"]),
    ],
)
def test_of_a_folder_nothing_is_read_twice(tmp_path, names, used):
    for name in names:
        path = write_csv(tmp_path / name, V4_ROWS)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    assert [Path(report.path).name for report in AtomicRetrieval(tmp_path).reports] == used


BLANK = ["", " ", "___", "_", "[]", "[ ]", '[""]', "nan", "NaN", "nan.", "none", "None.", "['none']", '["none"]', "NONE!", "n/a",
         "N/A", "na", "null", "no effect", "-", "--", "...", "?", "no  effect."]


@pytest.mark.parametrize("tail", BLANK)
def test_what_says_nothing_is_no_inference(tmp_path, tail):
    assert clean_inferences([tail, "sad"], 2) == ["sad"]
    path = write(tmp_path / "events.tsv", [("PersonX runs", "xReact", tail), ("PersonX runs", "xReact", "free")])
    source = AtomicRetrieval(path)
    assert source.infer(["I run"], ["xReact"], 5) == [{"xReact": ["free"]}]
    assert source.reports[0].rows == 1 and source.reports[0].ignored == {"no inference (blank or none)": 1}
    source = AtomicRetrieval(write_csv(tmp_path / "v4.csv", [V4, v4_row("PersonX runs", xReact=[tail, "free", tail])]))
    assert source.infer(["I run"], ["xReact"], 5) == [{"xReact": ["free"]}]


@pytest.mark.parametrize("tail", ["nana", "no one", "nothing", "effect", "5", "é", "x_y", "none of it", "non", "数"])
def test_what_says_something_is_an_inference(tail):
    assert clean_inferences([tail], 1) == [tail]


def test_what_was_not_needed_is_counted(source):
    (report,) = source.reports
    assert report.rows == 7 and not report.skipped
    assert report.ignored == {"no inference (blank or none)": 2, "other relation": 1}


def test_identity_is_the_content(tmp_path, source):
    same = tmp_path / "elsewhere"
    same.mkdir()
    again = AtomicRetrieval(write(same / "other_name.tsv", ROWS), neighbours=3)
    assert again.identity == source.identity and again.identity.startswith("atomic:")
    assert again.settings != source.settings
    assert AtomicRetrieval(write(same / "less.tsv", ROWS[:-1])).identity != source.identity


GOOD = b"PersonX paints\txWant\tto rest\n"


@pytest.mark.parametrize(
    "content, reason, line",
    [
        (b"PersonX paints\txWant\n" + GOOD, "not 3 tab-separated columns", 1),
        (GOOD + b"PersonX paints xWant to rest\n", "not 3 tab-separated columns", 2),
        (GOOD + b"PersonX\tpaints\txWant\tto rest\n", "not 3 tab-separated columns", 2),
        (GOOD + b"PersonX paints\txwant\tto rest\n", "unknown relation", 2),
        (GOOD + b"PersonX paints\t\tto rest\n", "unknown relation", 2),
        (GOOD + b"head\trelation\ttail\n", "unknown relation", 2),  # a header belongs to line 1
        (GOOD + b"\txWant\tto rest\n", "event is blank", 2),
        (GOOD + b"PersonX pa\xffints\txWant\tto rest\n", "not UTF-8", 2),
        (GOOD + b"PersonX pa\0ints\txWant\tto rest\n", "NUL byte", 2),
        (GOOD + b"x" * (1 << 20) + b"\txWant\ty\n" + GOOD, "line longer than 1048576 bytes", 2),
        (GOOD + b"a,xWant,b\n", "not 3 tab-separated columns", 2),
    ],
)
def test_malformed_rows_are_counted(tmp_path, content, reason, line):
    path = tmp_path / "events.tsv"
    path.write_bytes(content)
    (report,) = AtomicRetrieval(path).reports
    assert report.skipped == {reason: 1} and report.lines == {reason: [line]}
    assert report.rows == content.count(GOOD)
    assert f"line {line}" in report.summary() and reason in report.summary()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"\n\n", "blank line: 2"),
        (b"head\trelation\ttail\n", "header: 1"),
        (b"PersonX paints\txAttr\tcalm\n", "other relation: 1"),
        (b"PersonX paints\txWant\tnone\n", "no inference (blank or none): 1"),
        (b"PersonX ___\txWant\tto rest\n", "event without content words: 1"),
        (b"\x89PNG\r\n\x1a\n" * 10, "not UTF-8: 10"),
    ],
)
def test_nothing_usable_is_an_error(tmp_path, content, message):
    path = tmp_path / "events.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        AtomicRetrieval(path)
    assert str(path) in str(error.value) and message in str(error.value) and "xIntent" in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="ATOMIC file not found"):
        AtomicRetrieval(tmp_path / "none.tsv")
    with pytest.raises(DataError, match=r"no \*\.tsv or \*\.csv file in this folder"):
        AtomicRetrieval(tmp_path)
    (tmp_path / "events.tsv.gz").write_bytes(b"\x1f\x8b\x08\x00 broken")
    with pytest.raises(DataError, match=r"events\.tsv\.gz:1: damaged file"):
        AtomicRetrieval(tmp_path / "events.tsv.gz")


# --- settings and specs


@pytest.mark.parametrize("wrong", [{"neighbours": 0}, {"minimum_similarity": 0.0}, {"minimum_similarity": 1.5}])
def test_wrong_settings_are_named(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AtomicRetrieval(write(tmp_path / "events.tsv", ROWS), **wrong)


def test_wrong_requests_are_named(source):
    with pytest.raises(ConfigError, match="relations: 'xAttr' unknown"):
        source.infer(["a"], ["xAttr"], 5)
    with pytest.raises(ConfigError, match="k: 0"):
        source.infer(["a"], RELATIONS, 0)


@pytest.mark.parametrize("spec", ["", "atomic", "atomic:", "comet", "comet:", "bundled:x", "https://x.org/a", "Atomic:x"])
def test_bad_specs_name_the_accepted_ones(spec):
    with pytest.raises(ConfigError, match=r"--knowledge .*'bundled', 'atomic:PATH'.* 'comet:DIR'"):
        open_source(spec)


def test_a_spec_opens_its_source(tmp_path):
    path = write(tmp_path / "a:b.tsv", ROWS)
    assert isinstance(open_source(f"atomic:{path}", neighbours=3), AtomicRetrieval)
    with pytest.raises(ConfigError, match="beams"):
        open_source(f"atomic:{path}", beams=5)
    with pytest.raises(DataError, match="not found"):
        open_source(f"atomic:{tmp_path / 'missing.tsv'}")
    with pytest.raises(DataError, match="COMET folder not found"):
        open_source(f"comet:{tmp_path / 'missing'}")


def test_the_bundled_events_answer():
    source = open_source("bundled")
    (answer,) = source.infer(["I failed my exam and I feel so sad"], RELATIONS, 5)
    assert sum(map(len, answer.values())) > 0
    assert not source.reports[0].skipped
    assert all("person" not in text.lower() for texts in answer.values() for text in texts)


# --- real data


@pytest.mark.skipif(not (REAL / "atomic").is_dir(), reason=f"no real data at {REAL}")
@limited_memory(1 << 30)
def test_real_atomic_answers():
    source = AtomicRetrieval(REAL / "atomic")
    assert sum(report.rows for report in source.reports) > 80_000
    assert not any(report.skipped for report in source.reports)
    assert len(source.events) > 14_000
    texts = ["I failed my exam", "My grandfather died last week.", "I won the lottery!", "We adopted a puppy"]
    answers = source.infer(texts, RELATIONS, 5)
    assert all(sum(map(len, answer.values())) >= 15 for answer in answers)
    assert {"sad", "disappointed", "bad", "upset", "unhappy"} & set(answers[0]["xReact"])
    assert {"excited", "happy", "lucky", "ecstatic"} & set(answers[2]["xReact"])
    joined = " ".join(text for answer in answers for texts in answer.values() for text in texts).lower()
    assert not {"john", "tom", "personx", "persony", "none"} & set(joined.replace("'", " ").split())
    began = time.perf_counter()
    source.infer([f"{text} {i}" for i in range(500) for text in texts], RELATIONS, 5)
    assert time.perf_counter() - began < 10
