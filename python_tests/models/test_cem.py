"""CEM against its slow form, and what must hold of its selection, its relations and its losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import as_double, close, handmade_examples, parameter_count, random_examples, same, tiny_vocabulary
from slow_cem import SlowCEM

from case_fast.batch import Batch
from case_fast.data.featurizer import Example, TextTable
from case_fast.data.pack import make_batch
from case_fast.data.vocabulary import CLS
from case_fast.errors import ConfigError
from case_fast.models import build
from case_fast.models.cem import CEM, CEMConfig

TINY = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12, "attention_width": 8}
FRAME = {"attention_width": None}
CONFIGS = {"": {}, **CEMConfig.ablations, "frame": FRAME, "two layers": {"layers": 2}, "w/o Cog, Div": {"cognition": False,
           "gamma_diversity": 0.0}}


def model_of(**changes: object) -> CEM:
    torch.manual_seed(0)
    return build("cem", **TINY | changes).double().eval()


def packed(examples: list[Example], texts: TextTable) -> Batch:
    return as_double(make_batch(examples, texts, CEM.needs))


@pytest.mark.parametrize(("recipe", "words", "expected"), [
    ("released", 22_796, 16_580_096), ("released", 100, 2_939_800), ("frame", 22_796, 19_304_996),
])
def test_as_many_parameters_as_the_closed_form_says(recipe, words, expected):
    assert parameter_count("cem", recipe, words) == expected


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_equal_the_slow_model(changes):
    for examples, texts in (handmade_examples(), random_examples(4, seed=1)):
        model = model_of(**changes)
        model.word_counts += torch.arange(len(model.word_counts)) % 5
        slow = SlowCEM(model)
        expected, out = slow.forward(examples, texts), model(packed(examples, texts))
        for name, loss in {"loss": out.loss, "nll": out.nll, "emotions": out.emotion_logits.exp(), **out.losses}.items():
            same(loss, expected[name], 1e-9)
        assert out.losses.keys() == expected.keys() - {"loss", "nll", "emotions"}
        ours = dict(model.named_parameters())
        theirs = torch.autograd.grad(expected["loss"], [*slow.weights.values()], allow_unused=True)
        mine = torch.autograd.grad(out.loss, [ours[name] for name in slow.weights], allow_unused=True)
        for name, a, b in zip(slow.weights, mine, theirs, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                same(a, b, 1e-9)


def test_both_kinds_of_inferences_cannot_be_off():
    with pytest.raises(ConfigError, match="cannot both be off"):
        CEMConfig(cognition=False, affection=False)


def test_relations_are_strings_of_words_about_the_whole_utterance():
    examples, texts = handmade_examples()
    part = make_batch(examples, texts, ["relations"]).relations
    words = texts.vocabulary.words
    for b, e in enumerate(examples):
        for kind in range(4):
            of = [texts.text(int(t)).split() for t, s, r in zip(e.knowledge, e.knowledge_sub, e.knowledge_relation, strict=True)
                  if s == 0 and r == kind]
            row = part.cognition[part.cu_cognition[4 * b + kind] : part.cu_cognition[4 * b + kind + 1]].tolist()
            assert row[0] == CLS and [words[word] for word in row[1:]] == [w for text in of for w in text if w != "to"]
        of = [texts.text(int(t)).split() for t, s in zip(e.reaction, e.reaction_sub, strict=True) if s == 0]
        row = part.reaction[part.cu_reaction[b] : part.cu_reaction[b + 1]].tolist()
        assert [words[word] for word in row] == [word for text in of for word in text]
    assert "to" in [word for text in texts.texts for word in text.split()]


def test_without_inferences_a_relation_is_cls_alone_and_nothing_is_nan():
    examples, texts = handmade_examples()
    model, alone = model_of(), packed([examples[4]], texts)  # neither inferences nor reactions
    assert alone.relations.cognition.tolist() == [CLS] * 4 and not len(alone.relations.reaction)
    out = model(alone)
    assert torch.isfinite(out.loss) and torch.isfinite(out.emotion_logits).all()
    parts = model._cognition(alone, model.look_up(model._words(alone)), model.read(alone).memories[0].rows)
    assert all(part.equal(parts[0]) for part in parts[1:])  # equal h_r give equal U_r


def test_diversity_is_an_addition_that_counts_alone_can_turn():
    examples, texts = random_examples(5, seed=3)
    batch, model = packed(examples, texts), model_of()
    out = model(batch)
    same(out.losses["diversity"], out.losses["generation"], 1e-12)  # nothing said yet: all weights 1
    same(out.loss, 2.5 * out.losses["generation"] + out.losses["emotion"], 1e-12)
    without = model_of(gamma_diversity=0.0)
    without.load_state_dict(model.state_dict())
    same(without(batch).loss, out.losses["generation"] + out.losses["emotion"], 1e-12)
    before = model.word_counts.clone()
    assert model(batch).loss.equal(out.loss) and model.word_counts.equal(before)  # nothing is counted in evaluation
    model.train()(batch)
    assert model.word_counts.sum() > 0


def test_permuting_the_relations_with_their_blocks_of_the_selection_changes_nothing():
    examples, texts = random_examples(4, seed=5)
    model, order = model_of(), [2, 0, 3, 1]
    found = model(packed(examples, texts))

    def renamed(e: Example) -> Example:
        relation = np.array([order.index(kind) for kind in e.knowledge_relation], dtype=e.knowledge_relation.dtype)
        return replace(e, knowledge_relation=relation)

    with torch.no_grad():
        first, d = model.selection[0].weight, model.config.d_model
        blocks = [first[:, kind * d : (kind + 1) * d] for kind in range(5)]
        first.copy_(torch.cat([blocks[kind] for kind in [*order, 4]], 1))
    other = model(packed([renamed(e) for e in examples], texts))
    same(other.nll, found.nll, 1e-12)


def test_a_selection_of_one_block_reads_that_relation_alone():
    examples, texts = handmade_examples()
    model = model_of()
    d = model.config.d_model
    with torch.no_grad():
        model.selection[0].weight[:, d:] = 0
    batch = packed(examples[:2], texts)
    known = model.read(batch).memories[0].rows
    of = batch.relations
    sequence = torch.searchsorted(of.cu_cognition[1:], torch.arange(len(of.cognition)), right=True)
    words = torch.where((sequence % 4 != 0) & (of.cognition != CLS), of.cognition * 0 + 9, of.cognition)
    other = model.read(replace(batch, relations=replace(of, cognition=words, reaction=of.reaction * 0 + 9))).memories[0].rows
    assert close(other, known, 1e-12) and (words != of.cognition).any()
    words = torch.where((sequence % 4 == 0) & (of.cognition != CLS), of.cognition * 0 + 9, of.cognition)
    assert not close(model.read(replace(batch, relations=replace(of, cognition=words))).memories[0].rows, known, 1e-6)
