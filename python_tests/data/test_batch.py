"""Packing examples: every field of a batch against a slow loop in plain Python."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import random_examples, split_rows, tensors
from torch import Tensor

from case_fast.batch import PARTS, Batch, CasePart, Graphs
from case_fast.data.empathetic_dialogues import Turn
from case_fast.data.featurizer import Example, FeatureSettings, Featurizer, TextTable
from case_fast.data.pack import make_batch
from case_fast.data.text import stop_words
from case_fast.data.vocabulary import BOS, CLS, EOS, LISTENER, SEP, SPEAKER, SPECIALS, Vocabulary
from case_fast.errors import ConfigError


def slow_batch(examples: list[Example], texts: TextTable) -> dict[str, list]:
    """The fields of the batch and of its parts as plain lists, one dialogue after the other, no arithmetic on whole arrays."""
    home = {item.name: "" for item in fields(Batch) if item.name not in ("size", "longest", "seed", "others", *PARTS)}
    home |= {item.name: "case." for item in fields(CasePart)}
    out: dict[str, list] = {name: [0] if name.startswith("cu_") else [] for name in home}
    concept: dict[str, list] = {name: [] for name in ("word", "position", "type", "intensity")}
    said_by_row: list[bool] = []
    graphs = {name: {item.name: [] for item in fields(Graphs)} for name in ("cognition", "concept")}
    for graph in graphs.values():
        graph["indptr"], graph["cu_vertices"] = [0], [0]
    text_row: dict[int, int] = {}
    used = {int(t) for e in examples for t in [*e.sub_utterance, *e.knowledge]}
    for text in sorted(used):
        text_row[text] = len(text_row)
        out["text"] += [CLS, *texts.tokens(text).tolist()]
        out["cu_text"].append(len(out["text"]))

    for dialogue, e in enumerate(examples):
        context, response = e.context.tolist(), e.response.tolist()
        first_position = len(out["context"])
        out["context"] += [CLS, *context]
        out["context_role"] += [SPEAKER, *e.context_role.tolist()]
        out["cu_context"].append(len(out["context"]))
        positions = list(range(first_position, len(out["context"])))
        out["response"] += [CLS, *response]
        out["response_role"] += [LISTENER] * (1 + len(response))
        out["cu_response"].append(len(out["response"]))
        out["decoder_input"] += [BOS, *response]
        out["target"] += [*response, EOS]
        out["cu_target"].append(len(out["target"]))
        out["emotion"].append(e.emotion)

        subs, knowledge = e.sub_utterance.tolist(), e.knowledge.tolist()
        first_vertex = len(out["cognition_text"])
        out["cognition_text"] += [text_row[t] for t in subs + knowledge]
        row_of_text: dict[int, int] = {}
        for sub, text in enumerate(subs):
            if text in row_of_text:
                continue
            row_of_text[text] = len(out["reaction_dialogue"])
            said = [t for t, s in zip(e.reaction.tolist(), e.reaction_sub.tolist(), strict=True) if s == sub]
            row = [word for t in said for word in texts.tokens(t).tolist()]
            out["reaction"] += row
            out["cu_reaction"].append(len(out["reaction"]))
            said_by_row.append(bool(row))
            out["reaction_dialogue"].append(dialogue)
            out["reaction_context"] += positions
            out["cu_reaction_context"].append(len(out["reaction_context"]))
        out["reaction_first"].append(row_of_text[subs[0]])
        for place, sub in enumerate(e.knowledge_sub.tolist()):
            out["knowledge"].append(first_vertex + len(subs) + place)
            out["knowledge_dialogue"].append(dialogue)
            out["knowledge_reaction"].append(row_of_text[subs[sub]])
        out["cu_knowledge"].append(len(out["knowledge"]))
        if knowledge:
            out["known"].append(dialogue)

        concept["word"] += [CLS, *context, *e.concept.tolist()]
        concept["position"] += [*range(1 + len(context)), *e.concept_position.tolist()]
        concept["type"] += [0] * (1 + len(context)) + [1] * len(e.concept)
        concept["intensity"] += [0.0, *e.context_intensity.tolist(), *e.concept_intensity.tolist()]
        for name, graph in graphs.items():
            csr = getattr(e, f"{name}_graph")
            vertices = len(csr.indptr) - 1
            first, edges = graph["cu_vertices"][-1], len(graph["indices"])
            for vertex in range(vertices):
                graph["indptr"].append(edges + int(csr.indptr[vertex + 1]))
                graph["dialogue"].append(dialogue)
            graph["indices"] += [first + int(v) for v in csr.indices]
            graph["relation"] += csr.relation.tolist()
            graph["cu_vertices"].append(first + vertices)
    for rows in ("context", "target", "response", "text", "reaction", "reaction_context"):
        sequences = list(enumerate(pairwise(out[f"cu_{rows}"])))
        for name, of_row in (("position", lambda s, a, i: i - a), ("segment", lambda s, a, i: s)):
            if f"{rows}_{name}" in home:
                out[f"{rows}_{name}"] = [of_row(s, a, i) for s, (a, b) in sequences for i in range(a, b)]
    words = [b - a for a, b in pairwise(out["cu_target"])]
    out["sizes"] = [len(examples), sum(words)]
    out["dialogue_weight"], out["target_weight"] = [1 / len(examples)] * len(examples), [1 / sum(words)] * sum(words)
    out["bow_weight"] = [1 / (len(examples) * m) for m in words for _ in range(m)]
    out["with_reaction"] = [row for row, said in enumerate(said_by_row) if said]
    for place, row in enumerate(out["knowledge_reaction"]):
        if said_by_row[row]:
            out["paired"].append(place)
            out["positive"].append(out["with_reaction"].index(row))
    for own in out["positive"]:
        out["negatives_affection"].append(sum(row != own for row in range(len(out["with_reaction"]))))
        out["negatives_cognition"].append(sum(other != own for other in out["positive"]))
    out["coarse_sizes"] = [len(out["known"])] * 2
    out["fine_sizes"] = [len(out["paired"]), len(out["with_reaction"])]
    rows = list(zip(out["text"], out["text_position"], strict=True))
    distinct = sorted(set(rows))
    out["distinct_word"], out["distinct_position"] = map(list, zip(*distinct, strict=True))
    out["text_distinct"] = [distinct.index(row) for row in rows]
    del out["cognition"]
    found = {f"relations.{name}": values for name, values in slow_relations(examples, texts).items()}
    found |= {f"emotional.{name}": values for name, values in slow_emotional(examples, texts).items()}
    found |= {f"feedback.{name}": values for name, values in slow_feedback(examples, texts).items()}
    found |= {home[name] + name: values for name, values in out.items()} | {f"concept.{name}": x for name, x in concept.items()}
    found |= {f"case.cognition.{part}": values for part, values in graphs["cognition"].items()}
    return found | {f"concept.graph.{part}": values for part, values in graphs["concept"].items()}


def slow_relations(examples: list[Example], texts: TextTable) -> dict[str, list]:
    """The strings of the relations of each whole utterance, likewise."""
    unsaid = [texts.vocabulary.ids.get(word) for word in ("to", "none")]
    out: dict[str, list] = {"cognition": [], "cognition_position": [], "cu_cognition": [0], "reaction": [],
                            "reaction_position": [], "reaction_segment": [], "cu_reaction": [0]}

    def strung(texts_of: list[int]) -> list[int]:
        return [word for text in texts_of for word in texts.tokens(text).tolist() if word not in unsaid]

    for dialogue, e in enumerate(examples):
        known = list(zip(e.knowledge.tolist(), e.knowledge_sub.tolist(), e.knowledge_relation.tolist(), strict=True))
        felt = strung([text for text, sub in zip(e.reaction.tolist(), e.reaction_sub.tolist(), strict=True) if sub == 0])
        rows = [[CLS, *strung([text for text, sub, relation in known if (sub, relation) == (0, kind)])] for kind in range(4)]
        for name, row in [*(("cognition", row) for row in rows), ("reaction", felt)]:
            out[name] += row
            out[f"{name}_position"] += range(len(row))
            out[f"cu_{name}"].append(len(out[name]))
        out["reaction_segment"] += [dialogue] * len(felt)
    return out


def slow_emotional(examples: list[Example], texts: TextTable) -> dict[str, list]:
    """[SEP] and the emotional words of each context, likewise."""
    out: dict[str, list] = {"word": [], "position": [], "segment": [], "cu": [0]}
    for dialogue, e in enumerate(examples):
        row = [SEP]
        for word, intensity in zip(e.context.tolist(), e.context_intensity.tolist(), strict=True):
            if intensity != 0 and texts.vocabulary.words[word] not in stop_words():
                row.append(word)
        out["word"] += row
        out["position"] += range(len(row))
        out["segment"] += [dialogue] * len(row)
        out["cu"].append(len(out["word"]))
    return out


def slow_feedback(examples: list[Example], texts: TextTable) -> dict[str, list]:
    """What the speaker says after each reply, and what the reply is judged by, likewise."""
    lexicon = [texts.emotional.intensity.get(word, 0) != 0 and word not in stop_words() for word in texts.vocabulary.words]
    out: dict[str, list] = {name: [] for name in ("dialogue", "weight", "word", "emotional", "reply", "reply_segment",
                                                  "reply_emotional")}
    out |= {name: [0] for name in ("cu", "cu_emotional", "cu_reply", "cu_reply_emotional")} | {"lexicon": lexicon}
    row = 0
    for dialogue, e in enumerate(examples):
        target = [*e.response.tolist(), EOS]
        if said := e.feedback.tolist():
            out["word"] += said
            out["emotional"] += [word for word in said if lexicon[word]]
            out["reply"] += range(row, row + len(target))
            out["reply_segment"] += [len(out["dialogue"])] * len(target)
            out["reply_emotional"] += [row + place for place, word in enumerate(target) if lexicon[word]]
            out["dialogue"].append(dialogue)
            for cu, rows in (("cu", "word"), ("cu_emotional", "emotional"), ("cu_reply", "reply"),
                             ("cu_reply_emotional", "reply_emotional")):
                out[cu].append(len(out[rows]))
        row += len(target)
    out["weight"] = [1 / len(out["dialogue"])] * len(out["dialogue"]) if out["dialogue"] else []
    return out


def check(examples: list[Example], texts: TextTable) -> Batch:
    batch = make_batch(examples, texts)
    assert batch.size == len(batch) == len(examples)
    found = dict(tensors(batch))
    assert found.pop("seed").item() == 0
    assert batch.longest == 1 + max(int(x.max()) for name, x in found.items() if name.endswith("position") and x.numel())
    expected = slow_batch(examples, texts)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        tensor = found[name]
        if name == "concept.intensity":
            assert tensor.dtype == torch.float32
        elif name.endswith("weight"):
            assert tensor.dtype == torch.float64
        elif name == "feedback.lexicon":
            assert tensor.dtype == torch.bool
        else:
            small = name.rpartition(".")[2] in ("indptr", "indices", "relation")
            assert tensor.dtype == (torch.int32 if small else torch.int64), name
        assert tensor.is_contiguous() and tensor.dim() == 1, name
        assert tensor.tolist() == values, name
    return batch


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [1, 2, 7])
def test_ragged_examples_are_packed_as_by_a_slow_loop(count, seed):
    check(*random_examples(count, seed))


def test_examples_may_come_twice_and_in_any_order():
    examples, texts = random_examples(5, seed=3)
    check([examples[2], examples[2]], texts)
    check(examples[::-1], texts)


def test_each_dialogue_is_as_if_alone():
    examples, texts = random_examples(6, seed=9)
    together = make_batch(examples, texts)
    for place, example in enumerate(examples):
        alone = make_batch([example], texts)
        rows = (("", "context", "cu_context"), ("", "target", "cu_target"), ("case", "response_role", "cu_response"))
        for part, field, cu in rows:
            whole, own = (getattr(batch, part) if part else batch for batch in (together, alone))
            assert split_rows(getattr(whole, field), getattr(whole, cu))[place].tolist() == getattr(own, field).tolist()
        graph = together.concept.graph
        edges = graph.indptr[graph.cu_vertices[place : place + 2]].tolist()
        moved = graph.indices[edges[0] : edges[1]] - graph.cu_vertices[place]
        assert moved.tolist() == alone.concept.graph.indices.tolist()


# ---- the corner cases by hand

VOCABULARY = Vocabulary([*SPECIALS, *"a b c d e . happy".split()])
MAKE = Featurizer(VOCABULARY, {}, {}, FeatureSettings())


def example(said: str, inferences: dict, texts: TextTable, response: str = "c .") -> Example:
    return MAKE.example([Turn(said, True)], inferences, texts, response)


def test_equal_sub_utterances_share_a_reaction_row():
    texts = MAKE.text_table()
    one = example("a b .", {"a b .": {"xReact": ["happy", "d"], "xWant": ["c", "e"]}}, texts)  # u_0 = u_1
    three = example("a . a . b .", {"a .": {"xReact": ["e"], "xNeed": ["d"]}, "b .": {"xWant": ["a"]}}, texts)  # u_1 = u_2
    batch = check([one, three], texts)
    assert batch.case.reaction_dialogue.tolist() == [0, 1, 1, 1]  # rows: u; u_0, u_1, u_3
    assert [row.tolist() for row in split_rows(batch.case.reaction, batch.case.cu_reaction)] == [
        VOCABULARY.encode(["happy", "d"]), [], VOCABULARY.encode(["e"]), [],
    ]
    assert batch.case.reaction_first.tolist() == [0, 1] and batch.case.with_reaction.tolist() == [0, 2]
    # the knowledge of u_0 and that of u_1 belong to the one row; of the other dialogue to u_1 twice, and to u_3
    assert batch.case.knowledge_reaction.tolist() == [0, 0, 0, 0, 2, 2, 3]
    assert batch.case.paired.tolist() == [0, 1, 2, 3, 4, 5] and batch.case.positive.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.case.negatives_affection.tolist() == [1] * 6 and batch.case.negatives_cognition.tolist() == [2] * 4 + [4] * 2


def test_dialogues_with_one_sentence_text_do_not_share_rows_across_dialogues():
    texts = MAKE.text_table()
    inferences = {"a .": {"xReact": ["d"]}}
    batch = check([example("a .", inferences, texts), example("a .", inferences, texts)], texts)
    assert batch.case.reaction_dialogue.tolist() == [0, 1]
    assert batch.case.cu_text.tolist() == [0, 3]  # the text itself is encoded once


def test_an_example_may_lack_knowledge_words_and_reply():
    texts = MAKE.text_table()
    batch = check([example("", {}, texts, "")], texts)
    assert batch.context.tolist() == [CLS] and batch.target.tolist() == [EOS] and batch.decoder_input.tolist() == [BOS]
    assert batch.case.knowledge.shape == batch.case.reaction.shape == (0,) and batch.case.with_reaction.tolist() == []
    assert batch.case.cu_knowledge.tolist() == [0, 0] and batch.concept.word.tolist() == [CLS]
    check([example("", {}, texts, ""), example("a . b", {"b": {"xWant": ["c"]}}, texts)], texts)


def test_an_example_may_have_reactions_alone_or_one_relation():
    texts = MAKE.text_table()
    check([example("a", {"a": {"xReact": ["b"]}}, texts)], texts)
    for relation in ("xIntent", "xNeed", "xWant", "xEffect"):
        batch = check([example("a", {"a": {relation: ["b"]}}, texts)], texts)
        assert batch.case.knowledge.tolist() == [2, 3] and batch.case.with_reaction.tolist() == []


def test_a_word_is_emotional_if_it_is_of_the_lexicon_and_no_stop_word():
    intensity = {"a": 0.5, "happy": 0.9, "c": -0.02}  # "a" is a stop word
    make = Featurizer(VOCABULARY, {}, intensity, FeatureSettings(max_context=4))
    texts = make.text_table()
    turns = [[Turn("happy d a c happy b", True)], [Turn("d .", True)], [Turn("", True)]]
    batch = check([make.example(said, {}, texts, "b") for said in turns], texts)
    rows = split_rows(batch.emotional.word, batch.emotional.cu)
    assert [VOCABULARY.decode(row.tolist()) for row in rows] == [["<sep>", "c", "happy"], ["<sep>"], ["<sep>"]]


def test_a_list_of_emotion_words_takes_the_place_of_the_lexicon():
    intensity = {"a": 0.5, "happy": 0.9, "joyful": 0.9}  # the last is no word of the vocabulary
    said, reply, after = [Turn("happy d a joyful b", True)], "happy d c", "d b happy joyful"
    for listed, context, answer, feedback in ((None, ["happy", "<unk>"], ["happy"], ["happy"]),
                                              (["d", "a", "joyful"], ["d"], ["d"], ["d"]), ([], [], [], [])):
        make = Featurizer(VOCABULARY, {}, intensity, FeatureSettings(), listed)
        texts = make.text_table()
        batch = make_batch([make.example(said, {}, texts, reply, feedback=after)], texts)
        part = batch.feedback
        assert VOCABULARY.decode(batch.emotional.word.tolist()) == ["<sep>", *context]
        assert VOCABULARY.decode(batch.target[part.reply_emotional].tolist()) == answer
        assert VOCABULARY.decode(part.emotional.tolist()) == feedback
        assert [word for word, marked in zip(VOCABULARY.words, part.lexicon.tolist(), strict=True) if marked] == feedback


def test_texts_that_know_no_emotional_words_are_refused_where_they_are_asked_for():
    texts = TextTable(VOCABULARY)
    examples = [example("a .", {}, texts)]
    make_batch(examples, texts, ["case", "concept", "relations"])
    for part in ("emotional", "feedback"):
        with pytest.raises(ConfigError, match="make it with featurizer.text_table"):
            make_batch(examples, texts, [part])


def test_only_the_parts_asked_for_are_packed_and_a_missing_one_is_named():
    examples, texts = random_examples(3, seed=4)
    whole, words = make_batch(examples, texts), make_batch(examples, texts, ["dialogue"], seed=7)
    assert words.case is None and words.concept is None and words.seed.item() == 7 and whole.seed.item() == 0
    assert words.seed.dtype == torch.int64 and words.seed.shape == () and words.to("meta").seed.is_meta
    assert all(torch.equal(tensor, dict(tensors(whole))[name]) for name, tensor in tensors(words) if name != "seed")
    assert whole.require(PARTS) is whole and make_batch(examples, texts, ["concept"]).case is None
    missing = "case, concept, relations, emotional, feedback"
    with pytest.raises(ConfigError, match=f"lacks what the model reads: {missing}; make it with store.batch"):
        words.require(PARTS)
    with pytest.raises(ConfigError, match="no part colour; it has dialogue, case, concept"):
        make_batch(examples, texts, ["case", "colour"])


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        make_batch([], MAKE.text_table())


def test_to_moves_every_tensor_and_keeps_the_rest():
    examples, texts = random_examples(3, seed=1)
    batch = make_batch(examples, texts)
    moved = batch.to("meta")
    assert type(moved) is Batch and type(moved.case.cognition) is Graphs and moved.size == 3
    before, after = dict(tensors(batch)), dict(tensors(moved))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.device.type == "meta" and tensor.shape == before[name].shape and tensor.dtype == before[name].dtype
    assert all(tensor.device.type == "cpu" for tensor in before.values())  # the batch itself is left as it is
    same = batch.to("cpu", non_blocking=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(same))


def test_a_batch_owns_its_memory():
    """Changing a batch never changes the examples (or the mapped file) that it was made from."""
    examples, texts = random_examples(1, seed=2)
    (e,) = examples
    before = [np.array(part) for part in (e.context, e.concept_intensity, e.cognition_graph.indices)]
    batch = make_batch(examples, texts)
    for _, tensor in tensors(batch):
        assert isinstance(tensor, Tensor)
        tensor.zero_()
    for part, copy in zip((e.context, e.concept_intensity, e.cognition_graph.indices), before, strict=True):
        assert np.array_equal(part, copy)
