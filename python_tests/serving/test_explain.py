"""Explanations: effects are what is really left out, posteriors the model's own, edits do what they say, whatever the model."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from xml.etree import ElementTree

import pytest
import torch
from helpers import (
    CONCEPTS,
    INTENSITY,
    WORDS,
    dialogue,
    inferences,
    speakers_prompts,
    tiny_featurizer,
    tiny_vocabulary,
)

from case_fast import equations as eq
from case_fast.data.empathetic_dialogues import Turn
from case_fast.data.featurizer import Featurizer, TextTable
from case_fast.data.graphs import COGNITION_GRAPH_RELATIONS, CONCEPT_GRAPH_RELATIONS
from case_fast.data.pack import make_batch
from case_fast.data.text import tokenize
from case_fast.errors import ConfigError
from case_fast.generation import GenerationConfig
from case_fast.knowledge import RELATIONS, open_source
from case_fast.models import MODELS, DialogueModel, build
from case_fast.serving import Asked, EditError, Explanation, Responder
from case_fast.serving.cases import Case, latex, markdown
from case_fast.serving.graphs import svg, tables
from case_fast.serving.lines import KINDS
from case_fast.serving.page import explanation_page

CONFIG = GenerationConfig(max_words=6, min_words=1)
HISTORY = ["i lost my dog .", "i feel with you .", "my exam was so sad . my friend lost the letter !"]
ONE_SENTENCE = ["my boss was angry !"]
every_model = pytest.mark.parametrize("name", MODELS)


class Made:
    """Inferences of every relation for each text, the same whenever it is asked."""

    identity, settings = "made", {}

    def infer(self, texts, relations, k):
        return [self.of(text, relations) for text in texts]

    @staticmethod
    def of(text, relations=RELATIONS):
        return {relation: found[:2] for relation, found in
                inferences([text], random.Random(text.rstrip(" .!")), relations, share=1.0)[text].items()}


def tiny(name: str, words: int, **changes: object) -> DialogueModel:
    """A few thousand weights in float64, whose replies differ."""
    torch.manual_seed(0)
    own = {"case": {"graph_dropout": 0.0}}.get(name, {"attention_width": 8})
    model = build(name, vocab_size=words, d_model=16, ffn=12, **own | changes).double().eval()
    with torch.no_grad():
        model.output.weight *= 8
    return model


@cache
def responder(name: str) -> Responder:
    return Responder(tiny(name, len(tiny_vocabulary())), tiny_featurizer(), Made)


@cache
def explained(name: str, place: int = 0) -> Explanation:
    return responder(name).explain((HISTORY, ONE_SENTENCE)[place], config=CONFIG, attention=True)


def log_p(model: DialogueModel, example, texts: TextTable, reply: str) -> float:
    """Of a reply, by the whole vocabulary's softmax at each word."""
    example = replace(example, response=tiny_vocabulary().encode(tokenize(reply)))
    batch = make_batch([example], texts, model.needs)
    with torch.inference_mode():
        scores = model.reply_logits(batch.decoder_input, batch.cu_target, model.read(batch)).log_softmax(-1)
    return float(scores.gather(1, batch.target.unsqueeze(1)).sum())


def near(value: float):
    return pytest.approx(float(value), abs=1e-9)


# ---- every model


@every_model
def test_every_model_explains(name):
    model = responder(name).model
    reads = {"inferences": "case" in model.needs or "relations" in model.needs, "concepts": "concept" in model.needs}
    for place in range(2):
        found = explained(name, place)
        assert found.model == name and found.text and len(found.words) >= 1 and not found.given
        assert len(found.emotions) in (0, 32) and sum(p for _, p in found.emotions) == near(bool(found.emotions))
        assert bool(found.inferences) == bool(found.reactions) == reads["inferences"]
        assert bool(found.concepts) == reads["concepts"]
        words = [word for text in (HISTORY, ONE_SENTENCE)[place] for word in tokenize(text)]
        assert [word.text for word in found.context if word.position] == words and found.perplexity > 1
        for kind in KINDS:
            assert all(item.effect is not None for item in getattr(found, kind) if getattr(item, "position", 1))
        weighed = [item for item in (*found.inferences, *found.concepts, *found.context) if item.prior is not None]
        assert bool(weighed) == bool(found.spreads) == (name in ("case", "kemp"))
        assert sum(item.prior for item in weighed) == near(len(found.spreads))
        for spread in found.spreads.values():
            assert 1 <= spread.prior <= spread.number + 1e-9 and (spread.kl is None or spread.kl >= 0)
        for source in found.attention:
            assert len(source.words) == len(source.weights) == len(found.words) + 1
            assert all(sum(shares) == near(1) and len(shares) == len(source.rows) for shares in source.weights)
        json.dumps(found.as_dict(), allow_nan=False)
        read = {"cognition": "case" in model.needs, "concepts": reads["concepts"]}
        assert [graph.name for graph in found.graphs] == [graph for graph, there in read.items() if there]


@every_model
def test_raw_text_is_explained_as_the_prepared_dialogue(name, sample_store):
    model = tiny(name, len(sample_store.featurizer.vocabulary)).float()
    of_sample = Responder(model, sample_store.featurizer, lambda: open_source("bundled"))
    alternate = [index for index in range(20) for source in [sample_store.example("test", index).source]
                 if source["by_speaker"] == [place % 2 == 0 for place in range(len(source["context"]))]][:3]
    for index, stored in zip(alternate, of_sample.explain_stored(sample_store, "test", alternate, config=CONFIG), strict=True):
        raw = of_sample.explain(sample_store.example("test", index).source["context"], config=CONFIG)
        assert raw.words == stored.words and raw.log_p == pytest.approx(stored.log_p, abs=1e-4)
        assert [item.text for item in raw.context] == [item.text for item in stored.context]
        effects = [{(getattr(item, "relation", ""), item.text): item.effect for item in (*one.inferences, *one.reactions)}
                   for one in (raw, stored)]
        assert effects[0] == pytest.approx(effects[1], abs=1e-4)


# ---- effects


@every_model
def test_an_effect_is_what_the_reply_loses_when_the_thing_is_really_left_out(name):
    """Built anew from changed inputs: other inferences, another list of concepts, other words."""
    found, model, subs = explained(name), responder(name).model, speakers_prompts(HISTORY)
    known = {text: Made.of(text) for text in subs}
    texts = tiny_featurizer().text_table()
    assert found.log_p == near(log_p(model, dialogue(HISTORY, texts, known), texts, found.text))

    def without(relation, text):
        return {sub: {kind: [one for one in of if (kind, one) != (relation, text)] for kind, of in by.items()}
                for sub, by in known.items()}

    examples = [(item, dialogue(HISTORY, texts, without(item.relation, item.text))) for item in found.inferences]
    examples += [(item, dialogue(HISTORY, texts, without("xReact", item.text))) for item in found.reactions]
    for item in found.concepts:
        fewer = {head: [word for word in words if word != item.text] for head, words in CONCEPTS.items()}
        featurizer = Featurizer(tiny_vocabulary(), fewer, INTENSITY)
        examples.append((item, dialogue(HISTORY, texts, known, featurizer=featurizer)))
    words = [tokenize(text) for text in HISTORY]
    for item in (item for item in found.context if item.position):
        left, turns = item.position - 1, []
        for place, turn in enumerate(words):
            kept = [word for at, word in enumerate(turn) if at != left]
            left -= len(turn)
            turns.append(Turn(" ".join(kept), place % 2 == 0))
        examples.append((item, tiny_featurizer().example(turns, known, texts, cut=subs)))
    assert len(examples) >= 20
    for item, example in examples:
        assert item.effect == near(found.log_p - log_p(model, example, texts, found.text)), item
    moved = [abs(item.effect) for item, _ in examples]
    assert max(moved) > 1e-3


@every_model
def test_removing_by_an_edit_is_leaving_out(name):
    found = explained(name)
    items = [("inference", {"relation": item.relation}, item) for item in found.inferences]
    items += [(kind, {}, item) for kind, of in (("reaction", found.reactions), ("concept", found.concepts)) for item in of]
    asked = [Asked(HISTORY, [{"op": "remove", "what": kind, "text": item.text, **more}], found.text)
             for kind, more, item in items]
    if not asked:
        return
    for (_, _, item), now in zip(items, responder(name).explain_many(asked, CONFIG, effects=()), strict=True):
        assert now.log_p == near(found.log_p - item.effect) and now.change.log_p == (near(found.log_p), near(now.log_p))


@every_model
def test_an_explanation_is_the_same_in_a_batch_and_alone(name):
    asked = [Asked(HISTORY), Asked(ONE_SENTENCE, reply="i am so sad ."), Asked(["rain ."])]
    if name == "case":
        edits = [{"op": "set", "what": "gate", "value": 0.3}, {"op": "remove", "what": "concept", "text": "grief"}]
        asked.append(Asked(HISTORY, edits))
    together = responder(name).explain_many(asked, CONFIG, attention=True)
    for one, found in zip(asked, together, strict=True):
        alone = responder(name).explain(one.history, one.edits, one.reply, CONFIG, attention=True)
        assert flat(found.as_dict()) == pytest.approx(flat(alone.as_dict()), abs=1e-9)


def flat(values: object, name: str = "") -> dict[str, float]:
    """All numbers in plain values, by where they stand; texts by what they are."""
    if isinstance(values, dict):
        return {key: value for part, of in values.items() for key, value in flat(of, f"{name}.{part}").items()}
    if isinstance(values, list | tuple):
        return {key: value for place, of in enumerate(values) for key, value in flat(of, f"{name}.{place}").items()}
    return {f"{name}={values}": 0.0} if isinstance(values, str | None) else {name: float(values)}


# ---- weights


@pytest.mark.parametrize(("history", "reply"), [(HISTORY, None), (ONE_SENTENCE, "i am so sad for you .")])
def test_prior_and_posterior_are_the_models_own(history, reply):
    found, model = responder("case").explain(history, reply=reply, config=CONFIG), responder("case").model
    texts = tiny_featurizer().text_table()
    known = {text: Made.of(text) for text in speakers_prompts(history)}
    example = dialogue(history, texts, known, response=found.text)
    with torch.inference_mode():
        output = model(make_batch([example], texts, model.needs))
    merged: dict[tuple[str, str], list[float]] = {}
    for place, (text, relation) in enumerate(zip(example.knowledge.tolist(), example.knowledge_relation.tolist(), strict=True)):
        sums = merged.setdefault((RELATIONS[relation], texts.text(text)), [0.0, 0.0, 0])
        sums[0] += float(output.prior_cognition[place])
        sums[1] += float(output.posterior_cognition[place])
        sums[2] += 1
    number = len(example.knowledge)
    assert {(item.relation, item.text) for item in found.inferences} == set(merged)
    assert (len(merged) < number) == (history is ONE_SENTENCE)
    for item in found.inferences:
        prior, posterior, vertices = merged[item.relation, item.text]
        assert (item.prior, item.posterior) == (near(prior), near(posterior)) and len(item.of) == vertices
        assert item.lift == near(prior * number / vertices)
    vertices = [*found.context, *sorted(found.concepts, key=lambda item: example.concept.tolist().index(
        tiny_vocabulary().ids[item.text]))]
    assert [item.prior for item in vertices] == [near(p) for p in output.prior_concept.tolist()]
    assert [item.posterior for item in vertices] == [near(p) for p in output.posterior_concept.tolist()]
    prior, posterior = output.prior_cognition, output.posterior_cognition
    spread = found.spreads["inferences"]
    assert spread.kl == near(float((posterior * (posterior / prior).log()).sum())) and spread.number == number
    assert spread.prior == near(float((-prior * prior.log()).sum().exp())) and found.gate == near(float(output.gate))
    assert found.log_p == near(-float(output.nll.sum()))


def test_the_reference_of_a_store_is_explained_as_the_model_scores_it(sample_store):
    model = tiny("case", len(sample_store.featurizer.vocabulary))
    of_sample = Responder(model, sample_store.featurizer, lambda: pytest.fail("no knowledge is asked for"))
    (found,) = of_sample.explain_stored(sample_store, "test", [3], reference=True, effects=())
    with torch.inference_mode():
        output = model(sample_store.batch("test", [3]))
    assert found.given and found.text == sample_store.example("test", 3).source["response"]
    assert found.log_p == pytest.approx(-float(output.nll.sum()), abs=1e-6)
    shares = [item.posterior for item in found.inferences]
    assert sum(shares) == near(1) and max(shares) >= float(output.posterior_cognition.max()) - 1e-9
    assert all(item.effect is None for item in (*found.inferences, *found.context)) and not found.attention


def test_evenness_and_what_changes_nothing_are_said():
    model = tiny("case", len(tiny_vocabulary()))
    with torch.no_grad():
        for part in (model.phi_cognition[0].weight, model.phi_cognition[0].bias,
                     model.decoder.layers[0].cross_attention[0].output.weight, model.fusion.weight[:, 16:32]):
            part.zero_()
    of = Responder(model, tiny_featurizer(), Made)
    found = of.explain(HISTORY, config=CONFIG)
    number = found.spreads["inferences"].number
    assert all(item.lift == near(1) for item in found.inferences) and found.spreads["inferences"].prior == near(number)
    assert found.notes["inferences"] == [f"weight is spread evenly over {number} inferences",
                                         "leaving any of them out does not change the reply"]
    assert found.notes["concepts"] == found.notes["context"] == []
    assert explained("case").notes == {kind: [] for kind in KINDS}


def test_attention_reproduces_what_the_decoder_reads():
    """With one head the weights times the values are what a source adds."""
    torch.manual_seed(1)
    model = tiny("case", len(tiny_vocabulary()), heads=1)
    texts = tiny_featurizer().text_table()
    example = dialogue(HISTORY, texts, {text: Made.of(text) for text in speakers_prompts(HISTORY)}, "i am sad .")
    batch = make_batch([example], texts, model.needs)
    with torch.inference_mode():
        watched: list[torch.Tensor] = []
        reading = replace(model.read(batch), watched=watched)
        model.reply_logits(batch.decoder_input, batch.cu_target, reading)
        weights = model.source_attention(batch.decoder_input, reading)
        rows, sources = watched[0], model.decoder.layers[-1].sources(reading.memories)
        expected = eq.cross_attention(rows, batch.cu_target, sources)
        for share, source in zip(weights, sources, strict=True):
            rows = rows + share @ source.value.flatten(1) @ source.output_weight.T
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-10)


# ---- graphs


def test_graphs_have_the_edges_of_the_example():
    texts = tiny_featurizer().text_table()
    example = dialogue(HISTORY, texts, {text: Made.of(text) for text in speakers_prompts(HISTORY)})
    cognition, concepts = explained("case").graphs
    subs = len(example.sub_utterance)
    node = {(item.relation, item.text): item.id for item in cognition.nodes if item.kind == "inference"}
    names = [*(f"u{place}" for place in range(subs)),
             *(node[RELATIONS[relation], texts.text(text)] for text, relation in
               zip(example.knowledge.tolist(), example.knowledge_relation.tolist(), strict=True))]
    expected = [(names[a], names[b], COGNITION_GRAPH_RELATIONS[r]) for a, b, r in example.cognition_graph.edges() if a < b]
    assert sorted((edge.source, edge.target, edge.relation) for edge in cognition.edges) == sorted(expected)
    assert sum(edge.weight or 0 for edge in cognition.edges) == near(1)
    words = tiny_vocabulary().decode(example.concept)
    by_text = {item.text: item.id for item in concepts.nodes if item.kind == "concept"}
    names = [*(f"w{place}" for place in range(1 + len(example.context))), *(by_text[word] for word in words)]
    expected = [(names[a], names[b], CONCEPT_GRAPH_RELATIONS[r]) for a, b, r in example.concept_graph.edges() if a < b]
    assert sorted((edge.source, edge.target, edge.relation) for edge in concepts.edges) == sorted(expected)


def test_a_picture_says_what_it_shows_and_is_always_the_same():
    hostile = ["<script>alert(1)</script> my exam & \"dog\" lost"]
    edits = [{"op": "remove", "what": "source", "source": "inferences"}, {"op": "remove", "what": "concept", "text": "grief"}]
    for history in (HISTORY, hostile, ["rain ."]):
        found = responder("case").explain(history, edits if history is HISTORY else (), config=CONFIG)
        for graph in found.graphs:
            picture = svg(graph)
            assert picture == svg(graph)
            drawn = ElementTree.fromstring(picture)
            assert [part.tag.rpartition("}")[2] for part in drawn][:2] == ["title", "desc"] and drawn[0].text == graph.title
            shown = "".join(drawn.itertext()) + "".join(map(str, tables(graph)))
            for item in graph.nodes:
                assert item.text in shown or "<" in item.text or "&" in item.text or '"' in item.text
            assert ("stroke-dasharray" in picture) == any(item.left_out for item in graph.nodes)
            assert sum(len(ElementTree.fromstring(table)[2]) for table in tables(graph)) == len(graph.nodes) + len(graph.edges)
        whole = explanation_page([found])
        assert "<script" not in whole and whole.count("<svg") == 2
    left_out = [item.text for graph in responder("case").explain(HISTORY, edits, config=CONFIG).graphs for item in graph.nodes
                if item.left_out]
    assert "grief" in left_out and len(left_out) == 1 + len(explained("case").inferences)


# ---- what if


def test_a_merged_line_is_edited_as_one():
    found = explained("case", 1)
    item = found.inferences[0]
    assert item.of == (0, 1) and len({(one.relation, one.text) for one in found.inferences}) == len(found.inferences)
    what = {"what": "inference", "relation": item.relation, "text": item.text}
    removed = responder("case").explain(ONE_SENTENCE, [{"op": "remove", **what}], config=CONFIG)
    assert removed.spreads["inferences"].number == found.spreads["inferences"].number - 2
    changed = responder("case").explain(ONE_SENTENCE, [{"op": "replace", **what, "with": "to sleep"}], config=CONFIG)
    (new,) = [one for one in changed.inferences if one.text == "to sleep"]
    assert (new.of, new.relation) == (item.of, item.relation)
    assert changed.spreads["inferences"].number == found.spreads["inferences"].number


def test_what_is_taken_out_and_put_back_changes_nothing():
    found = explained("case")
    edits = []
    for sort, item in (("inference", found.inferences[0]), ("reaction", found.reactions[0])):
        what = {"what": sort, "text": item.text} | ({"relation": item.relation} if sort == "inference" else {})
        edits += [{"op": "remove", **what}, *({"op": "add", **what, "of": sub} for sub in item.of)]
    concept = next(item for item in found.concepts if len(item.tokens) == 1)
    edits += [{"op": "replace", "what": "concept", "text": concept.text, "with": "home", "intensity": 0.2},
              {"op": "remove", "what": "concept", "text": "home"},
              {"op": "add", "what": "concept", "text": concept.text, "token": concept.tokens[0]}]
    again = responder("case").explain(HISTORY, edits, config=CONFIG)
    assert again.log_p == near(found.log_p) and again.change.words == (("equal", found.words, found.words),)
    assert all(moved.before == near(moved.after) for moved in again.change.weights)
    assert {item.text: item.effect for item in again.concepts} == pytest.approx(
        {item.text: item.effect for item in found.concepts}, abs=1e-9)


def test_other_turns_are_another_dialogue():
    edits = [{"op": "replace", "what": "turn", "turn": 2, "with": ONE_SENTENCE[0]},
             {"op": "remove", "what": "turn", "turn": 1}, {"op": "remove", "what": "turn", "turn": 0},
             {"op": "add", "what": "turn", "turn": 0, "text": "i lost it .", "by": "speaker"},
             {"op": "add", "what": "turn", "turn": 1, "text": "so sad .", "by": "listener"}]
    for name in ("case", "cem", "multi-trs"):
        now = responder(name).explain(HISTORY, edits, config=CONFIG).as_dict()
        same = responder(name).explain(["i lost it .", "so sad .", *ONE_SENTENCE], config=CONFIG).as_dict()
        assert now.pop("change")["before"] == explained(name).text and now.pop("edits") == tuple(edits)
        for one in (now, same):
            one.pop("graphs"), one.pop("change", None), one.pop("edits", None)
        assert flat(now) == pytest.approx(flat(same), abs=1e-9)


def test_a_source_is_dropped_whole():
    found = explained("case")
    for kind, sort in (("inferences", "inference"), ("reactions", "reaction"), ("concepts", "concept")):
        dropped = responder("case").explain(HISTORY, [{"op": "remove", "what": "source", "source": kind}], config=CONFIG)
        each = [{"op": "remove", "what": sort, "text": item.text} | ({"relation": item.relation} if sort == "inference" else {})
                for item in getattr(found, kind)]
        one_by_one = responder("case").explain(HISTORY, each, config=CONFIG)
        assert not getattr(dropped, kind) and dropped.log_p == near(one_by_one.log_p) and dropped.words == one_by_one.words


def test_the_gate_is_set_and_all_that_follows_from_it():
    found, gate = explained("case"), {"op": "set", "what": "gate"}
    same = responder("case").explain(HISTORY, [{**gate, "value": found.gate}], config=CONFIG)
    assert dict(same.emotions) == pytest.approx(dict(found.emotions), abs=1e-9)
    assert same.log_p == near(found.log_p) and same.change.gate == (near(found.gate), near(found.gate))
    item = same.concepts[0]  # what is left out beside a gate that is set does not move it
    without = [{**gate, "value": found.gate}, {"op": "remove", "what": "concept", "text": item.text}]
    assert responder("case").explain(HISTORY, without, found.text, CONFIG, ()).log_p == near(same.log_p - item.effect)
    for value, other in ((0, "concepts"), (1, "reactions")):  # the side that has no share changes no emotion
        drop = {"op": "remove", "what": "source", "source": other}
        set_, both = (responder("case").explain(HISTORY, edits, config=CONFIG)
                      for edits in ([{**gate, "value": value}], [drop, {**gate, "value": value}]))
        assert set_.gate == value and dict(set_.emotions) != pytest.approx(dict(found.emotions), abs=1e-6)
        assert dict(both.emotions) == pytest.approx(dict(set_.emotions), abs=1e-9)
    with pytest.raises(EditError, match=r"edit 1 \(set gate\): the model kemp has no gate"):
        responder("kemp").explain(HISTORY, [{**gate, "value": 0}])


def test_words_that_changed_are_marked():
    change = responder("case").explain(HISTORY, [{"op": "replace", "what": "turn", "turn": 2, "with": "so happy !"}],
                                       config=CONFIG).change
    before, after = explained("case").words, [word for _, _, words in change.words for word in words]
    assert tuple(word for _, words, _ in change.words for word in words) == before
    assert tokenize(change.after) == after and {op for op, *_ in change.words} <= {"equal", "replace", "delete", "insert"}
    assert [abs(b - a) for _, a, b in change.emotions] == sorted((abs(b - a) for _, a, b in change.emotions), reverse=True)


@pytest.mark.parametrize(("edit", "said"), [
    ("x", r"edit 1 \(no object\): an edit is an object such as"),
    ({"op": "move", "what": "turn"}, r"edit 1 \(move turn\): there is no such edit; there are remove inference, "),
    ({"op": "remove", "what": "concept"}, r"edit 1 \(remove concept\): text must be given"),
    ({"op": "remove", "what": "concept", "text": "sad", "to": 1}, "to has no meaning here; it takes text"),
    ({"op": "remove", "what": "concept", "text": 3}, "text must be a text, not 3"),
    ({"op": "remove", "what": "concept", "text": "grieff"}, "there is no concept 'grieff'; did you mean 'grief'"),
    ({"op": "add", "what": "concept", "text": "zorb", "token": "exam"}, "'zorb' is no word of the vocabulary"),
    ({"op": "add", "what": "concept", "text": "<eos>", "token": "exam"}, "'<eos>' is no word of the vocabulary"),
    ({"op": "add", "what": "concept", "text": "rain", "token": "exam"}, "'rain' has no known emotion intensity: give intensity"),
    ({"op": "add", "what": "concept", "text": "rain", "token": "cake", "intensity": 1}, "there is no word of the context 'cake'"),
    ({"op": "add", "what": "concept", "text": "rain", "token": "exam", "intensity": 2}, "intensity must be a number from 0 to 1"),
    ({"op": "add", "what": "concept", "text": "grief", "token": "exam"}, "the concept 'grief' is there already"),
    ({"op": "remove", "what": "inference", "relation": "xReact", "text": "x"}, "relation must be xIntent or xNeed or xWant or"),
    ({"op": "remove", "what": "inference", "relation": "xNeed", "text": "x"}, "there is no xNeed inference 'x'"),
    ({"op": "add", "what": "inference", "relation": "xNeed", "text": " "}, "text is blank"),
    ({"op": "add", "what": "inference", "relation": "xNeed", "text": "x", "of": 3}, "of must be a whole number from 0 to 2"),
    ({"op": "add", "what": "reaction", "text": "x", "of": True}, "of must be a whole number"),
    ({"op": "remove", "what": "turn", "turn": 2}, "must end with a turn of the speaker's"),
    ({"op": "replace", "what": "turn", "turn": 3, "with": "x"}, "turn must be a whole number from 0 to 2, not 3"),
    ({"op": "add", "what": "turn", "turn": 0, "text": "x", "by": "me"}, "by must be speaker or listener, not 'me'"),
    ({"op": "set", "what": "gate", "value": float("nan")}, "value must be a number from 0 to 1, not nan"),
    ({"op": "remove", "what": "source", "source": "K_CS"}, "source must be inferences or reactions or concepts, not 'K_CS'"),
])
def test_an_edit_that_cannot_be_carried_out_is_named(edit, said):
    with pytest.raises(EditError, match=said):
        responder("case").explain(HISTORY, [edit])
    with pytest.raises(EditError, match="edit 2"):
        responder("case").explain(HISTORY, [{"op": "set", "what": "gate", "value": 1}, edit])


def test_what_a_model_does_not_read_cannot_be_edited():
    for name, what in (("multi-trs", "reaction"), ("transformer", "concept"), ("cem", "concept"), ("kemp", "reaction")):
        with pytest.raises(EditError, match=f"the model {name} reads no {what}s"):
            responder(name).explain(HISTORY, [{"op": "remove", "what": what, "text": "sad"}])
    with pytest.raises(EditError, match="cem reads what is inferred from the whole utterance alone: of must be 0"):
        responder("cem").explain(HISTORY, [{"op": "add", "what": "reaction", "text": "sad", "of": 1}])


def test_what_cannot_be_explained_is_said(sample_store):
    for given, said in (({"reply": " "}, "the reply to be explained is blank"), ({"edits": "no"}, "edits must be a list of"),
                        ({"effects": ["words"]}, "no effects of words; there are those of inferences, reactions, concepts")):
        with pytest.raises(ConfigError, match=said):
            responder("case").explain(HISTORY, **given)
    with pytest.raises(ConfigError, match="has another vocabulary than the run"):
        responder("case").explain_stored(sample_store, "test", [0])
    of_sample = Responder(tiny("case", len(sample_store.featurizer.vocabulary)), sample_store.featurizer, Made)
    with pytest.raises(ConfigError, match="index 9999 is outside"):
        of_sample.explain_stored(sample_store, "test", [0, 9999])
    with pytest.raises(ConfigError, match="split 'dev' is not in this store"):
        of_sample.explain_stored(sample_store, "dev", [0])


def test_a_case_study_marks_what_a_reply_took_from_its_knowledge_and_no_text_is_markup():
    found = explained("case")
    used = max(found.inferences, key=lambda item: item.effect)
    word = next(word for word in used.text.split() if word not in found.words)
    told = replace(found, text=f"so {word} | *_$ 5% <b>", turns=(Turn("a | b & c_d {e} \\x", True),))
    case = Case("test 0", "sad", "I_see ~ #1", [("Mine & yours", told), ("other", explained("transformer"))])
    shown = markdown([case])
    assert f"so **{word}** \\| \\*\\_$ 5% \\<b\\> ({found.emotion})" in shown and "a \\| b & c\\_d {e} \\\\x" in shown
    assert f"{used.text} (+{used.effect:.3f})" in shown and "other: " not in shown and "| **other** | " in shown
    assert all(line.count("|") - line.count("\\|") == 3 for line in shown.splitlines() if line.startswith("|"))
    shown = latex([case, case])
    assert rf"so \textbf{{{word}}} \textbar{{}} *\_\$ 5\% \textless{{}}b\textgreater{{}} ({found.emotion})" in shown
    assert r"a \textbar{} b \& c\_d \{e\} \textbackslash{}x" in shown and r"I\_see \textasciitilde{} \#1" in shown


def test_unknown_words_of_a_given_reply_are_named():
    found = responder("case").explain(HISTORY, reply="a zorb for you .", config=CONFIG, effects=())
    assert found.given and found.unknown_in_reply == ("zorb", "for") and found.score is None
    assert "for" not in WORDS and len(found.words) == 5
