"""What `describe` says about a known example, and that `show` leaves nothing of it out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from case_fast.data.empathetic_dialogues import Turn
from case_fast.data.featurizer import FeatureSettings, Featurizer
from case_fast.data.inspect import describe, show
from case_fast.data.store import SplitWriter, Store, open_store, write_store
from case_fast.data.vocabulary import SPECIALS, Vocabulary
from case_fast.knowledge import RELATIONS

VOCABULARY = Vocabulary([*SPECIALS, *"my exam dog was lost . sad grim glad to pass study hard".split()])
SAID = "My exam. My dog!"
INFERENCES = {
    SAID: {"xIntent": ["to pass"], "xReact": ["sad"]},
    "My dog!": {"xWant": ["to study", "hard"], "xReact": ["glad", "sad"]},
}


def written(folder: Path, turns: list[Turn], response: str, settings: FeatureSettings | None = None, **source: str) -> Store:
    featurizer = Featurizer(VOCABULARY, {"exam": ["grim", "sad"], "dog": ["sad"]}, {"grim": 0.95, "sad": 0.9}, settings)
    texts, writer = featurizer.text_table(), SplitWriter()
    source = {"id": "c:1#4", "situation": "Bad luck."} | source
    writer.add(featurizer.example(turns, INFERENCES, texts, response, "sad", **source))
    manifest = {"counts": {"examples": {"train": 1}}, "knowledge": {"spec": "bundled", "cache": None}}
    write_store(folder, featurizer, texts, {"train": writer}, None, manifest)
    return open_store(folder)


TURNS = [Turn("The exam was zebra.", True), Turn("Sad.", False), Turn(SAID, True)]


def printed(store: Store, split: str = "train", index: int = 0, width: int = 300) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show(store, split, index, console)
    return console.file.getvalue()


def test_describe_tells_every_part_of_an_example(tmp_path):
    found = describe(written(tmp_path, TURNS, "So sad."), "train", 0)
    words = "<unk> exam was <unk> . sad . my exam . my dog <unk>".split()
    assert {name: found[name] for name in ("id", "situation", "emotion", "context", "by_speaker", "response", "words",
                                           "truncated_words", "unknown_words")} == {
        "id": "c:1#4", "situation": "Bad luck.", "emotion": "sad", "context": [turn.text for turn in TURNS],
        "by_speaker": [True, False, True], "response": "So sad.", "words": words, "truncated_words": 0, "unknown_words": 3,
    }
    nothing = {relation: [] for relation in RELATIONS}
    assert found["sub_utterances"] == [
        {"name": "u0", "text": SAID, "inferences": nothing | {"xIntent": ["to pass"], "xReact": ["sad"]}},
        {"name": "u1", "text": "My exam.", "inferences": nothing},
        {"name": "u2", "text": "My dog!", "inferences": nothing | {"xWant": ["to study", "hard"], "xReact": ["glad", "sad"]}},
    ]
    assert found["emotional_words"] == ["sad"] and found["feedback"] == ""
    assert found["concepts"] == [
        {"word": "grim", "intensity": 0.95, "of": ["exam"]},
        {"word": "sad", "intensity": 0.9, "of": ["exam", "dog"]},
    ]
    assert found["cognition_graph"] == {
        "vertices": ["u0", "u1", "u2", "to pass", "to study", "hard"],
        "edges": {
            "self": [(v, v) for v in range(6)], "global": [(0, 1), (0, 2)], "temporary": [(1, 2)],
            "xIntent": [(0, 3)], "xNeed": [], "xWant": [(2, 4), (2, 5)], "xEffect": [],
        },
    }
    graph = found["concept_graph"]
    assert graph["vertices"] == ["[CLS]", *words, "grim", "sad"]
    assert graph["edges"]["concept"] == [(2, 14), (2, 15), (9, 14), (9, 15), (12, 15)]
    assert graph["edges"]["global"] == [(0, v) for v in range(1, 16)]
    assert graph["edges"]["temporary"] == [(v, v + 1) for v in range(1, 13)]
    assert json.loads(json.dumps(found))["concepts"] == found["concepts"]  # plain values, ready for JSON


@pytest.mark.parametrize("width", [60, 120, 300])
def test_show_prints_every_part(tmp_path, width):
    store = written(tmp_path, TURNS, "So sad.")
    text = " ".join(printed(store, width=width).replace("│", " ").split())
    for part in ("train 0 of 1 · c:1#4 · sad", "situation Bad luck.", "speaker The exam was zebra.", "listener Sad.",
                 f"speaker {SAID}", "reply So sad.", "0 words cut off, 3 words not in the vocabulary", "u0 – u1, u0 – u2",
                 "u1 – u2", "u0 – to pass", "u2 – to study, u2 – hard", "exam – grim", "dog – sad",
                 "[CLS] with every other vertex", "6 vertices, 12 edges", "16 vertices, 48 edges"):
        assert part in text, part
    for word in ("to", "pass", "study", "hard", "glad", "0.950", "0.900", *RELATIONS):
        assert word in text


def test_show_prints_every_inference_of_the_sample(sample_store):
    for index in (0, 7, sample_store.size("test") - 1):
        text = printed(sample_store, "test", index, width=1000)
        found = describe(sample_store, "test", index)
        assert all(said in text for said in [*found["context"], found["response"], found["situation"]])
        for sub in found["sub_utterances"]:
            assert sub["text"] in text
            for relation, inferences in sub["inferences"].items():
                assert relation in text and all(inference in text for inference in inferences)
        assert all(f"{c['word']} " in text and ", ".join(c["of"]) in text for c in found["concepts"])


def test_brackets_in_a_text_are_no_markup(tmp_path):
    said = "I [bold]like[/] it [/red] [link=x]"
    store = written(tmp_path, [Turn(said, True)], said, situation="[/nothing] open", id="[/x]")
    text = printed(store)
    assert text.count(said) >= 3 and "[/nothing] open" in text and "[/x]" in text


def test_the_emptiest_example_can_be_shown(tmp_path):
    store = written(tmp_path, [Turn("", True)], "")
    found = describe(store, "train", 0)
    assert found["words"] == [] and found["concepts"] == [] and [sub["text"] for sub in found["sub_utterances"]] == ["", ""]
    assert "No emotional concepts." in printed(store)


def test_a_cut_context_is_said(tmp_path):
    store = written(tmp_path, TURNS, "", FeatureSettings(max_context=4))
    assert describe(store, "train", 0)["truncated_words"] == 9
    assert "9 words cut off, 1 words not in the vocabulary" in printed(store)
