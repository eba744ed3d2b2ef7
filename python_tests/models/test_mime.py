"""MIME against its slow form, and what must hold of its groups, its draws and its polarity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import as_double, close, handmade_examples, parameter_count, random_examples, same, tiny_vocabulary
from slow_mime import POSITIVE as NAMES
from slow_mime import SlowMIME
from torch import Tensor

from case_fast import equations_baselines as eqb
from case_fast.data.empathetic_dialogues import EMOTIONS
from case_fast.data.pack import make_batch
from case_fast.errors import ConfigError
from case_fast.models import build
from case_fast.models.layers import drawn, seed_at
from case_fast.models.mime import MIME, POSITIVE, MIMEConfig

TINY = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12, "attention_width": 8, "label_smoothing": 0.0}
CONFIGS = {"": {}, **MIMEConfig.ablations, "frame": {"attention_width": None, "emotion_scale": "one"},
           "two layers": {"layers": 2}}


def model_of(**changes: object) -> MIME:
    torch.manual_seed(0)
    return build("mime", **TINY | changes).double()


def noise_of(model: MIME, seed: int, dialogues: int) -> list[Tensor] | None:
    if not model.config.stochastic:
        return None
    place = seed_at(torch.tensor(seed), "emotions")
    return [eqb.standard_normal(dialogues, model.config.d_model, drawn(seed_at(place, g))) for g in range(len(model.groups))]


@pytest.mark.parametrize(("recipe", "words", "expected"), [
    ("released", 22_796, 16_493_428), ("released", 100, 2_853_132), ("frame", 22_796, 18_414_028),
])
def test_as_many_parameters_as_the_closed_form_says(recipe, words, expected):
    assert parameter_count("mime", recipe, words) == expected


def test_the_groups_part_the_emotions():
    assert [EMOTIONS[label] for label in POSITIVE] == list(NAMES)
    model = model_of()
    assert sorted(label for group in model.groups for label in group) == list(range(32))
    assert [len(group) for group in model.groups] == [13, 19]
    with pytest.raises(ConfigError, match="emotions must be 32, not 7"):
        MIMEConfig(emotions=7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_equal_the_slow_model(changes, training):
    for seed, (examples, texts) in enumerate((handmade_examples(), random_examples(4, seed=1))):
        model = model_of(**changes).train(training)
        noise = noise_of(model, seed, len(examples)) if training else None
        slow = SlowMIME(model)
        expected, out = slow.forward(examples, noise, training), model(as_double(make_batch(examples, texts, MIME.needs, seed)))
        for name, loss in {"loss": out.loss, "nll": out.nll, **out.losses}.items():
            same(loss, expected[name], 1e-9)
        assert out.losses.keys() == expected.keys() - {"loss", "nll"}
        slow.same_gradients(model, out.loss, expected["loss"])


def test_draws_are_normal_repeat_and_differ_by_cell_and_seed():
    found = eqb.standard_normal(400, 100, 7)
    assert found.equal(eqb.standard_normal(400, 100, torch.tensor(7))) and not found.equal(eqb.standard_normal(400, 100, 8))
    assert found[:5].equal(eqb.standard_normal(5, 100, 7)) and len(found.unique()) > 39_990
    assert abs(found.mean()) < 0.02 and abs(found.std() - 1) < 0.02  # standard errors 0.005 and 0.0035
    ordered, n = found.flatten().sort().values, found.numel()
    distance = (torch.special.ndtr(ordered) - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / n**0.5  # Kolmogorov-Smirnov at 0.1 %


def test_the_divergence_is_that_of_normal_distributions_and_nothing_where_both_are_one():
    wanted = {"dtype": torch.float64, "requires_grad": True}
    q, p = [(torch.randn(5, 7, **wanted), torch.randn(5, 7, **wanted)) for _ in range(2)]
    normal = [torch.distributions.Normal(mean, (log / 2).exp()) for mean, log in (q, p)]
    same(eqb.gaussian_kl(q, p), torch.distributions.kl_divergence(*normal).sum(-1), 1e-12)
    nothing = eqb.gaussian_kl(q, q)
    same(nothing, torch.zeros(5, dtype=torch.float64), 1e-12)
    same(torch.autograd.grad(nothing.sum(), q[0])[0], torch.zeros(5, 7, dtype=torch.float64), 1e-12)


def test_each_blend_is_of_its_own_groups_emotions():
    model = model_of().eval()
    batch = as_double(make_batch(*random_examples(5), MIME.needs))
    summary = torch.randn(5, 16, dtype=torch.float64)
    _, blends = model._blends(batch, summary)
    for place, group in enumerate(model.groups):
        other = model_of().eval()
        with torch.no_grad():
            other.w_emo[[label for label in range(32) if label not in group]] = 0
        same(other._blends(batch, summary)[1][place], blends[place], 1e-12)
        table = model.w_emo[group]
        assert (blends[place] <= table.max(0).values).all() and (blends[place] >= table.min(0).values).all()


def test_the_other_polarity_swaps_the_blends():
    one, two = torch.randn(3, 4), torch.randn(3, 4)
    mine, other = eqb.mimicry(one, two, torch.tensor([True, False, True]))
    assert mine.equal(torch.stack([one[0], two[1], one[2]])) and other.equal(torch.stack([two[0], one[1], two[2]]))


def test_training_has_the_gold_polarity_and_evaluation_the_predicted_one():
    examples, texts = random_examples(6, seed=2)
    batch = as_double(make_batch(examples, texts, MIME.needs))
    model = model_of(stochastic=False).train()
    sad, glad = (replace(batch, emotion=torch.full_like(batch.emotion, label)) for label in (EMOTIONS.index("sad"), POSITIVE[0]))
    first, second = model(sad), model(glad)
    assert not close(first.nll, second.nll, 1e-6) and first.emotion_logits.equal(second.emotion_logits)
    model.eval()
    read = model.read(batch)
    assert model(sad).nll.equal(model(glad).nll) and read.positive.equal(model.is_positive[read.emotion_logits.argmax(-1)])
    assert "kl" not in model(batch).losses
    unknown = replace(batch, emotion=torch.full_like(batch.emotion, -1))
    assert model.train().read(unknown).positive.equal(read.positive)


def test_evaluation_draws_nothing_unless_it_is_asked_to():
    batch = as_double(make_batch(*random_examples(4), MIME.needs))
    other = replace(batch, seed=batch.seed + 1)
    for asked in (False, True):
        model = model_of(sample_at_test=asked).eval()
        assert model(batch).nll.equal(model(batch).nll) and model(batch).nll.equal(model(other).nll) != asked
    model = model_of().train()
    assert model(batch).nll.equal(model(batch).nll) and not model(batch).nll.equal(model(other).nll)


def test_an_open_gate_is_no_gate():
    model = model_of().eval()
    with torch.no_grad():
        model.gate.weight.zero_()
        model.gate.bias.fill_(60.0)
    reading = model.read(as_double(make_batch(*random_examples(4), MIME.needs)))
    joined = torch.cat(reading.refined, 1)
    same(reading.memories[0].rows, joined @ model.merge.weight.T + model.merge.bias, 1e-12)
