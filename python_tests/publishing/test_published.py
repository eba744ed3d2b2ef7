"""The folder of a published model: what is not in it, what puts that back, and what is said where it cannot be."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from case_fast import cli, published
from case_fast.data import Featurizer
from case_fast.data.prepare import bundled
from case_fast.errors import CaseFastError, CheckpointError, ConfigError, DataError
from case_fast.knowledge import VADLexicon
from case_fast.models import MODELS, DialogueModel, build, load
from case_fast.runs import load_features, load_model
from case_fast.serving import load as load_responder

LEXICON = bundled("lexicon")
KNOWLEDGE = {"spec": "atomic:/where/it/lay", "cache": "/where/it/lay.sqlite", "identity": "atomic:1234", "settings": {"n": 10}}
EMOLEX = ["sad", "joy", "grief"]


def made(folder: Path, featurizer: Featurizer, name: str = "case", listed: list[str] | None = None) -> DialogueModel:
    """Publish a new small model; its featurizer's emotional words are ``listed``."""
    torch.manual_seed(0)
    model = build(name, vocab_size=len(featurizer.vocabulary), d_model=8, ffn=8)
    whole = Featurizer(featurizer.vocabulary, featurizer.concepts, featurizer.intensity, featurizer.settings, listed)
    folder.mkdir()
    features = published.without_lexicons(whole, KNOWLEDGE, model.needs)
    published.write(folder, model, whole.vocabulary, features, {}, "# card\n")
    return model


@pytest.fixture(scope="module")
def featurizer(sample_store) -> Featurizer:
    return sample_store.featurizer


@pytest.fixture(scope="module")
def folder(featurizer, tmp_path_factory) -> Path:
    """CASE, published; read only."""
    out = tmp_path_factory.mktemp("published") / "case"
    made(out, featurizer)
    return out


@pytest.fixture
def emolex(tmp_path) -> Path:
    path = tmp_path / "emolex.txt"
    path.write_text("".join(f"{word}\tanger\t0\n" for word in EMOLEX))
    return path


def size(featurizer: Featurizer) -> int:
    return len(featurizer.vocabulary)


# ---- what is not in it


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield value


def test_no_file_holds_an_intensity_or_tells_which_is_the_greater(folder, featurizer):
    assert {path.name for path in folder.iterdir()} == set(published.FILES)
    features = json.loads((folder / "features.json").read_text())
    assert set(features) == {"format", "settings", "concepts", "left_out", "knowledge"}
    counts = [*numbers(features["settings"]), *numbers(KNOWLEDGE["settings"]), len(featurizer.intensity)]
    assert sorted(numbers(features)) == sorted(counts)
    assert all(words == sorted(words) for words in features["concepts"].values())
    lists = [words for words in featurizer.concepts.values() if words != sorted(words)]
    assert lists, "in the run they do stand by intensity"
    said = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md"))
    distinct = {f"{value:.3f}" for value in featurizer.intensity.values() if value > 0}
    assert len(distinct) > 300 and not [value for value in distinct - {"0.600"} if value in said]


@pytest.mark.parametrize("name", MODELS)
def test_of_the_weights_only_words_and_their_counts_have_a_row_a_word(name):
    """A lexicon's values would be another tensor of the vocabulary's length: EmpDG's discriminators embed words too."""
    words = 1009  # prime, and no width
    model = build(name, vocab_size=words, d_model=8, ffn=8)
    found = {key for key, value in model.state_dict().items() if words in value.shape}
    embeddings = {key for key in found if key.endswith("embedding.weight")}
    learnt = {"output.weight", "output.bias", "eta.2.weight", "eta.2.bias"}  # eta: of L_BOW
    assert found - embeddings - learnt <= {"word_counts"} and "embedding.weight" in embeddings
    assert "word_counts" not in found or not model.word_counts.is_floating_point()


def test_no_place_of_this_machine_is_told(folder):
    said = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md"))
    assert "/where" not in said and str(Path.home()) not in said


# ---- what puts it back


def test_with_the_lexicon_the_featurizer_is_that_of_the_run(folder, featurizer):
    found, knowledge = load_features(folder, size(featurizer), LEXICON)
    assert found.vocabulary.words == featurizer.vocabulary.words and found.settings == featurizer.settings
    assert found.intensity == featurizer.intensity and list(found.concepts.items()) == list(featurizer.concepts.items())
    assert (found.emotional.known == featurizer.emotional.known).all()
    assert knowledge == {"spec": "atomic", "identity": "atomic:1234", "settings": {"n": 10}}
    assert load_features(folder, size(featurizer), "bundled")[0].intensity == featurizer.intensity


def rows() -> list[list[str]]:
    return [line.split("\t") for line in LEXICON.read_text().splitlines()]


LAYOUTS: dict[str, Callable[[], list[list[str]]]] = {
    "as published": rows,
    "without a header": lambda: rows()[1:],
    "other columns": lambda: [[d, w, a, v] for w, v, a, d in rows()],
    "more columns": lambda: [["x", *row] for row in rows()],
    "without dominance": lambda: [row[:3] for row in rows()],
    "another order of words": lambda: [rows()[0], *sorted(rows()[1:], reverse=True)],
    "upper case": lambda: [[row[0].upper(), *row[1:]] for row in rows()],
    "on -1..1, as version 2": lambda: [rows()[0]] + [[w, *(f"{2 * float(x) - 1:.6f}" for x in of)] for w, *of in rows()[1:]],
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_same_lexicon_will_do(layout, packed, folder, featurizer, tmp_path):
    text = "\n".join(map("\t".join, LAYOUTS[layout]())).encode()
    path = tmp_path / "lexicon"
    path.write_bytes(gzip.compress(text) if packed else text)
    found, _ = load_features(folder, size(featurizer), path)
    assert found.intensity == pytest.approx(featurizer.intensity, abs=1e-12) and found.concepts == featurizer.concepts


def changed(place: int, column: int, text: str) -> list[list[str]]:
    made = rows()
    made[place][column] = text
    return made


OTHERS: dict[str, tuple[Callable[[], list[list[str]]], str]] = {
    "a value": (lambda: changed(7, 1, "0.5"), r"it has as many, 912 words, but not with the same values"),
    "the last digit of a value": (lambda: changed(9, 2, f"{float(rows()[9][2]) + 0.001:.3f}"), r"not with the same values"),
    "a word": (lambda: changed(7, 0, "zyzzy"), r"as many, 912 words, but not"),
    "one word less": (lambda: rows()[:-1], r"it has 911 words, that one 912 words"),
    "one word more": (lambda: [*rows(), ["zyzzy", "0.1", "0.2", "0.3"]], r"it has 913 words, that one 912 words"),
    "columns exchanged": (lambda: [[w, a, v, d] for w, v, a, d in rows()[1:]], r"not with the same values"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_lexicon_is_refused(other, folder, featurizer, tmp_path):
    made, said = OTHERS[other]
    path = tmp_path / "lexicon.txt"
    path.write_text("\n".join(map("\t".join, made())))
    with pytest.raises(DataError, match=rf"lexicon.txt: not the NRC-VAD that the model was trained with: .*{said}.* Give that"):
        load_features(folder, size(featurizer), path)


def test_a_lexicon_that_cannot_be_read_is_refused_as_prepare_refuses_it(folder, featurizer, tmp_path):
    for path, said in ((tmp_path / "none", "not found"), (tmp_path, "a folder"), (bundled("conceptnet"), "no usable rows|rows")):
        with pytest.raises(DataError, match=said):
            load_features(folder, size(featurizer), path)


def test_the_hash_does_not_depend_on_the_last_digits(featurizer):
    whole = VADLexicon.read(LEXICON).intensities()
    other = {word: value * (1 + 1e-15) - 1e-17 for word, value in whole.items()}
    assert other != whole and published._pairs(other) == published._pairs(whole)
    assert published._pairs({"a": -1e-9}) == published._pairs({"a": 1e-9}) == ["a\t0.000000"]


# ---- what is said without it


def test_without_the_lexicon_loading_stops_with_what_to_do(folder, featurizer):
    said = (r"published without the emotion intensities of 912 words, since NRC-VAD may not be passed on\. Get that lexicon "
            r"\(saifmohammad.com/.*\) and give its file: case_fast.load\(FOLDER, lexicon=FILE\), or case-fast chat FOLDER --lex")
    with pytest.raises(ConfigError, match=said):
        load_responder(folder, "cpu", knowledge="bundled")
    with pytest.raises(ConfigError, match=r"leave emotion_words out"):
        load_features(folder, size(featurizer), LEXICON, LEXICON)


def test_the_weights_alone_need_no_lexicon(folder):
    model, _ = load_model(folder, "cpu")
    again = load(folder)
    assert not model.training and type(model) is type(again)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ConfigError, match="has no checkpoint but its best: '12' is not there"):
        load_model(folder, "cpu", "12")


def test_where_inferences_come_from_is_asked_for_when_a_text_needs_them(folder, featurizer):
    responder = load_responder(folder, "cpu", lexicon=LEXICON)
    with pytest.raises(ConfigError, match=r"reads inferences of ATOMIC \(atomic:1234\), .* with knowledge='atomic:PATH', or "):
        responder.respond("I am so sad.")
    assert load_responder(folder, "cpu", "bundled", lexicon=LEXICON).respond("I am so sad.").concepts


def test_other_inferences_than_those_of_the_training_are_noted(folder, caplog):
    identity = load_responder(folder, "cpu", "bundled", lexicon=LEXICON).knowledge.identity[:19]
    assert [record.message for record in caplog.records if "trained with" in record.message] == [
        f"the model was trained with inferences of atomic:1234, these are of {identity}"]


def test_a_run_takes_no_lexicon(sample_run):
    with pytest.raises(ConfigError, match="is a run, which has its own features: leave lexicon and emotion_words out"):
        load_responder(sample_run, "cpu", lexicon=LEXICON)


# model -> what it cannot be loaded without
NEEDED = {"case": {"lexicon", "knowledge"}, "transformer": set(), "multi-trs": set(), "cem": {"knowledge"}, "mime": set(),
          "kemp": {"lexicon"}, "moel": set(), "empdg": {"lexicon"}, "empdg-d": {"lexicon"}}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_asks_for_what_it_reads_and_nothing_else(name, featurizer, tmp_path):
    model = made(tmp_path / "m", featurizer, name)
    features = json.loads((tmp_path / "m" / "features.json").read_text())
    assert bool(features["concepts"]) == ("concept" in model.needs)
    arguments = {"lexicon": LEXICON, "knowledge": "bundled"}
    given = {option: arguments[option] for option in NEEDED[name]}
    for option in NEEDED[name]:
        others = {other: value for other, value in given.items() if other != option}
        with pytest.raises(ConfigError, match=option):
            load_responder(tmp_path / "m", "cpu", **others).respond("I am so sad.")
    reply = load_responder(tmp_path / "m", "cpu", **given).respond("My dog died last night. I am so sad.")
    assert bool(reply.concepts) == ("concept" in model.needs)
    if "lexicon" not in given:
        with pytest.raises(ConfigError, match="this model reads nothing of NRC-VAD: leave lexicon out"):
            load_responder(tmp_path / "m", "cpu", lexicon=LEXICON, **given)


@pytest.mark.parametrize(("name", "lexicon"), [("empdg", None), ("case", LEXICON)])
def test_the_words_of_nrc_emolex_are_left_out_too(name, lexicon, featurizer, emolex, tmp_path):
    made(tmp_path / "m", featurizer, name, EMOLEX)
    said = (tmp_path / "m" / "features.json").read_text()
    if name == "case":  # which reads nothing of it
        assert load_features(tmp_path / "m", size(featurizer), lexicon)[0].emotional.listed is None
        return
    assert not [word for word in EMOLEX if f'"{word}"' in said]
    with pytest.raises(ConfigError, match="without the emotional words of 3 words, since NRC EmoLex .* emotion_words=FILE"):
        load_features(tmp_path / "m", size(featurizer))
    found, _ = load_features(tmp_path / "m", size(featurizer), None, emolex)
    assert set(found.emotional.listed) == set(EMOLEX)
    emolex.write_text("sad\tanger\t0\njoy\tanger\t0\nrage\tanger\t1\n")
    with pytest.raises(DataError, match="not the NRC EmoLex .* as many, 3 words, but not the same"):
        load_features(tmp_path / "m", size(featurizer), None, emolex)


def test_concepts_in_another_order_could_not_be_put_back(featurizer):
    head = next(head for head, words in featurizer.concepts.items() if len(words) > 1)
    other = Featurizer(featurizer.vocabulary, {head: featurizer.concepts[head][::-1]}, featurizer.intensity)
    with pytest.raises(ConfigError, match="not sorted by falling intensity"):
        published.without_lexicons(other, KNOWLEDGE, ("dialogue", "concept"))


# ---- a damaged folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocabulary.json", "features.json", "checksums.json"])
def test_a_flipped_bit_anywhere_is_noticed(name, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    path, rng = copy / name, random.Random(name)
    whole = path.read_bytes()
    for _ in range(4):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_responder(copy, "cpu", "bundled", lexicon=LEXICON)


def test_an_edited_card_changes_nothing(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("mine")
    assert load_responder(copy, "cpu", "bundled", lexicon=LEXICON).respond("I am so sad.").words


MALFORMED = ["{}", "[]", "[" * 100_000, '{"format": 3}', '{"format": "case_fast published model 2"}', "\xff",
             '{"format": "case_fast published model 1", "left_out": {"lexicon": 3, "emotion_words": null}}',
             '{"format": "case_fast published model 1", "left_out": {"lexicon": null, "emotion_words": null}, "knowledge": {}}',
             '{"format": "case_fast published model 1", "left_out": {"lexicon": null, "emotion_words": null}, "knowledge": null}',
             '{"format": "case_fast published model 1", "left_out": {"lexicon": null, "emotion_words": null}, "knowledge": null, '
             '"concepts": {"a": ["zyzzy"]}, "settings": {}}']


@pytest.mark.parametrize("content", MALFORMED)
def test_a_malformed_file_of_features_is_one_sentence(content, folder, featurizer, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "checksums.json").unlink()
    (copy / "features.json").write_text(content, encoding="latin-1")
    with pytest.raises(CaseFastError, match="features.json: (damaged|its format is)"):
        load_features(copy, size(featurizer))
    with pytest.raises(CheckpointError, match="words, the model has 7: they are of different models"):
        load_features(folder, 7, LEXICON)


# ---- nothing else is put into it


def test_a_published_model_is_no_run_and_no_place(folder, sample_store, tmp_path, capsys):
    store, before = str(sample_store.path), sorted(folder.iterdir())
    for words in (["report", str(folder)], ["train", "--data", store, "--out", str(folder)],
                  ["evaluate", str(folder), "--data", store], ["diagnose", str(folder), "--data", store, "--split", "test"],
                  ["prepare", "--dialogues", "bundled", "--knowledge", "bundled", "--conceptnet", "bundled",
                   "--lexicon", "bundled", "--out", str(folder)], ["publish", str(folder), "--out", str(tmp_path / "again")]):
        assert cli.main(words) == 1
        said = capsys.readouterr().err
        assert "is a case_fast published model 1" in said or "a case_fast published model 1, not" in said or "is no store" in said
    words = ["evaluate", str(folder), "--data", store, "--limit", "2", "--max_words", "3"]
    assert cli.main([*words, "--out", str(tmp_path / "e")]) == 0
    assert (tmp_path / "e" / "metrics.json").is_file() and sorted(folder.iterdir()) == before
    assert cli.main(["doctor", str(folder)]) in (0, 1)
    assert "a published model, case_fast.load opens it" in " ".join(capsys.readouterr().out.split())
