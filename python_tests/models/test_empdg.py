"""EmpDG's generator against its slow form, and what must hold of its emotional words, its memory and its first word."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import as_double, close, handmade_examples, parameter_count, random_examples, same, split_rows, tiny_vocabulary
from slow_empdg import SlowEmpDG
from torch import Tensor

from case_fast import equations_baselines as eqb
from case_fast.batch import Batch, EmotionalPart
from case_fast.data.pack import make_batch
from case_fast.data.vocabulary import BOS, SEP
from case_fast.generation import GenerationConfig, generate
from case_fast.models import build
from case_fast.models.empdg import EmpDG
from case_fast.ops.reference import segment_ids

TINY = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12, "attention_width": 8, "label_smoothing": 0.0}
CONFIGS = {"": {}, "frame": {"attention_width": None, "emotion_scale": "one"}, "two layers": {"layers": 2}}


def model_of(**changes: object) -> EmpDG:
    torch.manual_seed(0)
    return build("empdg", **TINY | changes).double().eval()


def batch_of(count: int, seed: int = 0) -> Batch:
    return as_double(make_batch(*random_examples(count, seed), EmpDG.needs))


@pytest.mark.parametrize(("recipe", "words", "expected"), [
    ("released", 22_796, 14_198_846), ("released", 100, 558_550), ("frame", 22_796, 15_717_296),
])
def test_as_many_parameters_as_the_closed_form_says(recipe, words, expected):
    assert parameter_count("empdg", recipe, words) == expected


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_equal_the_slow_model(changes):
    for examples, texts in (handmade_examples(), random_examples(4, seed=1)):
        model, batch = model_of(**changes), as_double(make_batch(examples, texts, EmpDG.needs))
        slow = SlowEmpDG(model)
        expected, out = slow.forward(examples, texts), model(batch)
        found = {"loss": out.loss, "nll": out.nll, "emotions": out.emotion_logits.exp(), **out.losses}
        for name, value in {**found, "memory": model.read(batch).memories[0].rows}.items():
            same(value, expected[name], 1e-9)
        assert out.losses.keys() == {"generation", "emotion"}
        ours = dict(model.named_parameters())
        theirs = torch.autograd.grad(expected["loss"], [*slow.weights.values()])
        mine = torch.autograd.grad(out.loss, [ours[name] for name in slow.weights])
        for a, b in zip(mine, theirs, strict=True):
            same(a, b, 1e-9)


def packed(sizes: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of sequences of these sizes, their offsets and their segments."""
    cu = torch.tensor([0, *sizes]).cumsum(0)
    rows = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    return rows, cu, segment_ids(cu, sum(sizes))


def test_rows_are_interleaved_as_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    for sizes in (([2, 1, 4], [1, 3, 2]), ([3, 0, 2, 0], [0, 2, 1, 0]), ([0, 0], [0, 0]), ([5], [1])):
        (a, cu_a, of_a), (b, cu_b, of_b) = (packed(own, generator) for own in sizes)
        rows, cu = eqb.interleave(a, cu_a, of_a, b, cu_b, of_b)
        pairs = [torch.cat(pair) for pair in zip(split_rows(a, cu_a), split_rows(b, cu_b), strict=True)]
        expected = torch.cat(pairs)
        assert rows.equal(expected) and cu.diff().tolist() == [len(pair) for pair in pairs] and cu[0] == 0
        weight = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        mine, theirs = (torch.autograd.grad((x * weight).sum(), (a, b)) for x in (rows, expected))
        assert all(x.equal(y) for x, y in zip(mine, theirs, strict=True))


def test_emotional_words_in_another_order_differ_by_their_positions_alone():
    model, batch = model_of(), batch_of(6, seed=2)
    part, order = batch.emotional, torch.arange(len(batch.emotional.word))
    for start, end in zip(part.cu[:-1].tolist(), part.cu[1:].tolist(), strict=True):
        order[start + 1 : end] = order[start + 1 : end].flip(0)  # [SEP] stays the first
    assert not part.word[order].equal(part.word)

    def nll(**changes: Tensor) -> Tensor:
        return model(replace(batch, emotional=replace(part, **changes))).nll

    same(nll(word=part.word[order], position=part.position[order]), nll(), 1e-12)
    assert not close(nll(word=part.word[order]), nll(), 1e-6)


def test_without_an_emotional_word_the_memory_is_the_context_and_one_row():
    examples, texts = handmade_examples()
    model, batch = model_of(), as_double(make_batch([examples[4], examples[0]], texts, EmpDG.needs))
    assert split_rows(batch.emotional.word, batch.emotional.cu)[0].tolist() == [SEP]
    (memory,) = model.read(batch).memories
    context = model._encoded(batch, model.look_up(model._words(batch)))
    first, second = split_rows(memory.rows, memory.cu)
    whole, other = split_rows(context, batch.cu_context)
    same(first[:-1], whole, 1e-12)
    assert len(first) == len(whole) + 1 and len(second) > len(other) + 1


def test_a_first_word_that_is_bos_gives_the_replies_of_a_decoder_begun_with_bos():
    model, batch = model_of(), batch_of(5, seed=3)
    with torch.no_grad():
        model.output.weight *= 8  # replies that differ
    config = GenerationConfig(max_words=8)
    plain = replace(model.read(batch), start=None)
    own = generate(model, batch, config)
    with torch.no_grad():
        model.first_word.weight.zero_()
        model.first_word.bias.copy_(model.embedding.weight[BOS] * model.config.d_model**0.5)
    found, expected = generate(model, batch, config), generate(model, batch, config, reading=plain)
    assert [reply.words for reply in found] == [reply.words for reply in expected] != [reply.words for reply in own]
    words, cu = batch.decoder_input, batch.cu_target
    same(model.reply_logits(words, cu, model.read(batch)), model.reply_logits(words, cu, plain), 1e-12)


def test_the_emotion_is_read_of_both_first_rows():
    model, batch = model_of(), batch_of(4)
    with torch.no_grad():
        model.w_emo[:, :16] = 0  # of the context alone
    same(model.read(batch).emotion_logits, model.read(replace(batch, emotional=of_one_word(batch))).emotion_logits, 1e-12)
    with torch.no_grad():
        model.w_emo.copy_(model.w_emo.roll(16, 1))  # of the emotional words alone
    found = model.read(batch).emotion_logits
    same(model.read(replace(batch, context=batch.context * 0 + 9)).emotion_logits, found, 1e-12)
    assert not close(model.read(replace(batch, emotional=of_one_word(batch))).emotion_logits, found, 1e-6)


def of_one_word(batch: Batch) -> EmotionalPart:
    """Its emotional words, all of them one word."""
    part = batch.emotional
    return replace(part, word=torch.where(part.position > 0, torch.full_like(part.word, 9), part.word))
