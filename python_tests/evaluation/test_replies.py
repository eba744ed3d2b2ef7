"""Replies from files of every form come out alike; contexts are matched however they are spelt."""

from __future__ import annotations

import gzip
import json

import pytest
from reply_files import BLOCKS, cem, json_lines, kemp, moel

from case_fast.errors import DataError
from case_fast.evaluation.replies import context_key, matched, read_all, read_replies

TEXTS = ["I am so sorry to hear that.", "I am so sorry to hear that.", "That is great! What is his name?", "I do not know."]
# The same contexts as a person wrote them.
RAW = [["I lost my job."], ["I lost my job.", "Oh no, what happened?", "They didn't need me anymore."], ["My dog is so happy"],
       ["She shouldn't have come"]]


@pytest.mark.parametrize("write", [kemp, cem])
def test_blocks_of_sister_repositories(write, tmp_path):
    found = read_replies(write(tmp_path / "out.txt"))
    assert [reply.text for reply in found.replies] == TEXTS
    assert found.name == "out" and found.form == f"text blocks, {'pred' if write is kemp else 'greedy'}"
    assert found.replies[1].reference == "That is sad. I am sure you will find one."
    assert found.replies[1].context == ("I lost my job.", "Oh no, what happened?", "They did not need me anymore.")
    assert found.replies[3].words == ("i", "do", "not", "know", ".") and not found.report.skipped


def test_blocks_with_several_systems_need_a_name(tmp_path):
    path = moel(tmp_path / "generation_result.txt")
    with pytest.raises(DataError, match=r"replies of trs, moe, moe\+oracle.*Choose one: .*generation_result.txt#trs"):
        read_replies(path)
    found = read_replies(f"MoEL={path}#MOE")
    assert (found.name, found.form) == ("MoEL", "text blocks, moe")
    assert [reply.text for reply in found.replies] == TEXTS and found.replies[0].reference == "Oh no, what happened?"
    assert {reply.text for reply in read_replies(f"{path}#MOE+oracle").replies} == {"Oh."}
    assert {reply.text for reply in read_replies(f"{cem(tmp_path / 'cem.txt')}#Beam").replies} == {"No."}
    with pytest.raises(DataError, match="no block has beam. There are trs"):
        read_replies(f"{path}#beam")


def test_json_lines_and_what_is_wrong_with_them(tmp_path):
    path = json_lines(tmp_path / "mine.jsonl", [
        {"context": ["Hi"], "reply": "Hello!"}, {"context": "Hi there", "reply": "oh , no"},
        {"context": [["so", "sad"]], "reply": ""}])
    with open(path, "a") as stream:
        stream.write('\n{"context": []}\n[]\nnothing\n{"context": ["a"], "reply": 3}\n' + '{"a":' * 5000 + "\n")
    found = read_replies(path)
    assert [(reply.context, reply.text, reply.reference) for reply in found.replies] == [
        (("Hi",), "Hello!", ""), (("Hi there",), "Oh, no", ""), (("So sad",), "", "")]
    assert found.report.skipped == {'no "context" of turns': 1, "no JSON object": 1, "no JSON": 2, 'no "reply"': 1}
    assert [reply.line for reply in found.replies] == [1, 2, 3]
    with pytest.raises(DataError, match="#x chooses a reply of text blocks"):
        read_replies(f"{path}#x")


def test_predictions_of_a_run_by_file_evaluation_and_run(tmp_path):
    run = tmp_path / "ed.run"
    folder = run / "evaluation" / "test"
    folder.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    row = {"context": ["Hi"], "reply": "No.", "reference": "Yes.", "emotion": "sad", "predicted": "proud", "nll": 6, "tokens": 3}
    json_lines(folder / "predictions.jsonl", [row, row | {"nll": None, "predicted": None}])
    for given in (run, folder, folder / "predictions.jsonl"):
        found = read_replies(given)
        assert (found.name, found.form, len(found.replies)) == ("ed.run", "predictions", 2)
    first, second = found.replies
    assert (first.emotion, first.predicted, first.nll, first.tokens) == ("sad", "proud", 6.0, 3)
    assert (second.predicted, second.nll) == ("", None)
    assert [file.name for file in read_all([str(run), f"A={run}", str(folder)])] == ["ed.run", "A", "ed.run (2)"]
    (folder / "predictions.jsonl").unlink()
    with pytest.raises(DataError, match="Make it with: case-fast evaluate .*ed.run --data STORE"):
        read_replies(run)


def test_a_file_without_replies_is_refused_with_what_was_expected(tmp_path):
    hostile = "Context:" + "(" * 9000 + "\nPred:a\nContext:__import__('os').getcwd()\nPred:b\nContext:{}\nPred:c"
    for name, text in (("empty", ""), ("prose", "It was a day.\nNothing: happened\n"), ("blocks", "Context:['a']\nRef:b\n"),
                       ("hostile", hostile)):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(DataError, match="no usable row .* Expected predictions.jsonl of case-fast evaluate"):
            read_replies(path)
    with pytest.raises(DataError, match="not found"):
        read_replies(tmp_path / "none.txt")


def test_gzip_and_names_with_signs(tmp_path):
    path = tmp_path / "a=b#c.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"context": ["Hi"], "reply": "No."}).encode()))
    assert read_replies(path).name == "a=b#c" and read_replies(f"N={path}").name == "N"


def test_a_context_is_the_same_however_it_is_spelt():
    for raw, (cut, *_) in zip(RAW, BLOCKS, strict=True):
        assert [context_key(turn) for turn in raw] == [context_key(turn) for turn in cut]
    assert context_key("I can't — she's my friend's…") == context_key("i can not - she is my friend 's ...")
    assert context_key("I was happy") != context_key("I was not happy")


def test_replies_are_matched_by_context_and_never_by_line(tmp_path):
    theirs = read_replies(kemp(tmp_path / "kemp.txt", [BLOCKS[place] for place in (3, 0, 1)]))
    rows = [{"context": context, "reply": f"reply {place}"} for place, context in enumerate(RAW)]
    ours = read_replies(json_lines(tmp_path / "ours.jsonl", rows))
    assert [(one.text, other.text) for one, other in matched(ours, theirs)] == [
        ("Reply 0", TEXTS[0]), ("Reply 1", TEXTS[1]), ("Reply 3", TEXTS[3])]
    twice = read_replies(json_lines(tmp_path / "twice.jsonl", [rows[0], rows[0] | {"reply": "second"}]))
    assert [other.text for _, other in matched(twice, twice)] == ["Reply 0", "Second"]
    assert [one.text for one, _ in matched(twice, theirs)] == ["Reply 0"]
