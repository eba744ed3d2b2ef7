"""The EmpatheticDialogues reader: every malformed row is counted with its line, every damaged file is a typed error."""

from __future__ import annotations

import csv
import gzip
import io
import random
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from case_fast.data.empathetic_dialogues import (
    COLUMNS,
    EMOTION_IDS,
    EMOTIONS,
    SPLITS,
    Turn,
    listener_turns,
    read_conversations,
)
from case_fast.errors import DataError

HEADER = ",".join(COLUMNS)
SPOILED = "in a conversation with a missing or malformed turn"
ALONE = "in a conversation of one author"
COMMA = "(is there a comma in a text?)"
GOOD = [
    f"{HEADER}",
    "c:0,1,sad,My cat_comma_ old.,7,My cat died_comma_ sadly.,5|5|5_5|5|5,",
    "c:0,2,sad,My cat_comma_ old.,9,Oh  no!,,",
    "c:0,3,sad,My cat_comma_ old.,7,Yes.,,",
    "c:0,4,sad,My cat_comma_ old.,9,So sorry.,,",
    "c:1,1,joyful,A party.,3,Party!,,",
    "c:1,2,joyful,A party.,4,Great.,,",
]


def write(folder: Path, lines: list[str] | bytes, name: str = "train.csv") -> Path:
    folder.mkdir(exist_ok=True)
    content = lines if isinstance(lines, bytes) else "".join(line + "\n" for line in lines).encode()
    (folder / name).write_bytes(content)
    return folder


def with_line(place: int, line: str) -> list[str]:
    """The good rows, with row ``place`` (0: the header) replaced."""
    return [*GOOD[:place], line, *GOOD[place + 1 :]]


def row(**changed: str) -> str:
    """Row 2 of the good rows (turn 2 of c:0, line 3) with changed fields."""
    fields = dict(zip(COLUMNS, GOOD[2].split(","), strict=True)) | changed
    return ",".join(fields.values())


# ---- what a sound file gives


def test_a_sound_file_is_read_whole(tmp_path):
    conversations, report = read_conversations(write(tmp_path, GOOD), "train")
    assert [(c.id, c.emotion, c.situation) for c in conversations] == [
        ("c:0", "sad", "My cat, old."),
        ("c:1", "joyful", "A party."),
    ]
    assert conversations[0].turns == (
        Turn("My cat died, sadly.", True), Turn("Oh no!", False), Turn("Yes.", True), Turn("So sorry.", False),
    )
    assert report.rows == 6 and not report.skipped
    assert report.summary() == f"{tmp_path / 'train.csv'}: 7 lines, 6 rows; not needed 1 (header)"


def test_one_example_a_listener_turn(tmp_path):
    conversations, _ = read_conversations(write(tmp_path, GOOD), "train")
    examples = list(listener_turns(conversations))
    assert [e.id for e in examples] == ["c:0#2", "c:0#4", "c:1#2"]
    assert [len(e.context) for e in examples] == [1, 3, 1]
    assert [e.response for e in examples] == ["Oh no!", "So sorry.", "Great."]
    assert all(e.context[0].by_speaker for e in examples)
    assert [e.feedback for e in examples] == ["Yes.", "", ""]
    assert (examples[1].emotion, examples[1].situation) == ("sad", "My cat, old.")


def test_all_but_the_first_author_are_the_listener(tmp_path):
    lines = [HEADER, "c,1,sad,p,0,a,,", "c,2,sad,p,1,b,,", "c,3,sad,p,1,c,,", "c,4,sad,p,2,d,,", "c,5,sad,p,0,e,,"]
    (conversation,), _ = read_conversations(write(tmp_path, lines), "train")
    assert [turn.by_speaker for turn in conversation.turns] == [True, False, False, False, True]
    assert [(e.response, len(e.context)) for e in listener_turns([conversation])] == [("b", 1), ("c", 2), ("d", 3)]
    assert [e.feedback for e in listener_turns([conversation])] == ["", "", "e"]  # not after another listener turn


def test_rows_are_ordered_by_turn_number(tmp_path):
    expected, _ = read_conversations(write(tmp_path / "a", GOOD), "train")
    shuffled = GOOD[1:]
    random.Random(3).shuffle(shuffled)
    found, report = read_conversations(write(tmp_path / "b", [HEADER, *shuffled]), "train")
    assert sorted(found, key=lambda c: c.id) == expected and report.rows == 6


def test_emotions_are_32_sorted_words():
    assert len(EMOTIONS) == len(EMOTION_IDS) == 32 and list(EMOTIONS) == sorted(EMOTIONS)


@pytest.mark.parametrize(
    "content",
    [
        "\r\n".join(GOOD).encode() + b"\r\n",
        b"\xef\xbb\xbf" + "\n".join(GOOD).encode(),  # BOM, and no line end after the last row
        "".join(line + ",cand 1|cand 2\n" for line in GOOD).encode(),  # the ninth column
    ],
    ids=["CRLF", "BOM", "nine fields"],
)
def test_harmless_variants_read_the_same(tmp_path, content):
    expected = read_conversations(write(tmp_path / "a", GOOD), "train")[0]
    found, report = read_conversations(write(tmp_path / "b", content), "train")
    assert found == expected and report.rows == 6 and not report.skipped


def test_quotes_are_text(tmp_path):
    """The release is no quoted CSV: a row may hold one bare quote."""
    lines = with_line(2, row(utterance='He said "no'))
    conversations, report = read_conversations(write(tmp_path, lines), "train")
    assert conversations[0].turns[1].text == 'He said "no' and report.rows == 6


def test_a_compressed_csv_reads_the_same(tmp_path):
    expected = read_conversations(write(tmp_path / "a", GOOD), "train")[0]
    folder = write(tmp_path / "b", gzip.compress("\n".join(GOOD).encode()), "train.csv.gz")
    found, report = read_conversations(folder, "train")
    assert found == expected and report.path.endswith("train.csv.gz")


def test_limit_counts_conversations(tmp_path):
    write(tmp_path, GOOD)
    conversations, report = read_conversations(tmp_path, "train", limit=1)
    assert [c.id for c in conversations] == ["c:0"] and report.rows == 4
    assert len(read_conversations(tmp_path, "train", limit=2)[0]) == 2
    assert len(read_conversations(tmp_path, "train", limit=99)[0]) == 2


# ---- malformed rows: (rows of the file, line -> reason); all rows of other conversations are kept


def spoiling(line: int, reason: str) -> dict[int, str]:
    """The reasons of the first conversation's four rows, of which the one at ``line`` is malformed."""
    return {number: SPOILED for number in (2, 3, 4, 5)} | {line: reason}


SECOND = "c:1,2,joyful,A party.,4,Great.,,"
MALFORMED = {
    "short row": (with_line(2, "c:0,2,sad,only four"), spoiling(3, "not 8 or 9 fields")),
    "ten fields": (with_line(2, GOOD[2] + ",9th,10th"), spoiling(3, "not 8 or 9 fields")),
    "unknown emotion": (with_line(2, row(context="bored")), spoiling(3, "unknown emotion")),
    "emotion in capitals": (with_line(2, row(context="Sad")), spoiling(3, "unknown emotion")),
    "another emotion inside": (with_line(2, row(context="angry")), spoiling(3, "emotion differs within its conversation")),
    "another prompt inside": (with_line(3, GOOD[3].replace("old", "new")), spoiling(4, "prompt differs within its conversation")),
    "missing turn": ([*GOOD[:2], *GOOD[3:]], {2: SPOILED, 3: SPOILED, 4: SPOILED}),
    "missing first turn": ([GOOD[0], *GOOD[2:]], {2: SPOILED, 3: SPOILED, 4: SPOILED}),
    "duplicate turn": ([*GOOD[:3], GOOD[2], *GOOD[3:]], spoiling(4, "turn number occurs twice") | {6: SPOILED}),
    "no conv_id": (with_line(2, row(conv_id=" ")), spoiling(3, "no conv_id")),
    "turn 0": (with_line(1, GOOD[1].replace(",1,", ",0,", 1)),
               spoiling(2, "turn number below 1, where those of the file start")),
    "turn -1": (with_line(1, GOOD[1].replace(",1,", ",-1,", 1)), spoiling(2, "utterance_idx is not a whole number")),
    "turn as a word": (with_line(6, SECOND.replace("2", "two")), {6: SPOILED, 7: "utterance_idx is not a whole number"}),
    "turn of 5000 digits": (
        with_line(6, SECOND.replace("2", "9" * 5000)), {6: SPOILED, 7: "utterance_idx is not a whole number"},
    ),
    "turn as a superscript": (with_line(6, SECOND.replace("2", "²")), {6: SPOILED, 7: "utterance_idx is not a whole number"}),
    "turn with a point": (with_line(6, SECOND.replace("2", "2.0")), {6: SPOILED, 7: "utterance_idx is not a whole number"}),
    "blank utterance": (with_line(6, SECOND.replace("Great.", " \t ")), {6: SPOILED, 7: "empty utterance"}),
    "no speaker": (with_line(6, SECOND.replace(",4,", ",,")), {6: SPOILED, 7: "speaker_idx is not a whole number"}),
    "speaker as a word": (with_line(6, SECOND.replace(",4,", ",Ann,")), {6: SPOILED, 7: "speaker_idx is not a whole number"}),
    "blank lines": ([*GOOD[:3], "", "   ", *GOOD[3:]], {4: "empty line", 5: "empty line"}),
    "10 MB line": ([*GOOD, "x" * 10_000_000], {8: "line longer than 1048576 bytes"}),
    "10 MB line first": ([HEADER, "x" * 10_000_000, *GOOD[1:]], {2: "line longer than 1048576 bytes"}),
    # one author on both sides, or one turn
    "one author": (with_line(6, SECOND.replace(",4,", ",3,")), {6: ALONE, 7: ALONE}),
    "one author, written twice": (with_line(6, SECOND.replace(",4,", ", 3 ,")), {6: ALONE, 7: ALONE}),
    "one turn": (GOOD[:6], {6: ALONE}),
    "one author and a bad row": ([*with_line(6, SECOND.replace(",4,", ",3,")), "c:1,3,bored,A party.,4,x,,"],
                                 {6: SPOILED, 7: SPOILED, 8: "unknown emotion"}),
    # a comma in a text never cuts it
    "a comma": (with_line(2, row(utterance="Oh, no")), spoiling(3, f"selfeval holds no ratings {COMMA}")),
    "two commas": (with_line(2, row(utterance="Oh, dear, no")), spoiling(3, "not 8 or 9 fields")),
    "a comma before a word alone": (with_line(2, row(utterance="Oh,no")), spoiling(3, f"selfeval holds no ratings {COMMA}")),
    "a comma in a number": (with_line(2, row(utterance="I won 10,000")), spoiling(3, f"selfeval holds no ratings {COMMA}")),
    "a comma at the end": (with_line(2, row(utterance="Oh,")), spoiling(3, f"empty ninth field {COMMA}")),
    "a comma at the front": (with_line(2, row(utterance=", no")), spoiling(3, "empty utterance")),
    "a comma and ratings": (with_line(2, row(utterance="Oh, no", selfeval="5|5|5_5|5|5")),
                            spoiling(3, f"selfeval holds no ratings {COMMA}")),
    "a comma and no tags": (with_line(2, "c:0,2,sad,My cat_comma_ old.,9,Oh, no,5|5|5_5|5|5"),
                            spoiling(3, f"selfeval holds no ratings {COMMA}")),
    "a comma, no ratings, no tags": (with_line(2, "c:0,2,sad,My cat_comma_ old.,9,Oh, no, dear"),
                                     spoiling(3, f"selfeval holds no ratings {COMMA}")),
    "no tags": (with_line(2, "c:0,2,sad,My cat_comma_ old.,9,Oh no,"), spoiling(3, "not 8 or 9 fields")),
    "a comma in the prompt": (with_line(2, row(prompt="My cat, old.")), spoiling(3, "speaker_idx is not a whole number")),
    "a comma in a prompt's number": (with_line(2, row(prompt="My cat cost 10,000")),
                                     spoiling(3, f"selfeval holds no ratings {COMMA}")),
    "commas in prompt and text": (with_line(2, row(prompt="My cat, old.", utterance="Oh, no")), spoiling(3, "not 8 or 9 fields")),
    "an unclosed quote and a comma": (with_line(2, row(utterance='"Oh, no')), spoiling(3, f"selfeval holds no ratings {COMMA}")),
    "a quote, a comma, more text": (with_line(2, row(utterance='"Oh, no" he said')),
                                    spoiling(3, f"selfeval holds no ratings {COMMA}")),
    "a text for tags": (with_line(2, row(selfeval="5|5|5_5|5|5", tags="dear me")), spoiling(3, f"tags hold a text {COMMA}")),
}
RAW = {
    "bad UTF-8": (b"c:0,2,sad,p,9,caf\xe9,,", spoiling(3, "not UTF-8")),
    "half a UTF-8 character at the end": (b"c:0,2,sad,p,9,a,,\xe2\x80", spoiling(3, "not UTF-8")),
    "NUL": (b"c:0,2,sad,p,9,a\0b,,", spoiling(3, "NUL byte")),
}
for name, (bad, reasons) in RAW.items():
    content = b"".join((bad if place == 2 else line.encode()) + b"\n" for place, line in enumerate(GOOD))
    MALFORMED[name] = (content, reasons)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_row_is_counted_with_its_line(tmp_path, case):
    content, expected = MALFORMED[case]
    conversations, report = read_conversations(write(tmp_path, content), "train")
    found = {line: reason for reason, lines in report.lines.items() for line in lines}
    assert found == expected
    rows = (content.count(b"\n") if isinstance(content, bytes) else len(content)) - 1
    assert report.rows == sum(len(c.turns) for c in conversations) == rows - len(expected)
    assert report.rows + report.skipped.total() == rows == report.read - 1
    for line, reason in expected.items():
        assert reason in report.summary() and str(line) in report.summary()


def test_summary_names_the_first_lines_and_counts_all(tmp_path):
    _, report = read_conversations(write(tmp_path, [*GOOD, *["short"] * 1200]), "train")
    assert "skipped 1,200 (not 8 or 9 fields; lines 8, 9, 10, 11, 12, …)" in report.summary()
    assert report.as_dict()["skipped"] == {"not 8 or 9 fields": 1200}


FIELDS = st.sampled_from(["c:0", "c:1", "1", "2", "3", "sad", "joyful", "bored", "", " ", "0", "a text", "é", "_comma_", "½"])
ROWS = st.one_of(
    st.lists(FIELDS, max_size=11).map(",".join),
    st.tuples(st.sampled_from(["c:0", "c:1", "c:2"]), st.sampled_from("1234"), st.sampled_from(["sad", "angry"])).map(
        lambda t: ",".join([*t, "p", str(int(t[1]) % 2), "some words", "", ""])
    ),
    st.text(st.characters(blacklist_characters="\n", blacklist_categories=["Cs"]), max_size=30),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, max_size=12))
def test_nothing_is_lost_silently(tmp_path, rows):
    write(tmp_path, [HEADER, *rows])
    try:
        conversations, report = read_conversations(tmp_path, "train")
    except DataError as error:
        assert str(error).startswith(f"{tmp_path / 'train.csv'}: no usable row (")
        return
    assert report.rows + report.skipped.total() == len(rows) == report.read - 1
    assert report.rows == sum(len(c.turns) for c in conversations)
    for conversation in conversations:
        assert conversation.turns[0].by_speaker and not all(turn.by_speaker for turn in conversation.turns)


# ---- what people's files do otherwise


QUOTED = ["Oh, no", ", no", "Oh,", "10,000", 'He said "no"', '"No"', '"No", he said', "a,b,c,d", '""', '"', "Oh no", "5,5|5,"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("column", ["utterance", "prompt"])
@pytest.mark.parametrize("text", QUOTED)
def test_a_file_written_again_as_quoted_csv_is_read(tmp_path, quoting, column, text):
    out = io.StringIO()
    rows = [dict(zip(COLUMNS, line.split(","), strict=True)) for line in GOOD]
    for changed in rows[5:]:
        changed[column] = text
    csv.writer(out, quoting=quoting, lineterminator="\n").writerows(list(found.values()) for found in rows)
    conversations, report = read_conversations(write(tmp_path, out.getvalue().encode()), "train")
    assert report.rows == 6 and not report.skipped
    assert conversations[1].situation == (text if column == "prompt" else "A party.")
    assert [turn.text for turn in conversations[1].turns] == ([text] * 2 if column == "utterance" else ["Party!", "Great."])


@pytest.mark.parametrize(
    "text", ['"No"', '"No" he said', 'He said "no"', '"', '"No', 'No"', '""', '""No""', '"No_comma_ no"', "''No''"]
)
def test_in_the_release_quotes_are_text(tmp_path, text):
    lines = with_line(2, row(utterance=text))
    conversations, report = read_conversations(write(tmp_path, lines), "train")
    assert conversations[0].turns[1].text == text.replace("_comma_", ",") and report.rows == 6


def renumbered(rows: list[str], by: int) -> list[str]:
    return [",".join([conv, str(int(turn) + by), rest]) for conv, turn, rest in (line.split(",", 2) for line in rows)]


@pytest.mark.parametrize(
    ("rows", "kept", "reasons"),
    [
        (renumbered(GOOD[1:], -1), ["c:0", "c:1"], {}),
        (renumbered(GOOD[1:], -1)[::-1], ["c:1", "c:0"], {}),
        # a first turn that is missing makes no listener the speaker
        (renumbered(GOOD[1:], -1)[1:] + renumbered(["c:2,1,sad,p,1,a,,", "c:2,2,sad,p,2,b,,"], -1), ["c:1", "c:2"], {SPOILED: 3}),
        # where as many start at 0 as at 1, turns start at 1 as in the release
        ([*GOOD[1:5], *renumbered(GOOD[5:], -1)], ["c:0"],
         {"turn number below 1, where those of the file start": 1, SPOILED: 1}),
        (renumbered(GOOD[1:], 1), [], {SPOILED: 6}),
    ],
    ids=["from 0", "from 0, backwards", "from 0, first missing", "from 0 and 1", "from 2"],
)
def test_turns_are_numbered_from_1_or_from_0(tmp_path, rows, kept, reasons):
    write(tmp_path, [HEADER, *rows])
    if not kept:
        with pytest.raises(DataError, match=f"no usable row .{SPOILED}: 6"):
            read_conversations(tmp_path, "train")
        return
    conversations, report = read_conversations(tmp_path, "train")
    assert [c.id for c in conversations] == kept and report.skipped == reasons
    sound = {c.id: c for c in read_conversations(write(tmp_path / "sound", GOOD), "train")[0]}
    assert all(c == sound[c.id] for c in conversations if c.id in sound)
    assert report.notes == (["turns numbered from 0"] if "c:1" in kept else [])


@pytest.mark.parametrize(("header", "ninth", "sound"), [
    (HEADER, "a|b", True), (HEADER, "a_comma_ b_pipe_|c", True), (HEADER + ",candidates", "", True), (HEADER, "", False),
    (HEADER + ",a,b", "", None),
])
def test_an_empty_ninth_field_is_one_of_candidates_only_where_there_are_some(tmp_path, header, ninth, sound):
    lines = [header, *(line + "," for line in GOOD[1:5]), *(f"{line},{ninth}" for line in GOOD[5:])]
    write(tmp_path, lines)
    if sound:
        assert read_conversations(tmp_path, "train")[1].rows == 6
    else:
        with pytest.raises(DataError, match="the header is not" if sound is None else "empty ninth field .*: 6"):
            read_conversations(tmp_path, "train")


# ---- files that cannot be used

UNUSABLE = {
    "empty file": (b"", ":1: the header is not that of EmpatheticDialogues"),
    "wrong header": (b"id,text\n1,hello\n", ":1: the header is not that of EmpatheticDialogues"),
    "no header": ("\n".join(GOOD[1:]).encode(), ":1: the header is not that of EmpatheticDialogues"),
    "binary": (random.Random(0).randbytes(50_000), ":1: the header is not that of EmpatheticDialogues"),
    "header cut by a carriage return": ("\r".join(GOOD).encode(), ":1: the header is not that of EmpatheticDialogues"),
    "only the header": (HEADER.encode() + b"\n", ": no usable row (header: 1)"),
    "nobody answers": (f"{HEADER}\nc,1,sad,p,0,x,,\nd,1,sad,p,0,x,,\nd,2,sad,p,0,y,,\n".encode(),
                       ": no usable row (in a conversation of one author: 3; header: 1)"),
    "only bad rows": (f"{HEADER}\na\nb\nc,1,bored,p,0,x,,\n".encode(),
                      ": no usable row (not 8 or 9 fields: 2; unknown emotion: 1; header: 1)"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_file_is_a_typed_error(tmp_path, case):
    content, message = UNUSABLE[case]
    write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_conversations(tmp_path, "train")
    assert str(caught.value).startswith(f"{tmp_path / 'train.csv'}{message}")
    assert ",".join(COLUMNS) in str(caught.value)  # what a good file looks like


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_damaged_gzip_is_named_with_the_line(tmp_path, cut):
    rng = random.Random(1)
    rows = [f"c:{i},1,sad,p,0,{rng.random()},," for i in range(3000)]
    packed = gzip.compress("\n".join([HEADER, *rows]).encode())
    write(tmp_path, packed[: int(cut * len(packed))], "train.csv.gz")
    with pytest.raises(DataError, match=r"train\.csv\.gz:\d+: damaged file .*Download it again"):
        read_conversations(tmp_path, "train")


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz"])
@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_compression_is_told_by_content(tmp_path, name, pack):
    folder = write(tmp_path, pack("\n".join(GOOD).encode()), name)
    assert read_conversations(folder, "train")[1].rows == 6


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: dialogues not found"):
        read_conversations(tmp_path / "nowhere", "train")
    write(tmp_path, GOOD)
    with pytest.raises(DataError, match=r"valid\.csv: file of the split not found"):
        read_conversations(tmp_path, "valid")
    with pytest.raises(DataError, match=r"train\.csv: neither a folder nor a sound \.tar\.gz"):
        read_conversations(tmp_path / "train.csv", "train")
    (tmp_path / "test.csv").mkdir()
    with pytest.raises(DataError, match=r"test\.csv: file of the split not found"):
        read_conversations(tmp_path, "test")


def test_an_endless_line_is_refused(tmp_path):
    """300 kB that unpack to 300 MB of zeros without a line end."""
    write(tmp_path, gzip.compress(bytes(300 << 20), 9), "train.csv.gz")
    with pytest.raises(DataError, match=r"train\.csv\.gz:1: a line of more than 256 MiB: not a text file"):
        read_conversations(tmp_path, "train")


# ---- the released archive


def archive(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def official(**splits: bytes) -> dict[str, bytes]:
    content = "\n".join(GOOD).encode()
    return {f"empatheticdialogues/{split}.csv": splits.get(split, content) for split in SPLITS}


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("name", ["ed.tar.gz", "ed.tgz", "ed.tar", "ed"])
@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_the_official_archive_reads_as_its_files(tmp_path, name, mode):
    expected = read_conversations(write(tmp_path / "a", GOOD), "train")[0]
    path = archive(tmp_path / name, {"empatheticdialogues/readme.txt": b"hello", **official()}, mode)
    for split in SPLITS:
        found, report = read_conversations(path, split)
        assert found == expected and report.rows == 6
        assert report.path == f"{path}/empatheticdialogues/{split}.csv"


def test_errors_inside_an_archive_name_member_and_line(tmp_path):
    path = archive(tmp_path / "ed.tar.gz", official(valid=b"x,y\n", test="\n".join(with_line(6, "short")).encode()))
    with pytest.raises(DataError, match=r"ed\.tar\.gz/empatheticdialogues/valid\.csv:1: the header"):
        read_conversations(path, "valid")
    assert read_conversations(path, "test")[1].lines == {"not 8 or 9 fields": [7], ALONE: [6]}


def test_a_split_that_the_archive_lacks_is_named(tmp_path):
    members = official()
    del members["empatheticdialogues/valid.csv"]
    path = archive(tmp_path / "ed.tar.gz", members)
    assert read_conversations(path, "train")[1].rows == 6
    with pytest.raises(DataError, match=r"ed\.tar\.gz: the archive holds no valid\.csv"):
        read_conversations(path, "valid")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_not_followed(tmp_path, kind):
    write(tmp_path, GOOD, "outside.csv")
    path = archive(tmp_path / "ed.tar.gz", {"l": link("e/train.csv", kind, str(tmp_path / "outside.csv"))})
    with pytest.raises(DataError, match="the archive holds no train.csv"):
        read_conversations(path, "train")


@pytest.mark.parametrize("name", ["../../train.csv", "/etc/train.csv", "a/../../../train.csv"])
def test_traversal_names_write_nothing(tmp_path, name):
    """A member is read as a stream, whatever its name; nothing is unpacked."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = archive(folder / "ed.tar.gz", {name: "\n".join(GOOD).encode()})
    before = sorted(tmp_path.rglob("*"))
    assert read_conversations(path, "train")[1].rows == 6
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_a_damaged_archive_is_read_or_refused_by_name(tmp_path, mode):
    """Cut short or with flipped bits: read, or a typed error, never another exception."""
    name = "ed.tar.gz" if mode == "w:gz" else "ed.tar"
    rng = random.Random(5)
    rows = [f"c:{i // 4},{i % 4 + 1},sad,p,{i % 2},{rng.random()},," for i in range(600)]
    whole = archive(tmp_path / "whole", official(valid="\n".join([HEADER, *rows]).encode()), mode).read_bytes()
    refused = 0
    for attempt in range(150):
        damaged = bytearray(whole)
        if attempt % 3 == 0:
            damaged = damaged[: rng.randrange(len(damaged))]
        else:  # anywhere, or in the first header
            for _ in range(rng.choice([1, 1, 5])):
                damaged[rng.randrange(len(damaged) if attempt % 3 == 1 else 512)] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        try:
            read_conversations(tmp_path / name, "test")
        except DataError as error:
            assert str(error).startswith(str(tmp_path / name))
            refused += 1
    assert refused > 40


def tar_header(name: str, size: int, kind: bytes = b"0", real_size: int | None = None) -> bytes:
    """A tar header with any size (base 256, so that it may be negative or huge)."""
    info = tarfile.TarInfo(name)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % 2**96 | (0 if size < 0 else 0x80 << 88)).to_bytes(12, "big")
    block[156:157] = kind
    if real_size is not None:  # old GNU sparse: one piece of 512 bytes, the rest claimed
        block[386:410] = b"%011o\0%011o\0" % (0, 512)
        block[483:495] = b"\x80" + real_size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


BOMBS = {
    "negative size": tar_header("train.csv", -512),
    "backwards for ever": tar_header("a", 0) + tar_header("b", 0) + tar_header("c", -1024),
    "2^60 bytes": tar_header("train.csv", 2**60) + HEADER.encode(),
    "2^60 bytes before": tar_header("other.csv", 2**60),
    "long name of 2^40 bytes": tar_header("x", 2**40, b"L"),
    "extended header of 2^40 bytes": tar_header("x", 2**40, b"x"),
    "negative extended header": tar_header("x", -512, b"x"),
    "thousands of nested long names": tar_header("x", 512, b"L") * 5000,
    "sparse file of 2^50 bytes": tar_header("train.csv", 512, b"S", 2**50) + bytes(512),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["ed.tar", "ed.tar.gz"])
def test_archive_bombs_are_refused_at_once(tmp_path, bomb, name):
    content = BOMBS[bomb] + bytes(1024)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        read_conversations(tmp_path / name, "train")
    assert time.monotonic() - began < 1
    assert "sparse" not in bomb or "the archive holds no train.csv" in str(caught.value)  # its zeros are never read


@pytest.mark.parametrize("content", [b"", b"hello", gzip.compress(b"hello", mtime=0), bytes(10_000)])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "ed.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"ed\.tar\.gz: (neither a folder nor a sound|the archive holds no)"):
        read_conversations(tmp_path / "ed.tar.gz", "train")


# ---- the real files


def test_real_data_give_the_known_numbers(real_data):
    counts = []
    for split in SPLITS:
        conversations, report = read_conversations(real_data / "empatheticdialogues", split)
        # three conversations of the training part have one turn
        assert report.skipped == ({ALONE: 3} if split == "train" else {})
        assert report.read == report.rows + report.skipped.total() + report.ignored.total()
        counts.append(sum(1 for _ in listener_turns(conversations)))
    assert counts == [40_278, 5_730, 5_255]
