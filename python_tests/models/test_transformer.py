"""Transformer and Multi-TRS: their size, their losses, and what one is of the other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import as_double, parameter_count, random_batch, same, tiny_vocabulary

from case_fast import equations as eq
from case_fast import equations_baselines as eqb
from case_fast.models import build

TINY = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12, "attention_width": 8}


@pytest.mark.parametrize(("name", "recipe", "words", "expected"), [
    ("transformer", "released", 22_796, 14_357_396), ("transformer", "released", 100, 717_100),
    ("transformer", "frame", 22_796, 15_145_796), ("multi-trs", "released", 22_796, 14_366_996),
    ("multi-trs", "released", 100, 726_700), ("multi-trs", "frame", 22_796, 15_155_396),
])
def test_as_many_parameters_as_the_closed_form_says(name, recipe, words, expected):
    assert parameter_count(name, recipe, words) == expected


def test_label_smoothing_is_the_divergence_from_the_smoothed_target():
    words, rows, smoothing, pad = 11, 7, 0.1, 0
    shapes = (rows, 5), (words, 5), (words,)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    target = torch.randint(1, words, (rows,))
    nll, _ = eq.linear_cross_entropy(hidden, weight, bias, target)
    found = eqb.label_smoothed(nll, hidden, target, weight, bias, smoothing, pad)
    wanted = torch.full((rows, words), smoothing / (words - 2), dtype=torch.float64)
    wanted[torch.arange(rows), target] = 1 - smoothing
    wanted[:, pad] = 0
    log_probability = F.log_softmax(hidden @ weight.T + bias, -1)
    direct = F.kl_div(log_probability, wanted, reduction="none").sum(-1)
    entropy = -(wanted * wanted.clamp(min=1e-300).log()).sum(-1)
    same(found, direct + entropy, 1e-12)
    leaves = (hidden, weight, bias)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(direct.sum(), leaves), strict=True):
        same(ours, theirs, 1e-12)


def test_perplexity_is_of_the_plain_likelihood_and_training_of_the_smoothed_one():
    batch = random_batch(4)
    model = build("transformer", **TINY, label_smoothing=0.2)
    trained, measured = model.train()(batch), model.eval()(batch)
    assert trained.losses.keys() == {"generation", "smoothed"} and measured.losses.keys() == {"generation"}
    assert trained.loss.equal(trained.losses["smoothed"]) and measured.loss.equal(measured.losses["generation"])
    same(trained.losses["generation"], trained.nll.mean(), 1e-6)


def test_smoothing_keeps_float32_under_bf16_autocast():
    batch = random_batch(8)
    model = build("transformer", **TINY).train()
    exact = model(batch).losses["smoothed"]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch).losses["smoothed"]
    assert found.dtype == torch.float32 and abs(found - exact) <= 0.02 * exact.abs()


def test_multi_trs_without_its_emotion_loss_is_the_transformer_bit_for_bit():
    batch = random_batch(5)
    torch.manual_seed(0)
    one = build("transformer", **TINY).train()
    other = build("multi-trs", **TINY, gamma_emotion=0.0).train()
    assert other.load_state_dict(one.state_dict(), strict=False).missing_keys == ["w_emo"]
    assert one(batch).emotion_logits is None and other(batch).emotion_logits.shape == (5, 32)
    one(batch).loss.backward()
    other(batch).loss.backward()
    for name, parameter in one.named_parameters():
        assert parameter.grad.equal(other.get_parameter(name).grad), name


def test_an_emotion_head_of_zeros_knows_nothing():
    batch = random_batch(6)
    model = build("multi-trs", **TINY).double().eval()
    with torch.no_grad():
        model.w_emo.zero_()
    out = model(as_double(batch))
    same(out.losses["emotion"], math.log(32), 1e-12)


@pytest.mark.parametrize(("scale", "expected"), [("one", 1.0), ("dialogue", 6 / 40), ("batch", 1 / 40)])
def test_the_emotion_loss_is_scaled_as_named(scale, expected):
    assert eqb.emotion_scale(scale, 6, 40) == expected
    batch = random_batch(6)
    model = build("multi-trs", **TINY, emotion_scale=scale, label_smoothing=0.0).eval()
    out = model(batch)
    weight = eqb.emotion_scale(scale, 6, batch.target.numel())
    same(out.loss, out.losses["generation"] + weight * out.losses["emotion"], 1e-6)
