"""From a dialogue's texts to its example: every choice of docs/paper.md that the featurizer makes."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from case_fast.data.empathetic_dialogues import EMOTIONS, Turn
from case_fast.data.featurizer import FeatureSettings, Featurizer, TextTable, prompts, sub_utterances
from case_fast.data.graphs import CONCEPT, CSR
from case_fast.data.vocabulary import CLS, LISTENER, SPEAKER, SPECIALS, UNK, Vocabulary
from case_fast.errors import ConfigError, DataError

WORDS = "my exam dog cat was lost sad . ! glad grim the a b c d e f g h i j k l".split()
VOCABULARY = Vocabulary([*SPECIALS, *WORDS])
CONCEPTS = {"exam": ["grim", "sad"], "dog": ["glad", "sad"], "the": ["glad"]}
INTENSITY = {"grim": 0.95, "sad": 0.9, "glad": 0.8, "lost": 0.7, "exam": 0.3, "was": -0.1}
ID = VOCABULARY.ids


def featurizer(concepts=CONCEPTS, intensity=INTENSITY, **changed) -> Featurizer:
    return Featurizer(VOCABULARY, concepts, intensity, FeatureSettings(**changed))


def example(turns: list[str], inferences=None, response="", emotion=None, made=None, texts=None):
    """Speaker and listener by turns, the speaker first."""
    texts = TextTable(VOCABULARY) if texts is None else texts
    context = [Turn(text, place % 2 == 0) for place, text in enumerate(turns)]
    return (made or featurizer()).example(context, inferences or {}, texts, response, emotion, id="x", situation="s"), texts


def words(ids) -> list[str]:
    return VOCABULARY.decode(ids)


# ---- context


def test_each_context_word_has_its_role_and_intensity():
    found, _ = example(["My exam was lost.", "Sad!", "The zebra."])
    assert words(found.context) == "my exam was lost . sad ! the <unk> .".split()
    assert found.context_role.tolist() == [SPEAKER] * 5 + [LISTENER] * 2 + [SPEAKER] * 3
    expected = [0, 0.3, -0.1, 0.7, 0, 0.9, 0, 0, 0, 0]  # a word not in the lexicon has 0
    assert found.context_intensity.tolist() == pytest.approx(expected) and found.context_intensity.dtype == np.float32
    assert found.truncated == 0 and CLS not in found.context


def test_intensity_of_a_word_outside_the_vocabulary_is_the_lexicons():
    assert example(["zebra"], made=featurizer(intensity={"zebra": 0.5}, concepts={}))[0].context_intensity.tolist() == [0.5]


def test_the_latest_words_are_kept_and_the_cut_is_reported():
    turns = ["a b c .", "d e", "f g h . i j"]  # 4 + 2 + 6 words
    whole, _ = example(turns)
    for most in range(1, 15):
        cut, _ = example(turns, made=featurizer(max_context=most))
        assert cut.truncated == max(0, 12 - most)
        assert cut.context.tolist() == whole.context.tolist()[-most:]
        assert cut.context_role.tolist() == whole.context_role.tolist()[-most:]
        assert len(cut.concept_graph.indptr) - 1 == 1 + min(most, 12)
    assert example(turns, made=featurizer(max_context=12))[0].truncated == 0


def test_the_cut_leaves_sub_utterances_whole():
    found, texts = example(["my dog . my cat ."], made=featurizer(max_context=1))
    assert [texts.text(i) for i in found.sub_utterance] == ["my dog . my cat .", "my dog .", "my cat ."]


def test_concepts_of_cut_words_are_gone():
    found, _ = example(["exam . my dog"], made=featurizer(max_context=1))
    assert words(found.concept) == ["sad", "glad"] and found.concept_position.tolist() == [1, 1]


def test_response_has_no_special_tokens():
    found, _ = example(["a"], response="The dog was GLAD, zebra.")
    assert words(found.response) == "the dog was glad <unk> <unk> .".split()
    assert example(["a"], response="")[0].response.shape == (0,)


def test_emotion_is_the_index_of_the_fixed_order():
    assert [example(["a"], emotion=emotion)[0].emotion for emotion in EMOTIONS] == list(range(32))
    assert example(["a"])[0].emotion == -1


def test_source_keeps_the_texts():
    found, _ = example(["My exam.", "Sad!"], response="Oh.", emotion="sad")
    assert found.source == {"id": "x", "situation": "s", "emotion": "sad", "context": ["My exam.", "Sad!"],
                            "by_speaker": [True, False], "response": "Oh.", "feedback": ""}


# ---- sub-utterances


def test_sub_utterances_are_the_whole_and_its_sentences():
    assert sub_utterances("I  failed. So sad!") == ["I failed. So sad!", "I failed.", "So sad!"]
    assert sub_utterances("I failed.") == ["I failed.", "I failed."]  # t >= 1: u_0 = u_1
    assert sub_utterances("") == ["", ""]


def test_prompts_are_of_the_last_speaker_turn():
    context = [Turn("One. Two.", True), Turn("Three.", False), Turn("Four. Five.", True), Turn("Six. Seven.", False)]
    assert prompts(context) == ["Four. Five.", "Four.", "Five."]
    with pytest.raises(ValueError, match="at least one turn of the speaker"):
        prompts([Turn("Six.", False)])
    with pytest.raises(ValueError):
        prompts([])


def test_one_sentence_gives_two_sub_utterances_of_one_text():
    found, texts = example(["my exam was lost ."])
    assert found.sub_utterance.tolist() == [0, 0] and len(texts) == 1
    assert words(texts.tokens(0)) == "my exam was lost .".split()
    assert len(found.cognition_graph.indptr) - 1 == 2


# ---- knowledge


def test_knowledge_is_ordered_by_sub_utterance_and_relation():
    whole, one, two = sub_utterances("my exam . my dog .")
    inferences = {
        whole: {"xIntent": ["a", "b"], "xEffect": ["c"], "xReact": ["sad"]},
        two: {"xNeed": ["a"], "xWant": ["d"], "xReact": ["glad", "sad"], "xIntent": []},
        "another text": {"xIntent": ["k"]},
    }
    found, texts = example(["a", "b", whole], inferences)
    rows = [(texts.text(t), int(s), int(r)) for t, s, r in
            zip(found.knowledge, found.knowledge_sub, found.knowledge_relation, strict=True)]
    assert rows == [("a", 0, 0), ("b", 0, 0), ("c", 0, 3), ("a", 2, 1), ("d", 2, 2)]
    reactions = [(texts.text(t), int(s)) for t, s in zip(found.reaction, found.reaction_sub, strict=True)]
    assert reactions == [("sad", 0), ("glad", 2), ("sad", 2)]
    # u_0, u_1, u_2, then the five inferences; relations 3 .. 6 join them to their sub-utterance
    edges = Counter(found.cognition_graph.edges())
    for vertex, (_, sub, relation) in enumerate(rows, start=3):
        assert edges[sub, vertex, 3 + relation] == edges[vertex, sub, 3 + relation] == 1
    assert len(texts) == len({whole, one, two, "a", "b", "c", "d", "sad", "glad"})  # a text is stored once


def test_inferences_are_limited_per_sub_utterance_and_relation():
    many = list("abcdefgh")
    whole, one, two = sub_utterances("my exam . my dog .")
    inferences = {sub: {r: many for r in ("xIntent", "xNeed", "xWant", "xEffect", "xReact")} for sub in (whole, one, two)}
    for limit in (1, 3, 5, 20):
        found, texts = example([whole], inferences, made=featurizer(inferences_per_relation=limit))
        kept = min(limit, 8)
        count = Counter(zip(found.knowledge_sub.tolist(), found.knowledge_relation.tolist(), strict=True))
        assert count == {(sub, relation): kept for sub in range(3) for relation in range(4)}
        assert [texts.text(i) for i in found.knowledge[:kept]] == many[:kept]  # the first ones, in order
        assert Counter(found.reaction_sub.tolist()) == dict.fromkeys(range(3), kept)
    assert FeatureSettings().inferences_per_relation == 5


def test_without_knowledge_the_parts_are_empty():
    found, _ = example(["a b"], {"a b": {}})
    for part in (found.knowledge, found.knowledge_sub, found.knowledge_relation, found.reaction, found.reaction_sub):
        assert part.shape == (0,) and part.dtype == np.int32


# ---- concepts


def test_concepts_are_joined_to_every_occurrence():
    found, _ = example(["my exam . the exam", "dog", "cat"])
    # by intensity: grim 0.95 (exam), sad 0.9 (exam, dog), glad 0.8 (dog; "the" is a stop word)
    assert words(found.concept) == ["grim", "sad", "glad"]
    assert found.concept_intensity.tolist() == pytest.approx([0.95, 0.9, 0.8])
    assert found.concept_position.tolist() == [2, 2, 6]  # of the first token, [CLS] is 0
    first = 1 + 7
    joined = sorted((a, b) for a, b, relation in found.concept_graph.edges() if relation == CONCEPT and a < b)
    assert joined == [(2, first), (2, first + 1), (5, first), (5, first + 1), (6, first + 1), (6, first + 2)]


def test_at_most_three_concepts_a_token():
    concepts = {"exam": list("abcde")}
    intensity = dict.fromkeys("abcde", 0.9)
    assert words(example(["exam"], made=featurizer(concepts, intensity))[0].concept) == list("abc")
    assert words(example(["exam"], made=featurizer(concepts, intensity, concepts_per_token=1))[0].concept) == ["a"]


def test_at_most_ten_concepts_a_dialogue_by_intensity_then_word():
    heads = ["exam", "dog", "cat", "lost", "sad"]
    tails = [list("cba"), list("fed"), list("ihg"), list("ljk"), ["glad", "grim", "my"]]
    intensity = dict.fromkeys("abcdefghijkl", 0.7) | {"glad": 0.8, "grim": 0.9, "my": 0.6, "l": 0.71}
    concepts = dict(zip(heads, tails, strict=True))
    found, _ = example([" ".join(heads)], made=featurizer(concepts, intensity))
    assert words(found.concept) == ["grim", "glad", "l", *"abcdefg"]  # 0.9, 0.8, 0.71, then ties by word
    assert found.concept_position.tolist() == [5, 5, 4, 1, 1, 1, 2, 2, 2, 3]
    few, _ = example([" ".join(heads)], made=featurizer(concepts, intensity, concepts_per_dialogue=2))
    assert words(few.concept) == ["grim", "glad"] and few.concept_position.tolist() == [5, 5]
    none, _ = example([" ".join(heads)], made=featurizer(concepts, intensity, concepts_per_dialogue=0))
    assert none.concept.shape == (0,) and len(none.concept_graph.indptr) - 1 == 6


def test_a_concept_that_is_a_context_word_is_a_vertex_of_its_own():
    found, _ = example(["exam sad"])
    assert words(found.concept) == ["grim", "sad"] and len(found.concept_graph.indptr) - 1 == 1 + 2 + 2


def test_without_concepts_the_parts_are_empty():
    found, _ = example(["the cat"])
    assert found.concept.shape == found.concept_position.shape == found.concept_intensity.shape == (0,)


# ---- any dialogue


@pytest.mark.parametrize("count", [0, 1, 2, 511, 512, 513, 2000])
def test_contexts_of_any_length_are_cut_to_512_words(count):
    said = " ".join(random.Random(count).choices([*WORDS, "zebra"], k=count))
    found, _ = example([said])
    total = len(example([said], made=featurizer(max_context=10**6))[0].context)
    assert len(found.context) == min(total, 512) and found.truncated == max(0, total - 512)


@settings(max_examples=100, deadline=None)
@given(turns=st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_text_gives_a_sound_example(turns):
    found, texts = example(turns)
    n, c = len(found.context), len(found.concept)
    assert len(found.context_role) == len(found.context_intensity) == n
    assert len(found.concept_graph.indptr) == 1 + n + c + 1
    assert len(found.sub_utterance) >= 2 and found.sub_utterance.max() < len(texts)
    assert ((found.concept_position >= 1) & (found.concept_position <= n)).all()
    for name in ("context", "response", "concept"):
        ids = getattr(found, name)
        assert ((ids >= 0) & (ids < len(VOCABULARY))).all()


@pytest.mark.parametrize(
    "setting",
    [{"max_context": 0}, {"inferences_per_relation": 0}, {"concepts_per_token": 0}, {"concepts_per_dialogue": -1},
     {"max_context": "9"}, {"max_context": 1.5}, {"concepts_per_token": None}],
)
def test_impossible_settings_are_named(setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} must be a whole number of at least [01], not"):
        FeatureSettings(**setting)


# ---- on disk


def test_saved_and_loaded_it_makes_the_same_examples(tmp_path):
    made = featurizer(max_context=7, minimum_intensity=0.5)
    made.save(tmp_path / "f")
    loaded = Featurizer.load(tmp_path / "f")
    assert loaded.vocabulary.words == VOCABULARY.words and loaded.settings == made.settings
    assert loaded.concepts == CONCEPTS and loaded.intensity == INTENSITY
    assert loaded.emotional.listed is None and loaded.emotional.known.tolist() == made.emotional.known.tolist()
    Featurizer(VOCABULARY, {}, INTENSITY, emotion_words=["dog", "unheard"]).save(tmp_path / "g")
    assert Featurizer.load(tmp_path / "g").emotional.listed == ["dog", "unheard"]
    before, _ = example(["my exam was the dog . lost zebra !"], made=made)
    after, _ = example(["my exam was the dog . lost zebra !"], made=loaded)
    for name, value in vars(before).items():
        other = getattr(after, name)
        if isinstance(value, CSR):
            assert value.edges() == other.edges()
        else:
            assert np.array_equal(value, other), name


def changed(**parts) -> str:
    return json.dumps({"settings": {}, "concepts": CONCEPTS, "intensity": INTENSITY} | parts)


DAMAGED = {
    "empty": "",
    "cut short": changed()[:-20],
    "a list": "[]",
    "null": "null",
    "no settings": json.dumps({"concepts": {}, "intensity": {}}),
    "no concepts": json.dumps({"settings": {}, "intensity": {}}),
    "no intensity": json.dumps({"settings": {}, "concepts": {}}),
    "unknown setting": changed(settings={"colour": 1}),
    "impossible setting": changed(settings={"max_context": 0}),
    "setting of another kind": changed(settings={"max_context": "512"}),
    "settings as a list": changed(settings=[512]),
    "concepts as a list": changed(concepts=["sad"]),
    "concepts as text": changed(concepts={"exam": "sad"}),
    "concept outside the vocabulary": changed(concepts={"exam": ["zebra"]}),
    "concept without intensity": changed(concepts={"exam": ["my"]}),
    "concept that is no word": changed(concepts={"exam": [["sad"]]}),
    "intensity as text": changed(intensity=INTENSITY | {"sad": "0.9"}),
    "intensity NaN": changed(intensity=INTENSITY | {"sad": float("nan")}),
    "intensity infinite": changed(intensity=INTENSITY | {"sad": float("inf")}),
    "intensity of 400 digits": changed(intensity=INTENSITY | {"sad": 10**400}),
    "intensity as a list": changed(intensity=[0.9]),
    "emotion words as text": changed(emotion_words="sad"),
    "an emotion word that is none": changed(emotion_words=["sad", 3]),
    "nested 200 000 deep": '{"a":' * 200_000,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_a_typed_error(tmp_path, case):
    featurizer().save(tmp_path)
    path = tmp_path / "features.json"
    path.write_text(DAMAGED[case], encoding="utf-8")
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        Featurizer.load(tmp_path)
    assert time.monotonic() - began < 1
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith("Prepare the store again.")


def test_missing_parts_are_named(tmp_path):
    featurizer().save(tmp_path)
    (tmp_path / "features.json").unlink()
    with pytest.raises(DataError, match=r"features\.json: feature file not found"):
        Featurizer.load(tmp_path)
    with pytest.raises(DataError, match=r"vocabulary\.json: vocabulary not found"):
        Featurizer.load(tmp_path / "nowhere")


def test_unknown_words_are_unk():
    assert example(["zebra Zebra"])[0].context.tolist() == [UNK, UNK]
