"""Raw text in, reply and reasons out: the same as from the store, honest weights, errors that say what to do, the chat."""

from __future__ import annotations

import io
import json
import math
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, tiny_model
from rich.console import Console
from safetensors.torch import load_file, save_file

import case_fast
from case_fast import checksums
from case_fast.data.empathetic_dialogues import Turn
from case_fast.data.featurizer import FeatureSettings, Featurizer, prompts
from case_fast.data.text import detokenize, tokenize
from case_fast.data.vocabulary import EOS, SPECIALS
from case_fast.errors import CheckpointError, ConfigError, DataError
from case_fast.generation import GenerationConfig, generate
from case_fast.knowledge import RELATIONS, CachedSource, InferenceCache
from case_fast.models import CASE, CASEConfig
from case_fast.serving import Responder, load
from case_fast.serving.chat import chat

SAID = "I failed my exam. I studied so hard."
CONFIG = GenerationConfig(max_words=8, min_words=1)


class NoKnowledge:
    identity, settings = "none", {}

    def infer(self, texts, relations, k):
        return [{relation: [] for relation in relations} for _ in texts]


@pytest.fixture(scope="module")
def run(sample_store, tmp_path_factory) -> Path:
    """A run folder with random weights; tests that change it take a copy."""
    run = tmp_path_factory.mktemp("respond") / "run"
    torch.manual_seed(0)
    model = CASE(tiny_config(vocab_size=len(sample_store.featurizer.vocabulary)))
    with torch.no_grad():
        model.output.weight *= 4
        model.output.bias[EOS] = 2
    model.save_pretrained(run / "best")
    sample_store.featurizer.save(run / "features")
    (run / "features" / "knowledge.json").write_text(json.dumps(sample_store.knowledge))
    step = run / "checkpoints" / "00000500"
    step.mkdir(parents=True)
    save_file({name: t * 2 if t.is_floating_point() else t for name, t in model.state_dict().items()}, step / "model.safetensors")
    return run


@pytest.fixture(scope="module")
def responder(run) -> Responder:
    return load(run, device="cpu")


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


# ---- replies


def test_a_raw_dialogue_gets_the_reply_of_the_prepared_one(sample_store, responder):
    seen = 0
    for index in range(40):
        source = sample_store.example("test", index).source
        if source["by_speaker"] != [place % 2 == 0 for place in range(len(source["context"]))]:
            continue
        seen += 1
        batch = sample_store.batch("test", [index])
        with torch.inference_mode():
            reading = responder.model.read(batch)
        prepared = generate(responder.model, batch, CONFIG)[0]
        reply = responder.respond(source["context"], CONFIG)
        assert reply.words == tuple(sample_store.featurizer.vocabulary.decode(prepared.words))
        assert reply.score == pytest.approx(prepared.score, abs=1e-4)
        assert reply.text == detokenize(list(reply.words)) == str(reply)
        assert dict(reply.emotions)[reply.emotion] == pytest.approx(reading.emotion_logits.exp().max().item(), abs=1e-5)
        assert reply.gate == pytest.approx(reading.gate.item(), abs=1e-5)
        weights = sorted(reading.log_prior_cognition.exp().tolist())
        assert sum(item.prior for item in reply.inferences) == pytest.approx(sum(weights), abs=1e-5)
    assert seen >= 20


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sample"])
def test_chat_never_says_a_special_word(strategy, run):
    responder = load(run, device="cpu")
    with torch.no_grad():
        responder.model.output.bias[: len(SPECIALS)] = 100
        responder.model.output.bias[EOS] = 0
    for config in (None, GenerationConfig(strategy, max_words=5, min_words=1)):
        reply = responder.respond(SAID, config)
        assert reply.words and not set(reply.words) & set(SPECIALS)


def test_chat_asks_for_the_knowledge_that_prepare_asks_for(run, monkeypatch):
    responder, asked = load(run, device="cpu"), []
    monkeypatch.setattr(responder, "knowledge", NoKnowledge())
    monkeypatch.setattr(NoKnowledge, "infer", lambda self, texts, relations, k: asked.extend(texts) or [{} for _ in texts])
    said = "Dr. Smith called at 5 p.m. Then I left."
    responder.respond(["I was ill.", "Oh no!", said], CONFIG)
    assert asked == prompts([Turn(said, True)]) == [said, "Dr. Smith called at 5 p.m.", "Then I left."]


def test_the_reasons_of_a_reply_are_those_of_its_words_and_inferences(responder):
    history = ["My dog was so happy.", "What happened?", SAID]
    reply = responder.respond(history, CONFIG)
    answers = dict(
        zip([SAID, *SAID.split(". ", 1)], responder.knowledge.infer([SAID, "I failed my exam."], RELATIONS, 5), strict=False)
    )
    expected = {(relation, text) for relation in RELATIONS[:4] for text in answers[SAID][relation]}
    assert {(i.relation, i.text) for i in reply.inferences if 0 in i.of} == expected
    assert reply.sub_utterances == (SAID, "I failed my exam.", "I studied so hard.")
    assert len({(i.relation, i.text) for i in reply.inferences}) == len(reply.inferences) > 8
    assert sum(i.prior for i in reply.inferences) == pytest.approx(1, abs=1e-5)
    for items in (reply.inferences, reply.concepts):
        assert [i.prior for i in items] == sorted((i.prior for i in items), reverse=True)
    assert {r.text for r in reply.reactions if 0 in r.of} == set(answers[SAID]["xReact"])
    words = [word for text in history for word in tokenize(text)]
    assert reply.concepts and 0 < sum(c.prior for c in reply.concepts) < 1
    for concept in reply.concepts:
        assert concept.tokens and set(concept.tokens) <= set(words)
        assert all(concept.text in responder.featurizer.concepts[token] for token in concept.tokens)
        assert concept.intensity == pytest.approx(responder.featurizer.intensity[concept.text]) and concept.intensity >= 0.6
    assert len(reply.emotions) == 32 and reply.emotions[0][0] == reply.emotion
    assert sum(p for _, p in reply.emotions) == pytest.approx(1, abs=1e-5)
    assert [p for _, p in reply.emotions] == sorted((p for _, p in reply.emotions), reverse=True)
    assert 0 < reply.gate < 1 and reply.score < 0 and reply.truncated == 0 and reply.unknown_words == ()
    assert json.loads(json.dumps(reply.as_dict()))["inferences"][0]["relation"] == reply.inferences[0].relation


def test_one_sentence_counts_its_inferences_once(responder):
    reply = responder.respond("I failed my exam.", CONFIG)
    assert len({(i.relation, i.text) for i in reply.inferences}) == len(reply.inferences) > 0
    assert all(i.of == (0, 1) for i in reply.inferences)
    assert sum(i.prior for i in reply.inferences) == pytest.approx(1, abs=1e-5)


def test_a_text_about_nothing_known_gets_a_reply_and_its_unknown_words_named(responder):
    reply = responder.respond("Zorbulated [bold]qwxz[/bold] zorbulated?", CONFIG)
    assert reply.inferences == reply.reactions == ()
    assert {"zorbulated", "qwxz"} <= set(reply.unknown_words) and reply.unknown_words.count("zorbulated") == 1
    assert "?" not in reply.unknown_words


@pytest.mark.parametrize(
    ("text", "unknown"),
    [("I failed😭", ("😭",)), ("I failed - ", ("-",)), ("I failed—my exam！", ("-",)), ("I failed my “exam”…", ('"', "...")),
     ("👍🏽", ("👍",)),
     ("👨‍👩‍👧", ("👨‍👩‍👧",)), ("I can＇t", ()), ("\u200bI failed.", ()), ("ｆａｉｌｅｄ　ｅｘａｍ", ()), ("—", ("-",))],
)
def test_marks_are_no_part_of_the_words_of_a_chat(responder, text, unknown):
    """The sample holds no emoji and few marks: they are unknown words, and the words beside them are not."""
    reply = responder.respond(text, CONFIG)
    assert set(reply.unknown_words) <= set(unknown) and math.isfinite(reply.score)
    assert not [word for word in reply.unknown_words if word.isascii() and word.isalpha()]


@pytest.mark.parametrize("text", ["", "  ", "\u200b", "\ufeff \u00ad", "\u2060"])
def test_a_turn_of_which_nothing_is_seen_is_blank(responder, text):
    with pytest.raises(ConfigError, match="text 1 of the history is blank"):
        responder.respond([text], CONFIG)


def test_long_contexts_are_cut_and_say_so(responder):
    settings = FeatureSettings(max_context=20)
    short = Responder(
        responder.model,
        Featurizer(responder.featurizer.vocabulary, responder.featurizer.concepts, responder.featurizer.intensity, settings),
        lambda: responder.knowledge,
    )
    history = ["zorb " * 30, "oh no", "I was so sad that I cried."]
    reply = short.respond(history, CONFIG)
    total = sum(len(tokenize(text)) for text in history)
    assert reply.truncated == total - 20
    assert all(set(c.tokens) <= set(tokenize(" ".join(history))) for c in reply.concepts)
    assert short.respond(["word " * 2000], CONFIG).truncated == 1980
    assert responder.respond(history, CONFIG).truncated == 0


def test_many_are_answered_as_one_by_one(responder, sample_store):
    histories = ["I got a new job today!", [SAID, "I am sorry.", "Thank you."], "Zorb."]
    histories += [[text] for text in ("My dog died last night.", "We had a party. I ate all the cake!", "hello")]
    for config in (CONFIG, GenerationConfig("beam", max_words=6), None):
        together = responder.respond_many(histories, config, batch_size=4)
        for history, reply in zip(histories, together, strict=True):
            alone = responder.respond(history, config)
            assert (reply.text, reply.emotion, reply.truncated) == (alone.text, alone.emotion, alone.truncated)
            assert reply.score == pytest.approx(alone.score, abs=1e-4)
            weights = {(i.of, i.relation, i.text): i.prior for i in alone.inferences}
            assert {(i.of, i.relation, i.text): i.prior for i in reply.inferences} == pytest.approx(weights, abs=1e-5)
            assert {c.text: c.prior for c in reply.concepts} == pytest.approx({c.text: c.prior for c in alone.concepts}, abs=1e-5)
    assert responder.respond_many([]) == []
    config = GenerationConfig("sample", seed=3, max_words=8)
    drawn = [[r.words for r in responder.respond_many(["hello"] * 9, config, batch_size=size)] for size in (16, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 3


def test_a_reply_is_never_empty_unless_asked_for(run):
    responder = load(run, "cpu")
    with torch.no_grad():
        responder.model.output.bias[EOS] = 1e4
    assert len(responder.respond("hello").words) == 1
    assert responder.respond("hello", GenerationConfig()).text == ""


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ([], "history is empty; give at least the speaker's first text"),
        ("", "text 1 of the history is blank"),
        ([SAID, " \t\n", "yes"], "text 2 of the history is blank; every turn needs words"),
        ([SAID, "oh"], "history holds 2 texts, so it ends with the listener; give an odd number, oldest first"),
        (["a", 3, "b"], "history must be a text or a list of texts"),
        (None, "history must be a text or a list of texts"),
        (b"bytes", "history must be a text or a list of texts"),
    ],
)
def test_histories_that_cannot_be_answered_are_refused_with_the_reason(responder, history, said):
    with pytest.raises(ConfigError, match=said):
        responder.respond(history)


def test_lists_that_cannot_be_answered_are_refused_with_the_reason(responder):
    with pytest.raises(ConfigError, match="histories must be a list of dialogues"):
        responder.respond_many(SAID)
    with pytest.raises(ConfigError, match="batch_size"):
        responder.respond_many([SAID], batch_size=0)


@pytest.mark.parametrize(
    "text", ["!!!", "...", "\u200c", "a\0b", "\ud800 half a pair", "👍🏽", "x" * 5000, "<speaker> <eos>", "a. b! c? " * 60]
)
def test_odd_texts_get_a_reply(responder, text):
    reply = responder.respond([text, "oh", text], CONFIG)
    assert isinstance(reply.text, str) and math.isfinite(reply.score)
    json.dumps(reply.as_dict(), ensure_ascii=False).encode()


# ---- opening a run


def test_load_gives_the_same_replies_without_network(run, responder, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    again = case_fast.load(str(run), device="auto")
    assert not again.model.training
    assert again.respond(SAID, CONFIG).words == responder.respond(SAID, CONFIG).words


def test_from_pretrained_is_strict_and_gives_its_settings(tmp_path):
    model = tiny_model(layers=2)
    model.save_pretrained(tmp_path)
    again = CASE.from_pretrained(str(tmp_path))
    assert isinstance(again.config, CASEConfig) and again.config == model.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["w_aff"]
    save_file(weights, tmp_path / "model.safetensors")
    checksums.write(tmp_path)
    with pytest.raises(RuntimeError, match="w_aff"):
        CASE.from_pretrained(str(tmp_path))


def test_a_step_is_loaded_in_place_of_the_best(run, responder):
    again = load(run, "cpu", checkpoint="500")
    assert torch.equal(again.model.w_aff, 2 * responder.model.w_aff)
    with pytest.raises(ConfigError, match="checkpoint '7' is not in .*; give one of best, 00000500"):
        load(run, "cpu", checkpoint="7")
    for name in ("../best", "", "00000500/"):
        with pytest.raises(ConfigError, match="give one of best"):
            load(run, "cpu", checkpoint=name)


def test_a_step_can_be_loaded_before_there_is_a_best(copy, responder):
    settings = json.loads((copy / "best" / "config.json").read_text())
    kind = settings.pop("model")
    (copy / "config.json").write_text(json.dumps({"kind": kind, "model": settings}))
    shutil.rmtree(copy / "best")
    again = load(copy, "cpu", checkpoint="500")
    assert torch.equal(again.model.w_aff, 2 * responder.model.w_aff) and again.model.config == responder.model.config


def test_a_run_that_is_not_there_is_answered_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(CheckpointError, match="run folder not found. Make one with: case-fast train --data STORE --out .*none"):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("best", "no weights to use yet.*case-fast train --data STORE --out .* --resume"),
        ("best/config.json", "config.json: this part of the run is missing.*case-fast train"),
        ("best/model.safetensors", "model.safetensors: this part of the run is missing.*case-fast train"),
        ("features", "vocabulary.json: this part of the run is missing. Remove .*features, then write it again: case-fast train"),
        ("features/features.json", "features.json: this part of the run is missing"),
        ("features/knowledge.json", "knowledge.json: this part of the run is missing"),
    ],
)
def test_a_missing_part_is_named(copy, part, said):
    path = copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=said):
        load(copy, "cpu")


@pytest.mark.parametrize(
    "part", ["best/config.json", "features/vocabulary.json", "features/features.json", "features/knowledge.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"vocab_size": "many"}', b"\xff\xfe", b"null"])
def test_a_damaged_part_is_named(copy, part, content):
    (copy / part).write_bytes(content)
    with pytest.raises(CheckpointError, match=part.split("/")[0]):
        load(copy, "cpu")


def test_damaged_weights_are_named(copy):
    path = copy / "best" / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-10], b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="best: damaged, or not of this model"):
            load(copy, "cpu")
    tiny_model().save_pretrained(copy / "best")
    with pytest.raises(CheckpointError, match="words, the model has 61: they are of different runs"):
        load(copy, "cpu")


# ---- knowledge


def recorded(run: Path, spec: str, cache: str | None) -> None:
    (run / "features" / "knowledge.json").write_text(json.dumps({"spec": spec, "cache": cache}))


def test_knowledge_is_opened_when_it_is_needed(copy, tmp_path):
    recorded(copy, f"atomic:{tmp_path}/gone", None)
    responder = load(copy, "cpu")
    said = f"not found. The run was prepared with atomic:{tmp_path}/gone: give its place now with --knowledge, or use --knowledge"
    with pytest.raises(DataError, match=said):
        responder.respond(SAID)
    assert load(copy, "cpu", knowledge="bundled").respond(SAID, CONFIG).inferences
    with pytest.raises(DataError, match="elsewhere"):
        load(copy, "cpu", knowledge=f"atomic:{tmp_path}/elsewhere").respond(SAID)
    with pytest.raises(ConfigError, match="--knowledge 'oracle' is not a source"):
        load(copy, "cpu", knowledge="oracle").respond(SAID)


def test_the_recorded_cache_answers_and_grows(copy, tmp_path):
    cache = tmp_path / "cache.sqlite"
    InferenceCache(cache).close()
    recorded(copy, "bundled", str(cache))
    responder = load(copy, "cpu")
    responder.respond(SAID, CONFIG)
    assert isinstance(responder.knowledge, CachedSource)
    with InferenceCache(cache) as held:
        assert len(held) == 3 * len(RELATIONS)  # u_0 and two sentences
    assert not (copy / "knowledge.sqlite").exists()


def test_a_vanished_cache_is_replaced_by_one_in_the_run(copy, tmp_path):
    recorded(copy, "bundled", str(tmp_path / "gone" / "cache.sqlite"))
    assert load(copy, "cpu").respond(SAID, CONFIG).inferences
    with InferenceCache(copy / "knowledge.sqlite") as held:
        assert len(held) == 3 * len(RELATIONS)
    assert not (tmp_path / "gone").exists()


def test_no_cache_recorded_no_cache_made(copy):
    recorded(copy, "bundled", None)
    assert load(copy, "cpu").respond(SAID, CONFIG).inferences
    assert not list(copy.rglob("*.sqlite"))


# ---- chat


def talk(responder, lines, show=True, config=CONFIG, end=EOFError) -> str:
    """What is printed when these lines are typed."""
    out = io.StringIO()
    left = iter(lines)

    def read(prompt: str) -> str:
        for line in left:
            return line
        raise end

    chat(responder, Console(file=out, width=120), config, show, read)
    return out.getvalue()


def test_chat_answers_with_reasons_and_keeps_the_history(responder, monkeypatch):
    asked = []
    respond = responder.respond
    monkeypatch.setattr(responder, "respond", lambda history, config: (asked.append(list(history)), respond(history, config))[1])
    printed = talk(responder, [SAID, "", "  I am so sad. ", "/new", "hello", "/quit", "never"])
    first = respond(SAID, CONFIG)
    assert asked == [[SAID], [SAID, first.text, "I am so sad."], ["hello"]]
    assert first.text in printed and first.emotion in printed and first.concepts[0].text in printed
    assert "inferences" in printed and "concepts" in printed and "%" in printed and "A new dialogue." in printed
    assert talk(responder, ["hello"], show=False) == respond("hello", CONFIG).text + "\n"


def test_chat_why_explains_the_last_reply(responder):
    printed = talk(responder, ["/why", SAID, "/why", "/nonsense"], show=False)
    found = responder.explain(SAID, config=CONFIG)
    assert found.words == responder.respond(SAID, CONFIG).words
    assert printed.startswith("Nothing has been said yet.")
    for expected in ("xIntent", "Commonsense inferences", "Reactions", "Emotional concepts", "Words of the context", "effect",
                     *(emotion for emotion, _ in found.emotions[:5]), *(concept.text for concept in found.concepts)):
        assert expected in printed
    for item in (*found.inferences, *found.reactions):
        assert item.text in printed
    assert f"{found.log_p:.2f} nats" in printed and printed.rstrip().endswith("/quit")


def test_chat_leaves_politely(responder):
    assert talk(responder, [], end=KeyboardInterrupt) == ""
    assert talk(responder, ["hello"], end=KeyboardInterrupt).count("emotion") == 1


def test_chat_prints_markup_as_text(responder):
    printed = talk(responder, ["[bold]zorb[/bold] [/red] exam", "/why"])
    assert "unknown words: " in printed and "/bold" in printed


def test_chat_goes_on_after_an_empty_reply(run):
    responder = load(run, "cpu")
    with torch.no_grad():
        responder.model.output.bias[EOS] = 1e4
    printed = talk(responder, ["hello", "hello", "/why"], config=GenerationConfig())
    assert printed.count("The model has no words for that; put it another way.") == 2
    assert printed.rstrip().endswith("Nothing has been said yet.")


def test_without_any_knowledge_there_is_a_reply_without_inferences(responder):
    reply = Responder(responder.model, responder.featurizer, NoKnowledge).respond(SAID, CONFIG)
    assert reply.words and reply.inferences == reply.reactions == () and reply.concepts
