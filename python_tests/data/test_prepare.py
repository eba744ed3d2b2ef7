"""From official files to a store: what it counts, what it refuses, and that an interrupted run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import real_store

from case_fast.data import prepare as module
from case_fast.data.empathetic_dialogues import SPLITS, listener_turns, read_conversations
from case_fast.data.featurizer import FeatureSettings, prompts
from case_fast.data.prepare import PrepareSettings, bundled, prepare
from case_fast.data.store import Store, open_store
from case_fast.data.text import tokenize
from case_fast.data.vocabulary import UNK
from case_fast.errors import ConfigError, DataError, Interrupted
from case_fast.knowledge import RELATIONS

HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
DIALOGUES = {
    "train": ["a,1,sad,Exam.,0,I failed my exam. My dog left!,,", "a,2,sad,Exam.,1,So sad.,,",
              "b,1,joyful,Dog.,0,My dog is back.,,", "b,2,joyful,Dog.,1,Happy dog!,,", "b,3,joyful,Dog.,0,Yes.,,",
              "b,4,joyful,Dog.,1,Hug the dog.,,"],
    "valid": ["c,1,sad,Exam.,0,My exam.,,", "c,2,sad,Exam.,1,Oh zebra.,,"],
    "test": ["d,1,angry,Dog.,0,My exam.,,", "d,2,angry,Dog.,1,My dog.,,"],
}
LEXICON = "\n".join(["sad\t0.05\t0.6\t0.2", "happy\t0.98\t0.8\t0.7", "exam\t0.4\t0.5\t0.5", "love\t1\t0.9\t0.5"])
CONCEPTNET = (
    '/a/1\t/r/RelatedTo\t/c/en/exam\t/c/en/sad\t{"weight": 2.0}\n'
    '/a/2\t/r/RelatedTo\t/c/en/happy\t/c/en/dog\t{"weight": 1.0}\n'
    '/a/3\t/r/RelatedTo\t/c/en/dog\t/c/en/love\t{"weight": 1.0}\n'
)
GLOVE = "dog 1 2\nzebra 3 4\nsad 5 6\nunheard 7 8\n"


class Source:
    """Answers every prompt from its text, counts what it is asked, and is interrupted after some calls."""

    identity, settings = "fake:1", {"answers": 2}

    def __init__(self, calls: int | None = None):
        self.calls, self.asked = calls, Counter()

    def infer(self, texts, relations, k):
        if self.calls is not None:
            if self.calls == 0:
                raise KeyboardInterrupt
            self.calls -= 1
        self.asked.update((text, relation) for text in texts for relation in relations)
        return [{r: [f"{r.lower()} {w}" for w in tokenize(text)[:2]][:k] for r in relations} for text in texts]


class Record:
    """The stages' names, their progress, and the lines they say."""

    def __init__(self):
        self.progress: dict[str, list[tuple[int, int]]] = {}
        self.lines: list[str] = []

    @contextmanager
    def stage(self, name):
        told = self.progress[name] = []
        yield lambda done, total: told.append((done, total))

    def report(self, line):
        self.lines.append(line)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareSettings:
    """Two conversations to train on, one to validate, one to test, and a source that answers everything."""
    folder = tmp_path / "in"
    folder.mkdir()
    for split, rows in DIALOGUES.items():
        (folder / f"{split}.csv").write_text("\n".join([HEADER, *rows, ""]))
    (folder / "lexicon.txt").write_text(LEXICON)
    (folder / "assertions.csv").write_text(CONCEPTNET)
    (folder / "glove.txt").write_text(GLOVE)
    monkeypatch.setattr(module, "open_source", lambda *_: Source())
    return PrepareSettings(str(folder), "atomic:x", str(folder / "assertions.csv"), str(folder / "lexicon.txt"),
                           str(tmp_path / "out.store"))


def changed(settings: PrepareSettings, **parts) -> PrepareSettings:
    return PrepareSettings(**(vars(settings) | parts))


def content(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.path.iterdir() if path.name != "manifest.json"}


# ---- what is in the store


def test_a_small_store_is_the_one_by_hand(inputs):
    record = Record()
    store = prepare(inputs, record)
    assert [store.size(split) for split in SPLITS] == [3, 1, 1]
    vocabulary = store.featurizer.vocabulary
    first = store.example("train", 0)
    assert vocabulary.decode(first.context) == "i failed my exam . my dog left !".split()
    assert vocabulary.decode(first.response) == "so sad .".split()
    subs = [store.texts.text(i) for i in first.sub_utterance]
    assert subs == ["I failed my exam. My dog left!", "I failed my exam.", "My dog left!"]
    assert [store.texts.text(i) for i in first.knowledge[:2]] == ["xintent i", "xintent failed"]
    assert [store.texts.text(i) for i in first.reaction] == ["xreact i", "xreact failed"] * 2 + ["xreact my", "xreact dog"]
    # love is no word of the training part, so that dog has one concept; exam's intensity is below 0.6
    assert [vocabulary.words[i] for i in first.concept] == ["happy", "sad"]
    assert first.concept_position.tolist() == [7, 4]
    assert vocabulary.decode(store.example("valid", 0).response) == "<unk> <unk> .".split()
    assert store.example("train", 2).source["id"] == "b#4"


def test_the_vocabulary_is_of_the_training_part_and_its_knowledge(inputs):
    store = prepare(inputs)
    train = read_conversations(inputs.dialogues, "train")[0]
    counts = Counter(word for c in train for turn in c.turns for word in tokenize(turn.text))  # each turn once
    subs = {sub for item in listener_turns(train) for sub in prompts(item.context)}
    answers = {text for sub in subs for texts in Source().infer([sub], RELATIONS, 5)[0].values() for text in texts}
    counts.update(word for text in answers for word in tokenize(text))  # each text once
    expected = sorted(counts, key=lambda word: (-counts[word], word))
    assert store.featurizer.vocabulary.words[8:] == tuple(expected)
    for least in (2, 3):
        kept = tuple(word for word in expected if counts[word] >= least)
        again = prepare(changed(inputs, min_count=least))
        assert again.featurizer.vocabulary.words[8:] == kept


def test_the_manifest_says_where_it_comes_from(inputs, tmp_path):
    record = Record()
    store = prepare(inputs, record)
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest == store.manifest and manifest["fingerprint"] == store.fingerprint
    counts = manifest["counts"]
    assert counts["examples"] == {"train": 3, "valid": 1, "test": 1}
    assert counts["conversations"] == {"train": 2, "valid": 1, "test": 1}
    assert counts["vocabulary"] == len(store.featurizer.vocabulary) and counts["distinct_texts"] == len(store.texts)
    for split in SPLITS:
        examples = [store.example(split, i) for i in range(store.size(split))]
        assert counts["context_words"][split] == sum(len(e.context) for e in examples)
        assert counts["response_words"][split] == sum(len(e.response) for e in examples)
        assert counts["knowledge_vertices"][split] == sum(len(e.knowledge) for e in examples)
        assert counts["concept_vertices"][split] == sum(len(e.concept) for e in examples)
        words = np.concatenate([e.response for e in examples])
        assert counts["unknown_response_words"][split] == pytest.approx((words == UNK).mean())
    assert counts["unknown_response_words"]["valid"] == pytest.approx(2 / 3) and counts["truncated_contexts"] == 0
    assert manifest["settings"]["dialogues"] == inputs.dialogues and manifest["settings"]["features"]["max_context"] == 512
    knowledge = manifest["knowledge"]
    assert knowledge["identity"] == "fake:1" and knowledge["settings"] == {"answers": 2}
    assert knowledge["spec"] == f"atomic:{Path('x').resolve()}"  # for chat, from any folder
    assert Path(knowledge["cache"]) == (tmp_path / "out.store.knowledge.sqlite").resolve()
    assert [Path(source["path"]).name for source in manifest["sources"]] == [
        "train.csv", "valid.csv", "test.csv", "lexicon.txt", "assertions.csv",
    ]
    # every reader's summary is said as well, and bars come to their end
    assert all(any(line.startswith(source["path"]) for line in record.lines) for source in manifest["sources"])
    for name in ("Packing", "Reading ConceptNet", f"Inferring commonsense for {counts['distinct_prompts']} texts"):
        done, total = record.progress[name][-1]
        assert done == total > 0


def test_skipped_rows_are_in_the_manifest(inputs):
    path = Path(inputs.dialogues) / "train.csv"
    path.write_text(path.read_text() + "bad row\n")
    record = Record()
    store = prepare(inputs, record)
    assert store.manifest["sources"][0]["lines"] == {"not 8 or 9 fields": [8]}
    assert any("skipped 1 (not 8 or 9 fields; line 8)" in line for line in record.lines)


def test_cut_contexts_are_said(inputs):
    record = Record()
    store = prepare(changed(inputs, features=FeatureSettings(max_context=5)), record)
    assert store.manifest["counts"]["truncated_contexts"] == 2
    assert "2 contexts cut to their latest 5 words" in record.lines
    assert all(len(store.example("train", i).context) <= 5 for i in range(3))


def test_limit_counts_conversations_of_each_split(inputs):
    store = prepare(changed(inputs, limit=1))
    assert [store.size(split) for split in SPLITS] == [1, 1, 1]
    assert store.manifest["counts"]["conversations"] == {"train": 1, "valid": 1, "test": 1}


def test_word_vectors_are_stored_and_their_coverage_said(inputs):
    record = Record()
    store = prepare(changed(inputs, embeddings=str(Path(inputs.dialogues) / "glove.txt")), record)
    ids, vectors = store.embeddings()
    words = store.featurizer.vocabulary.decode(ids.tolist())
    assert dict(zip(words, vectors.tolist(), strict=True)) == {"dog": [1, 2], "sad": [5, 6]} and ids.dtype == torch.int32
    size = len(store.featurizer.vocabulary)
    assert store.manifest["counts"]["embedding_coverage"] == pytest.approx(2 / size)
    assert f"word vectors cover 2 of {size} words ({200 / size:.1f} %)" in record.lines
    assert prepare(inputs).embeddings() is None


ONE_SIDED = {
    "one turn": ["z,1,sad,p,0,Alone.,,"],
    "one author": ["z,1,sad,p,5,Alone.,,", "z,2,sad,p,5,Still.,,"],
    "two such": ["z,1,sad,p,5,Alone.,,", "z,2,sad,p,5,Still.,,", "y,1,sad,p,0,Me too.,,"],
    "the turns do not start": ["z,3,sad,p,0,Alone.,,", "z,4,sad,p,1,Still.,,"],
    "every answer has a comma": ["z,1,sad,p,0,Alone.,,", "z,2,sad,p,1,Oh, no.,,"],
    "every answer is blank": ["z,1,sad,p,0,Alone.,,", "z,2,sad,p,1, ,,"],
    "no rows": [],
}


@pytest.mark.parametrize("part", SPLITS)
@pytest.mark.parametrize("case", ONE_SIDED)
def test_a_part_without_an_example_is_refused_by_name(inputs, part, case):
    (Path(inputs.dialogues) / f"{part}.csv").write_text("\n".join([HEADER, *ONE_SIDED[case]]) + "\n")
    with pytest.raises(DataError, match=rf"{part}\.csv: no usable row .*Expected conversations of at least two people"):
        prepare(inputs)
    assert not Path(inputs.out).exists()


def test_emotion_words_are_those_of_the_list_and_saved_with_the_featurizer(inputs, tmp_path):
    emolex = tmp_path / "emolex.txt"
    emolex.write_text("dog\tjoy\t1\nzebra\tfear\t0\nthe\tjoy\t1\n")  # zebra is no word of the vocabulary, the no content word
    for given, said in ((None, ["happy"]), (str(emolex), ["dog"])):
        store = prepare(changed(inputs, emotion_words=given, out=str(tmp_path / f"{given is None}.store")))
        words = store.featurizer.vocabulary.decode
        first = store.batch("train", [0, 1])
        found = {word for word in words(first.emotional.word.tolist()) if word != "<sep>"}
        assert found == ({"exam"} if given is None else {"dog"})
        assert first.feedback.dialogue.tolist() == [1] and words(first.feedback.word.tolist()) == ["yes", "."]
        assert words(first.target[first.feedback.reply].tolist()) == ["happy", "dog", "!", "<eos>"]
        assert words(first.target[first.feedback.reply_emotional].tolist()) == said
        assert store.example("train", 1).source["feedback"] == "Yes." and store.manifest["counts"]["feedback_words"]["train"] == 2
        assert store.featurizer.emotional.listed == (None if given is None else ["dog", "zebra", "the"])
    assert any(source["path"] == str(emolex) and source["rows"] == 3 for source in store.manifest["sources"])


# ---- the same inputs give the same store


def test_the_bundled_sample_is_prepared_the_same_twice(sample_store, tmp_path):
    again = prepare(PrepareSettings("bundled", "bundled", "bundled", "bundled", str(tmp_path / "again")))
    assert content(again) == content(sample_store) and again.fingerprint == sample_store.fingerprint
    assert again.manifest["bundled"] is True and again.knowledge["spec"] == "bundled"


def test_hash_seeds_and_processes_do_not_matter(tmp_path):
    settings = PrepareSettings("bundled", "bundled", "bundled", "bundled", str(tmp_path / "a"), limit=12)
    here = prepare(settings).fingerprint
    code = (
        "import sys; from case_fast.data.prepare import *; b = 'bundled'; "
        "print(prepare(PrepareSettings(b, b, b, b, sys.argv[1], limit=12)).fingerprint)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "17", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == here, found.stderr


def test_another_input_is_another_fingerprint(inputs, tmp_path):
    glove = str(Path(inputs.dialogues) / "glove.txt")
    variants = [{}, {"limit": 1}, {"min_count": 2}, {"embeddings": glove}, {"features": FeatureSettings(concepts_per_dialogue=1)},
                {"features": FeatureSettings(inferences_per_relation=1)}]
    prints = [prepare(changed(inputs, **variant)).fingerprint for variant in variants]
    assert len(set(prints)) == len(prints)
    assert prepare(changed(inputs, out=str(tmp_path / "elsewhere"))).fingerprint == prints[0]


# ---- interrupted


def test_ctrl_c_keeps_the_cache_and_the_next_run_asks_for_the_rest(tmp_path, monkeypatch):
    out = tmp_path / "out.store"
    settings = PrepareSettings("bundled", "bundled", "bundled", "bundled", str(out), limit=25)
    sources = [Source(calls=2), Source(), Source()]
    for place, source in enumerate(sources):
        monkeypatch.setattr(module, "open_source", lambda *_, source=source: source)
        if place == 0:
            with pytest.raises(Interrupted, match=r"out\.store\.knowledge\.sqlite has the inferences so far"):
                prepare(settings)
            assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["out.store.knowledge.sqlite"]
        else:
            store = prepare(settings)
    first, second, third = (source.asked for source in sources)
    subs = {sub for split in SPLITS for item in listener_turns(read_conversations(bundled("dialogues"), split, 25)[0])
            for sub in prompts(item.context)}
    assert first and second and not first.keys() & second.keys()
    assert first + second == Counter((sub, relation) for sub in subs for relation in RELATIONS)
    assert not third
    monkeypatch.setattr(module, "open_source", lambda *_: Source())
    assert prepare(changed(settings, out=str(tmp_path / "whole"))).fingerprint == store.fingerprint


def test_a_cache_may_lie_where_one_says(inputs, tmp_path):
    cache = tmp_path / "caches" / "k.sqlite"
    store = prepare(changed(inputs, cache=str(cache)))
    assert cache.is_file() and Path(store.knowledge["cache"]) == cache
    assert not (tmp_path / "out.store.knowledge.sqlite").exists()


# ---- replacing what is there


def test_an_old_store_is_replaced(inputs, tmp_path):
    old = prepare(changed(inputs, limit=1))
    example = old.example("train", 0).context.tolist()
    new = prepare(inputs)
    assert [new.size("train"), open_store(inputs.out).size("train"), old.size("train")] == [3, 3, 1]
    assert old.example("train", 0).context.tolist() == example  # who has it open reads on
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.store", "out.store.knowledge.sqlite"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_store(inputs, tmp_path, monkeypatch, error):
    before = content(prepare(inputs))
    write_store = module.write_store

    def broken(folder, *parts):
        write_store(folder, *parts)
        (folder / "manifest.json").unlink()
        raise error

    monkeypatch.setattr(module, "write_store", broken)
    with pytest.raises(type(error)):
        prepare(changed(inputs, limit=1))
    assert content(open_store(inputs.out)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.store", "out.store.knowledge.sqlite"]


def test_a_store_of_an_older_format_may_be_replaced(inputs):
    out = Path(inputs.out)
    out.mkdir()
    (out / "words.bin").touch()
    (out / "manifest.json").write_text('{"format": "case_fast store 0", "files": {"words.bin": ""}}')
    assert prepare(inputs).size("train") == 3 and not (out / "words.bin").exists()


def run_folder(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text('{"command": "train", "versions": {}}')


OTHERS = {
    "a folder with a file": lambda out: (out.mkdir(), (out / "thesis.tex").touch()),
    "a training run": run_folder,
    "a folder whose manifest is a list": lambda out: (out.mkdir(), (out / "manifest.json").write_text("[]")),
    "a folder whose manifest is broken": lambda out: (out.mkdir(), (out / "manifest.json").write_text("{")),
    "another program's format": lambda out: (out.mkdir(), (out / "manifest.json").write_text('{"format": 3, "files": {}}')),
    "a file": lambda out: out.write_text("x"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_not_replaced(inputs, case):
    out = Path(inputs.out)
    OTHERS[case](out)
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(ConfigError, match=r"--out .*out\.store is there and is no store; give another folder"):
        prepare(inputs)
    assert sorted(out.parent.rglob("*")) == before


def test_a_store_with_other_files_in_it_is_not_replaced(inputs):
    store = prepare(inputs)
    (store.path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt in it is no part of it"):
        prepare(inputs)
    assert (store.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("cache", ["out.store/k.sqlite", "out.store", "in/../out.store/deep/k.sqlite"])
def test_a_cache_inside_the_store_would_be_lost_with_it(inputs, tmp_path, cache):
    with pytest.raises(ConfigError, match=r"--cache .* lies in --out"):
        prepare(changed(inputs, cache=str(tmp_path / cache)))
    assert not Path(inputs.out).exists()


def test_an_empty_folder_and_the_present_one_may_be_used(inputs, tmp_path, monkeypatch):
    Path(inputs.out).mkdir()
    assert prepare(inputs).size("train") == 3
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert prepare(changed(inputs, out=".")).path == here
    assert (tmp_path / "here.knowledge.sqlite").is_file()


# ---- arguments that cannot work


@pytest.mark.parametrize("part", ["dialogues", "conceptnet", "lexicon", "embeddings", "emotion_words"])
def test_a_missing_input_is_named_before_the_long_work(inputs, tmp_path, monkeypatch, part):
    source = Source()
    monkeypatch.setattr(module, "open_source", lambda *_: source)
    missing = tmp_path / "nowhere" / part
    with pytest.raises(DataError) as caught:
        prepare(changed(inputs, **{part: str(missing)}))
    assert str(caught.value).startswith(f"{missing}: ") and "not found" in str(caught.value)
    assert not source.asked and not Path(inputs.out).exists()


@pytest.mark.parametrize("part", ["conceptnet", "lexicon", "embeddings", "emotion_words"])
def test_a_folder_for_a_file_is_named(inputs, tmp_path, part):
    with pytest.raises(DataError, match=f"^{tmp_path}: .* is a folder, not a file"):
        prepare(changed(inputs, **{part: str(tmp_path)}))


def test_a_missing_split_is_named(inputs):
    (Path(inputs.dialogues) / "test.csv").unlink()
    with pytest.raises(DataError, match=r"test\.csv: file of the split not found"):
        prepare(inputs)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [("atomic:nowhere.tsv", DataError, r"nowhere\.tsv: .*not found"), ("magic", ConfigError, "'magic' is not a source"),
     ("comet:", ConfigError, "'comet:' is not a source")],
)
def test_knowledge_that_cannot_be_opened_is_named(inputs, monkeypatch, spec, error, message):
    monkeypatch.undo()
    with pytest.raises(error, match=message):
        prepare(changed(inputs, knowledge=spec))
    assert not Path(inputs.out).exists()


@pytest.mark.parametrize("setting", [{"limit": 0}, {"limit": -1}, {"min_count": 0}])
def test_impossible_settings_are_named(inputs, setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} must be at least 1"):
        changed(inputs, **setting)


# ---- the real files


def test_real_data_are_prepared(real_data, tmp_path):
    store = real_store(real_data, tmp_path, limit=60)
    counts = store.manifest["counts"]
    assert counts["conversations"] == dict.fromkeys(SPLITS, 60) | {"train": 59} and counts["vocabulary"] > 500
    assert all(counts["knowledge_vertices"][split] and counts["concept_vertices"][split] for split in SPLITS)
    assert [source["skipped"] for source in store.manifest["sources"][:3]] == [{"in a conversation of one author": 1}, {}, {}]
    batch = store.batch("train", range(store.size("train")))
    assert int(batch.context.max()) < counts["vocabulary"] and int(batch.emotion.max()) < 32
