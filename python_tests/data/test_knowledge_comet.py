"""COMET through transformers, with a tiny BART of random weights and a tokenizer made here."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

from case_fast.errors import ConfigError, DataError
from case_fast.knowledge import RELATIONS, CachedSource, InferenceCache, open_source

transformers = pytest.importorskip("transformers", reason="transformers (an extra) is not installed")

from tiny_comet import SPECIAL, make_comet  # noqa: E402

from case_fast.knowledge.comet import CometSource  # noqa: E402

TEXTS = ["i failed my exam", "i lost my dog again and again and the game", "won", "", "the dog won the game !"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_comet(tmp_path_factory.mktemp("comet") / "model")


@pytest.fixture(scope="module")
def source(folder) -> CometSource:
    return CometSource(folder, device="cpu", max_new_tokens=8, batch_size=4)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# --- answers


def test_answers_hold_every_relation_and_no_special_token(source):
    answers = source.infer(TEXTS, RELATIONS, 5)
    assert len(answers) == len(TEXTS) and all(tuple(answer) == RELATIONS for answer in answers)
    flat = [texts for answer in answers for texts in answer.values()]
    assert all(len(texts) <= 5 for texts in flat) and sum(map(len, flat)) > 40
    joined = " ".join(text for texts in flat for text in texts)
    assert not any(token in joined for token in (*SPECIAL, "[GEN]"))
    assert source.infer([], RELATIONS, 5) == []


def test_batching_changes_nothing(folder, source):
    together = source.infer(TEXTS, RELATIONS, 5)
    assert together == [source.infer([text], RELATIONS, 5)[0] for text in TEXTS]
    for batch_size in (1, 3, 64):
        other = CometSource(folder, device="cpu", max_new_tokens=8, batch_size=batch_size)
        assert other.infer(TEXTS, RELATIONS, 5) == together
        assert other.identity == source.identity and other.settings == source.settings
    assert source.infer(TEXTS[::-1] + TEXTS, RELATIONS, 5) == together[::-1] + together
    assert source.infer(TEXTS, ["xReact", "xWant"], 5) == [{r: a[r] for r in ("xReact", "xWant")} for a in together]


def test_answers_are_those_of_a_plain_beam_search(folder, source):
    """One prompt at a time, straight through transformers: the prompt's form, the beams and their order."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    for text in TEXTS:
        inputs = tokenizer(f"{text} xWant [GEN]", return_tensors="pt")
        kept = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        outputs = model.generate(**kept, num_beams=5, num_return_sequences=5, max_new_tokens=8, early_stopping=True)
        texts = [tokenizer.decode(row, skip_special_tokens=True).replace("[GEN]", " ") for row in outputs]
        expected = list(dict.fromkeys(" ".join(t.split()) for t in texts))
        expected = [t for t in expected if t.strip(" .!") not in ("", "none")]
        answer = source.infer([text], ["xWant"], 5)[0]["xWant"]
        assert [t for t in expected if t in answer] == answer and answer


def test_fewer_inferences_are_the_best_ones(source):
    five, two = source.infer(TEXTS, ["xNeed"], 5), source.infer(TEXTS, ["xNeed"], 2)
    for all_of_them, best in zip(five, two, strict=True):
        assert best["xNeed"] == all_of_them["xNeed"][: len(best["xNeed"])]


def test_with_one_beam_texts_are_answered_as_one_by_one(folder):
    one = CometSource(folder, device="cpu", beams=1, max_new_tokens=6)
    answers = one.infer(TEXTS, RELATIONS, 1)
    assert answers == [one.infer([text], RELATIONS, 1)[0] for text in TEXTS]
    assert all(len(texts) <= 1 for answer in answers for texts in answer.values())


def test_a_long_text_loses_its_beginning_not_its_relation(source, monkeypatch):
    seen = []
    generate = source._generate
    monkeypatch.setattr(source, "_generate", lambda rows, k: (seen.extend(rows), generate(rows, k))[1])
    source.infer(["win " * 500 + "i lost my dog"], ["xWant"], 2)
    assert len(seen[0]) == 128
    tokens = source.tokenizer.convert_ids_to_tokens(seen[0])
    assert tokens[0] == "<s>" and tokens[-7:] == ["i", "lost", "my", "dog", "xWant", "[GEN]", "</s>"]


def test_the_folders_own_search_settings_do_not_count(copy, source):
    path = copy / "generation_config.json"
    own = json.loads(path.read_text()) | {"num_beams": 2, "min_length": 6, "do_sample": True, "no_repeat_ngram_size": 1}
    path.write_text(json.dumps(own))
    other = CometSource(copy, device="cpu", max_new_tokens=8)
    assert other.infer(TEXTS, RELATIONS, 5) == source.infer(TEXTS, RELATIONS, 5)
    assert other.identity != source.identity  # a changed file is another identity all the same


def test_identity_is_the_content(folder, copy, tmp_path, source):
    assert source.identity.startswith("comet:") and len(source.identity) == 6 + 64
    assert CometSource(copy, device="cpu").identity == source.identity
    (copy / "README.md").write_text("nothing that changes an answer")
    assert CometSource(copy, device="cpu").identity == source.identity
    assert CometSource(make_comet(tmp_path / "other", seed=1), device="cpu").identity != source.identity
    assert source.settings == {"beams": 5, "max_input_tokens": 128, "max_new_tokens": 8}
    json.dumps(source.settings)


def test_the_cache_answers_the_second_time(tmp_path, folder):
    source = CometSource(folder, device="cpu", max_new_tokens=8)
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        first = CachedSource(source, cache).infer(TEXTS, RELATIONS, 5)
    source.model = source.tokenizer = None  # a second call must not touch them
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        assert CachedSource(source, cache).infer(TEXTS[::-1], RELATIONS, 5) == first[::-1]
        with pytest.raises(TypeError):
            CachedSource(source, cache).infer(["a new text"], RELATIONS, 5)


def test_a_comet_spec_opens_the_model(folder, monkeypatch):
    source = open_source(f"comet:{folder}", device="cpu", beams=3)
    assert isinstance(source, CometSource) and source.settings["beams"] == 3 and source.device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_source(f"comet:{folder}").device.type == "cpu"


# --- weights as a pickle


def to_pickle(folder: Path, state: object) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_a_bin_file_gives_the_same_answers(copy, source):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(copy)
    other = CometSource(to_pickle(copy, model.state_dict()), device="cpu", max_new_tokens=8)
    assert other.infer(TEXTS, RELATIONS, 5) == source.infer(TEXTS, RELATIONS, 5)
    assert other.identity != source.identity


class Hostile:
    def __reduce__(self):
        return (Path.write_text, (Path(Hostile.target), "executed"))


def test_a_bin_file_with_code_is_refused(copy):
    Hostile.target = str(copy / "executed")
    with pytest.raises(DataError, match="cannot be loaded"):
        CometSource(to_pickle(copy, {"model.shared.weight": Hostile()}), device="cpu")
    assert not (copy / "executed").exists()


def test_safetensors_are_preferred(copy, source):
    Hostile.target = str(copy / "executed")
    torch.save({"x": Hostile()}, copy / "pytorch_model.bin")
    assert CometSource(copy, device="cpu").identity == source.identity
    assert not (copy / "executed").exists()


# --- folders that lack or break something


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def put(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit_config(**changes):
    def edit(folder: Path):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut_weights(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_a_tensor(folder: Path):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.encoder.layers.1.fc1.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def larger_tokenizer(folder: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(folder)


def remote_code(folder: Path):
    edit_config(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForSeq2SeqLM": "own.Model"})(folder)
    (folder / "own.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")


@pytest.mark.parametrize(
    "break_it, message",
    [
        (drop("config.json"), "no config.json"),
        (drop("model.safetensors"), "no weights"),
        (drop("tokenizer.json"), "no tokenizer"),
        (put("config.json", "{"), "cannot be loaded"),
        (put("config.json", "[]"), "cannot be loaded"),
        (put("config.json", '{"model_type": "no such model"}'), "cannot be loaded"),
        (put("config.json", '{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 1}'), "cannot be loaded"),
        (put("tokenizer.json", "{}"), "cannot be loaded"),
        (put("model.safetensors", b""), "cannot be loaded"),
        (put("model.safetensors", b"\xff" * 4096), "cannot be loaded"),
        (cut_weights, "cannot be loaded"),
        (drop_a_tensor, "weights are missing or of another shape"),
        (edit_config(d_model=32), "weights are missing or of another shape|cannot be loaded"),
        (edit_config(encoder_layers=3), "weights are missing or of another shape"),
        (larger_tokenizer, "the tokenizer has 36 tokens, the weights have 34"),
        (remote_code, "cannot be loaded"),
    ],
)
def test_broken_folders_are_named(copy, break_it, message):
    break_it(copy)
    with pytest.raises(DataError, match=message) as error:
        CometSource(copy, device="cpu")
    assert str(error.value).startswith(f"{copy}: ") and "folder" in str(error.value)
    assert not (copy / "executed").exists()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"COMET folder not found\. Give the unpacked"):
        CometSource(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file, not a folder"):
        CometSource(tmp_path / "file")


# --- arguments


@pytest.mark.parametrize("wrong", [{"beams": 0}, {"max_new_tokens": 0}, {"batch_size": 0}, {"max_input_tokens": 3}])
def test_wrong_arguments_are_named(folder, wrong):
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: "):
        CometSource(folder, **wrong)


def test_more_inferences_than_beams_are_refused(source):
    with pytest.raises(ConfigError, match="k: 6 inferences asked of 5 beams; raise beams or lower k"):
        source.infer(["a"], ["xWant"], 6)


def test_without_transformers_the_remedy_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs the package transformers .*pip install 'case_fast\[comet\]'"):
        CometSource(folder, device="cpu")


def test_a_tokenizer_without_the_generate_token_is_warned_of_once(tmp_path, caplog):
    folder = make_comet(tmp_path / "plain", generate_token=False)
    with caplog.at_level(logging.WARNING, logger="case_fast"):
        source = CometSource(folder, device="cpu", max_new_tokens=4)
        source.infer(TEXTS, RELATIONS, 2)
        source.infer(TEXTS, RELATIONS, 2)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: [GEN] is not one token of its tokenizer; is this a COMET model?"
    ]


def test_a_good_tokenizer_is_not_warned_of(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="case_fast"):
        CometSource(folder, device="cpu")
    assert not caplog.records
