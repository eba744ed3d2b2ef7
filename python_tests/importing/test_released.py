"""Releases to stores: what they hold is in the store, what is left out is counted, what the store needs else is asked for."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from releases import (
    NAMES,
    TOY,
    case_pickle,
    case_split,
    cem_pickle,
    npy_bytes,
    pickled,
    toy_inferences,
    words,
    write_arrays,
)

from case_fast import cli
from case_fast.data.empathetic_dialogues import EMOTIONS, SPLITS
from case_fast.data.inspect import describe
from case_fast.data.prepare import PrepareSettings
from case_fast.data.text import tokenize
from case_fast.errors import ConfigError, DataError
from case_fast.importing import import_release, read_released
from case_fast.importing.released import _Texts
from case_fast.knowledge import COGNITION_RELATIONS, RELATIONS, clean_inferences, open_source

TURNS = {split: [(c, place) for c in TOY[split] for place in range(1, len(c.turns), 2)] for split in SPLITS}


def settings(source: Path, out: Path, **more) -> PrepareSettings:
    return PrepareSettings(**({"dialogues": str(source), "knowledge": None, "conceptnet": "bundled", "lexicon": "bundled",
                               "out": str(out)} | more))


def written(folder: Path, content: bytes) -> Path:
    path = folder / "dataset_preproc.p"
    path.write_bytes(content)
    return path


def changed(**parts) -> bytes:
    """CASE's pickle with other fields in its training part."""
    splits = [case_split(TOY[split], toy_inferences) for split in NAMES]
    splits[0] |= parts
    return pickled([{name: values for name, values in split.items() if values is not None} for split in splits], 4)


PARTED = {
    "She doesn't know.": "does n't", "He's here, they're not!": "he 's", "Don’t, it’s \"fine\".": "don ’ t",
    "She'd go; we'll see.": "she 'd", "The dogs' house. I couldn't!": "could n't", "Well. :) (yes)": ". : )",
    "I'm gonna go": "gon na", "At 3 o'clock... or 5?": "o'clock ... or",
}


@pytest.mark.parametrize("text", PARTED)
def test_words_that_a_release_holds_apart_are_read_as_the_text_was(text):
    held = words(text)
    assert PARTED[text] in " ".join(held)
    read = _Texts(1000).of(held, "a text")
    assert tokenize(read) == tokenize(text) and "".join(read.split()) == "".join(held)


@pytest.mark.parametrize("protocol", range(6))
def test_a_release_of_cases_layout_is_in_the_store_without_loss(tmp_path, protocol):
    store = import_release(settings(written(tmp_path, case_pickle(protocol)), tmp_path / "out.store"))
    for split in SPLITS:
        assert store.size(split) == len(TURNS[split])
        for index, (conversation, place) in enumerate(TURNS[split]):
            example, source = store.example(split, index), store.example(split, index).source
            assert EMOTIONS[example.emotion] == conversation.emotion and source["by_speaker"] == [True, False, True][:place]
            assert [tokenize(text) for text in source["context"]] == [tokenize(turn.text) for turn in conversation.turns[:place]]
            assert tokenize(source["response"]) == tokenize(conversation.turns[place].text)
            assert tokenize(source["situation"]) == tokenize(conversation.situation)
            follows = conversation.turns[place + 1].text if place + 1 < len(conversation.turns) else ""
            assert tokenize(source["feedback"]) == tokenize(follows)
            # u_0 .. u_t as the release cut them, each with its own inferences
            said = words(conversation.turns[place - 1].text)
            pieces = [said, *(piece for part in " ".join(said).split(".") if (piece := words(" ".join(part.split()))))]
            subs = [store.texts.text(i) for i in example.sub_utterance]
            assert ["".join(sub.split()) for sub in subs] == ["".join(piece) for piece in pieces]
            expected = [(" ".join(words(text)), place, relation) for place, piece in enumerate(pieces)
                        for relation, name in enumerate(COGNITION_RELATIONS)
                        for text in clean_inferences(toy_inferences(" ".join(piece))[name], 5)]
            found = zip(example.knowledge, example.knowledge_sub, example.knowledge_relation, strict=True)
            assert [(store.texts.text(text), sub, relation) for text, sub, relation in found] == expected
            assert len(example.reaction) == 3 * len(pieces)
    assert store.example("train", 0).source["id"] == "train0#2" and store.example("train", 1).source["id"] == "train0#4"
    assert store.manifest["counts"]["conversations"] == {"train": 2, "valid": 1, "test": 1}
    assert store.knowledge["spec"].startswith("imported:") and store.texts.rows(np.arange(3)).values.size


def test_a_release_of_cems_layout_has_inferences_for_whole_utterances(tmp_path):
    path = written(tmp_path, cem_pickle(3))
    store = import_release(settings(path, tmp_path / "out.store"))
    first = store.example("train", 0)
    subs = [store.texts.text(i) for i in first.sub_utterance]
    assert subs == ["i failed my exam . my dog didn't care !", "i failed my exam .", "my dog didn't care !"]
    assert set(first.knowledge_sub) == {0} and len(first.knowledge) == 3 * len(COGNITION_RELATIONS)
    assert set(store.example("train", 2).knowledge_sub) == {0, 1}  # one sentence is the utterance
    # ... and the sentences theirs from the source that is given
    more = import_release(settings(path, tmp_path / "more.store", knowledge="bundled"))
    again = more.example("train", 0)
    texts = [more.texts.text(text) for text, sub in zip(again.knowledge, again.knowledge_sub, strict=True) if sub == 1]
    inferred = open_source("bundled").infer(["i failed my exam ."], RELATIONS, 5)[0]
    assert texts == [text for relation in COGNITION_RELATIONS for text in inferred[relation]] and texts
    assert again.knowledge_sub.tolist().count(0) == first.knowledge_sub.tolist().count(0)
    assert more.knowledge["spec"] == "bundled" and more.knowledge["imported"] == store.knowledge["identity"]


def test_arrays_of_texts_are_dialogues_that_ask_for_knowledge(tmp_path):
    folder = write_arrays(tmp_path / "arrays")
    with pytest.raises(ConfigError, match="no inferences came with the dialogues.*--knowledge"):
        import_release(settings(folder, tmp_path / "out.store"))
    store = import_release(settings(folder, tmp_path / "out.store", knowledge="bundled"))
    assert [store.size(split) for split in SPLITS] == [len(TURNS[split]) for split in SPLITS]
    assert store.example("train", 0).source["context"] == [TOY["train"][0].turns[0].text]
    assert "imported" not in store.knowledge


def test_the_store_trains_and_its_chat_asks_for_a_source(tmp_path, capsys):
    store = tmp_path / "out.store"
    path = written(tmp_path, case_pickle())
    assert cli.main(["import", str(path), "--out", str(store), "--conceptnet", "bundled", "--lexicon", "bundled"]) == 0
    small = ["--model.d_model", "16", "--model.ffn", "16", "--phase1-steps", "1", "--max-steps", "2", "--validate-every", "1",
             "--batch_size", "2", "--device", "cpu"]
    assert cli.main(["train", "--data", str(store), "--out", str(tmp_path / "run"), *small]) == 0
    capsys.readouterr()
    from case_fast.serving import load

    with pytest.raises(ConfigError, match="the knowledge came with an imported file .*--knowledge"):
        load(tmp_path / "run", "cpu").respond("I am sad.")
    assert load(tmp_path / "run", "cpu", knowledge="bundled").respond("I am sad.").emotion in EMOTIONS


def test_check_reads_reports_and_writes_nothing(tmp_path, capsys):
    path = written(tmp_path, changed(concepts=[[]] * 3))
    before = sorted(tmp_path.iterdir())
    assert cli.main(["import", str(path), "--check"]) == 0
    shown = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    assert "as of CASE, with inferences for utterances and their sentences" in shown and "imported:" in shown
    for words_ in ("train 3 0 2 6", "valid 1 0 1 2", "test 2 0 1 4", "xIntent", "1 (concepts)", "missing: concepts and inten"):
        assert words_ in " ".join(shown.split()), words_
    assert "vocabulary:" in shown
    assert cli.main(["import", str(path), "--out", str(tmp_path / "out.store")]) == 1
    assert "a store needs --conceptnet, --lexicon too; with --check" in " ".join(capsys.readouterr().err.split())


def test_every_inference_is_accounted_for(tmp_path):
    found = read_released(written(tmp_path, case_pickle()), limit=2)
    report = next(report for report in found.material.reports if report.unit == "inference")
    assert report.read == report.rows + sum(report.skipped.values()) + sum(report.ignored.values())
    assert report.rows == sum(kept for _, kept in found.relations.values()) == sum(
        len(texts) for by_relation in found.material.inferences.values() for texts in by_relation.values())
    assert set(report.ignored) == {"the same again", "beyond 2 of a relation", "of a text that has them already"}
    assert report.read == sum(read for read, _ in found.relations.values())
    for split in found.splits.values():
        assert split.report.read == split.report.rows + sum(split.report.skipped.values())
    cem = read_released(written(tmp_path, cem_pickle()), limit=5)
    report = next(report for report in cem.material.reports if report.unit == "inference")
    assert report.ignored["none, or empty"] == 5 * len(cem.material.inferences)


BROKEN = {
    "an emotion that is none of the 32": {"emotion": ["sad", "anxiety", "joyful"]},
    "a reply that is empty": {"target": [["a"], [], ["b"]]},
    "a reply that is no list of words": {"target": [["a"], 3, ["b"]]},
    "a turn that is no list of words": {"context": [[["a"]], [["a"], [1], ["b"]], [["c"]]]},
    "a turn that is empty": {"context": [[["a"]], [["a"], [], ["b"]], [["c"]]]},
    "a context that is no list of turns": {"context": [[["a"]], "a b", [["c"]]]},
    "roles that do not fit the turns": {"context_role": [["seeker"], ["seeker", "support"], ["seeker"]]},
    "a context without a turn of the speaker's": {"context_role": [["seeker"], ["support"] * 3, ["seeker"]]},
    "a context after which it is the speaker's turn": {
        "context_role": None, "context": [[["a"]], [["a"], ["b"]], [["c"]]], "utt_cs": None, "utt_cs_split": None},
    "inferences of another utterance than": {"utt_cs": [{"uttr": ["a"]}, {"uttr": ["zebra"]}, {"uttr": ["c"]}]},
    "inferences that are no list for each relation": {"utt_cs": [{"uttr": ["a"]}, [[], []], {"uttr": ["c"]}]},
    "sentences that are no list of dicts": {"utt_cs_split": [[], [3], []]},
    "a sentence that is empty": {"utt_cs_split": [[], [{"uttr": []}], []]},
    "an inference that is no list of words": {"utt_cs": [{"uttr": ["a"]}, {"uttr": ["b"], "xWant": [2]}, {"uttr": ["c"]}]},
    "a situation that is no list of words": {"situation": [[], {"a": 1}, []]},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_an_example_that_cannot_be_used_is_counted_with_its_reason(tmp_path, reason):
    sound = {"context": [[["a"]], [["a"], ["x"], ["b"]], [["c"]]], "target": [["d"]] * 3, "emotion": ["sad"] * 3,
             "context_role": [["seeker"], ["seeker", "support", "seeker"], ["seeker"]], "situation": [["s"]] * 3,
             "utt_cs": [{"uttr": [word]} for word in "abc"], "utt_cs_split": [[]] * 3}
    found = read_released(written(tmp_path, changed(**(sound | BROKEN[reason]))), 5)
    report = found.splits["train"].report
    ((said, count),) = report.skipped.items()
    assert said.startswith(reason) and (report.read, report.rows, count) == (3, 2, 1) and report.lines[said] == [1]
    assert "skipped 1 (" in report.summary() and "; example 1)" in report.summary()
    assert [example.id for example in found.material.examples["train"]] == ["train0#2", "train2#2"]


def test_a_text_with_two_sets_of_inferences_keeps_the_first_and_says_so(tmp_path):
    split = case_split(TOY["train"], toy_inferences)
    for field in ("context", "context_role", "target", "emotion", "situation", "utt_cs", "utt_cs_split"):
        split[field] = [split[field][0]] * 2
    split["utt_cs"] = [split["utt_cs"][0], dict(split["utt_cs"][0]) | {"xWant": [["other"]]}]
    split |= {"situation_cs": None, "emotion_context": None}
    found = read_released(written(tmp_path, changed(**split)), 5)
    report = next(report for report in found.material.reports if report.unit == "inference")
    assert report.skipped == Counter({"of a text that had others before, which stay": 4 * 4 + 1})
    assert "other" not in str(found.material.inferences)


FAULTS = {
    "no release: a list of 2 in place of": pickle.dumps([1, 2]),
    "no release: a value of type str in place of": pickle.dumps("text"),
    "no release: a dict of 0": pickle.dumps({}),
    "the fourth part has no word2index": pickle.dumps([{}, {}, {}, {"a": 1}]),
    "train has no field 'context'": pickle.dumps([{}, {}, {}, {"word2index": {}}]),
    "train has no field 'emotion'": pickle.dumps([{"context": [], "target": []}, {}, {}, {"word2index": {}}]),
    "train, field 'target': 1 entries, and 3 of 'context'": changed(target=[["a"]]),
    "train, field 'utt_cs': no list": changed(utt_cs={"a": 1}),
    "gzip, not the data": b"\x1f\x8b\x08\x00", "a zip archive, not the data": b"PK\x03\x04",
    "a pointer of Git LFS": b"version https://git-lfs",
    "one array of a release": npy_bytes(np.array(["a"])),
}


@pytest.mark.parametrize("problem", FAULTS)
def test_what_is_no_release_is_refused_with_the_reason(tmp_path, problem):
    path = written(tmp_path, FAULTS[problem])
    with pytest.raises(DataError) as caught:
        read_released(path, 5)
    assert problem in str(caught.value) and str(caught.value).startswith(str(path)) and caught.value.remedy


def test_missing_files_and_parts_are_told_and_a_store_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_released(tmp_path / "nowhere", 5)
    with pytest.raises(DataError, match="a folder without the files of a release. Give dataset_preproc.p"):
        read_released(tmp_path, 5)
    folder = write_arrays(tmp_path / "arrays")
    for what in ("dialog", "target", "emotion", "situation"):
        (folder / f"sys_{what}_texts.dev.npy").unlink()
    found = read_released(folder, 5)
    assert "the split dev" in found.missing and list(found.splits) == ["train", "test"]
    with pytest.raises(DataError, match="a part valid, of which there is no file"):
        import_release(settings(folder, tmp_path / "out.store", knowledge="bundled"))
    (folder / "sys_target_texts.test.npy").unlink()
    with pytest.raises(DataError, match="test has no field 'target'"):
        read_released(folder, 5)
    sorrow = [replace(TOY["valid"][0], emotion="anxiety")]
    path = written(tmp_path, case_pickle(dialogues=TOY | {"valid": sorrow}))
    assert "a usable example in dev" in read_released(path, 5).missing
    with pytest.raises(DataError, match="dev: no usable row .an emotion that is none of the 32"):
        import_release(settings(path, tmp_path / "out.store"))
    assert not (tmp_path / "out.store").exists()


def test_a_folder_with_both_is_read_by_its_pickle_which_is_said(tmp_path):
    written(write_arrays(tmp_path / "both"), case_pickle())
    found = read_released(tmp_path / "both", 5)
    assert "CASE" in found.layout
    assert any(".npy files beside" in note for report in found.material.reports for note in report.notes)


def test_the_same_file_gives_the_same_store_and_inspect_shows_it(tmp_path):
    path = written(tmp_path, case_pickle())
    first, again = (import_release(settings(path, tmp_path / name)) for name in ("a", "b"))
    assert first.fingerprint == again.fingerprint
    assert describe(first, "train", 0)
    other = import_release(settings(written(tmp_path, case_pickle(protocol=2)), tmp_path / "c"))
    assert {name: (other.path / name).read_bytes() for name in ("train.safetensors", "vocabulary.json", "texts.safetensors")} == {
        name: (first.path / name).read_bytes() for name in ("train.safetensors", "vocabulary.json", "texts.safetensors")}
