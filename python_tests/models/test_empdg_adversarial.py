"""EmpDG's discriminators against their slow form, L_D against its closed form, and what gradients reach and what they do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    as_double,
    generator,
    gradcheck,
    handmade_examples,
    normal,
    offsets,
    parameter_count,
    random_examples,
    same,
    seeded,
    slow_philox,
    split_rows,
    tiny_featurizer,
    tiny_vocabulary,
)
from slow_empdg_adversarial import SlowAdversarialEmpDG
from torch import Tensor, nn

from case_fast import equations_baselines as eqb
from case_fast.batch import Batch
from case_fast.data.pack import make_batch
from case_fast.errors import ConfigError
from case_fast.models import build
from case_fast.models.base import Length
from case_fast.models.empdg_adversarial import DISCRIMINATORS, GENERATOR, AdversarialEmpDG, states_in_order
from case_fast.models.layers import drawn, seed_at

TINY = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12, "attention_width": 8, "label_smoothing": 0.0}
CONFIGS = {"": {}, "frame": {"attention_width": None, "emotion_scale": "one", "penalty": 3.0}}


def model_of(kind: str = "empdg-d", **changes: object) -> AdversarialEmpDG:
    torch.manual_seed(0)
    return build(kind, **TINY | changes).double().train()


def talkative(model: AdversarialEmpDG) -> AdversarialEmpDG:
    """One whose distributions are sharp, and that says emotional words more often than others."""
    with torch.no_grad():
        model.output.weight *= 8
        model.output.bias += torch.from_numpy(8.0 * tiny_featurizer().emotional.known)
        for critic in model.critics:
            critic.embedding.weight *= 6
            critic.pairs.weight *= 3
    return model


def batches() -> list[tuple]:
    moved = random_examples(4, seed=3)
    words = ["joy so sad hope . grief", "happy fear", "love and hope !", "i"], ["so happy , love", "", "joy", "grief not fear"]
    of = tiny_vocabulary().encode
    full = [replace(e, response=np.array(of(said.split()), dtype=np.int32), feedback=np.array(of(after.split()), dtype=np.int32))
            for e, said, after in zip(moved[0], *words, strict=True)]
    found = [handmade_examples(), random_examples(6, seed=1), (full, moved[1])]
    return [(examples, texts, seeded(as_double(make_batch(examples, texts, AdversarialEmpDG.needs)), 2**62 + 5))
            for examples, texts in found]


def silent() -> Batch:
    """The two handmade dialogues without feedback."""
    examples, texts = handmade_examples()
    return as_double(make_batch([examples[1], examples[2]], texts, AdversarialEmpDG.needs))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("recipe", "words", "generator"), [
    ("released", 22_796, 14_198_846), ("released", 100, 558_550), ("frame", 22_796, 15_717_296),
])
def test_as_many_parameters_as_the_closed_form_says(recipe, words, generator):
    d = 300
    lstm, convolution, judging = 8 * d * d + 8 * d, 2 * d * d + d, d + (d * d + d) // 2 + d // 2 + 1
    assert parameter_count("empdg-d", recipe, words) == generator + 2 * (words * d + lstm + convolution + judging)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_of_both_turns_equal_the_slow_model(changes):
    reached = set()
    for examples, texts, batch in batches():
        model = talkative(model_of(**changes))
        place = seed_at(batch.seed, "discriminators")
        seeds = [int(drawn(seed_at(place, number))) % 2**63 for number in range(2)]
        slow = SlowAdversarialEmpDG(model)
        expected = slow.losses(examples, texts, seeds)
        for phase, whole, parts in (("discriminators", "L_D", {"critic", "penalty"}),
                                    ("interactive", "L_G", {"generation", "emotion", "adversarial"})):
            model.set_phase(phase)
            out = model(batch)
            assert out.losses.keys() == parts
            same(out.loss, expected[whole], 1e-9)
            for name in parts:
                same(out.losses[name], expected[name], 1e-9)
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            theirs = torch.autograd.grad(expected[whole], [slow.weights[name] for name in names], allow_unused=True,
                                         retain_graph=True)
            for name, gradient in gradients(model, out.loss).items():
                other = theirs[names.index(name)]
                same(gradient, torch.zeros_like(gradient) if other is None else other, 1e-9)
                reached |= {name} if gradient.abs().max() > 1e-9 else set()
    # else nothing would have been compared; what is added to both scores goes from their difference
    assert reached == {name for name, _ in model.named_parameters() if not name.endswith("outer.bias")}


# ---- the equations


def packed(sizes: list[int], width: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(sum(sizes), width, seed=seed), offsets(sizes)


def test_the_loss_of_a_linear_critic_is_its_closed_form():
    sizes, others = [2, 1, 4, 3, 0], [3, 2, 1, 3, 2]
    made, real = packed(sizes, seed=1), packed(others, seed=2)
    v, weight = normal(3, seed=3).requires_grad_(), torch.tensor([0.2, 0.1, 0.3, 0.4, 0.0], dtype=torch.float64)

    def score(rows: Tensor, cu: Tensor) -> Tensor:
        return torch.stack([part.sum(0) @ v for part in split_rows(rows, cu)])

    difference, penalty = eqb.critic_losses(score, made, real, torch.rand(5), weight)
    sums = [torch.stack([part.sum(0) for part in split_rows(*side)]) for side in (made, real)]
    same(difference, weight @ ((sums[0] - sums[1]) @ v), 1e-12)
    rows = torch.tensor([min(pair) for pair in zip(sizes, others, strict=True)], dtype=torch.float64)
    expected = weight @ (v.norm() * rows.sqrt() - 1).square()
    same(penalty, expected, 1e-12)
    same(torch.autograd.grad(penalty, v)[0], torch.autograd.grad(expected, v)[0], 1e-12)


def test_the_penalty_is_0_at_unit_norm_and_finite_where_there_is_nothing():
    v = normal(3)
    v = (v / v.norm()).requires_grad_()

    def score(rows: Tensor, cu: Tensor) -> Tensor:
        return torch.stack([part.sum(0) @ v for part in split_rows(rows, cu)])

    made, real, weight = packed([1, 1], seed=1), packed([1, 4], seed=2), torch.full((2,), 0.5)
    assert eqb.critic_losses(score, made, real, torch.rand(2), weight)[1].abs() < 1e-30
    nothing = packed([0, 0])
    _, penalty = eqb.critic_losses(score, nothing, real, torch.rand(2), weight)
    (gradient,) = torch.autograd.grad(penalty, v)
    assert penalty == 1 and gradient.abs().max() == 0


def test_the_interpolation_is_of_rows_in_place_and_has_no_past():
    made, real = (packed(sizes, seed=seed) for sizes, seed in (([3, 2], 1), ([2, 4], 2)))
    share, seen = torch.tensor([0.25, 1.0], dtype=torch.float64), []

    def score(rows: Tensor, cu: Tensor) -> Tensor:
        seen.append((rows, cu))
        return torch.stack([part.square().sum() for part in split_rows(rows, cu)])

    eqb.critic_losses(score, (made[0].requires_grad_(), made[1]), real, share, torch.ones(2))
    rows, cu = seen[-1]
    assert cu.tolist() == [0, 2, 4] and rows.is_leaf
    same(rows.detach(), torch.cat([0.25 * made[0][:2] + 0.75 * real[0][:2], made[0][3:]]).detach(), 1e-12)


def test_the_largest_of_pairs_is_that_of_a_loop_and_twice_differentiable():
    weight, bias = normal(4, 6, seed=5), normal(4, seed=6)
    for sizes in ([3, 1, 0, 5, 2], [0, 0], [1], [0, 4]):
        rows, cu = packed(sizes, seed=7)
        expected = torch.zeros(len(sizes), 4, dtype=torch.float64)
        for place, part in enumerate(split_rows(rows, cu)):
            for a, b in zip(part[:-1], part[1:], strict=True):
                expected[place] = torch.maximum(expected[place], (weight @ torch.cat([a, b]) + bias).clamp(min=0))
        same(eqb.largest_of_pairs(rows, cu, weight, bias), expected, 1e-12)
    rows, cu = packed([3, 1, 4])
    gradcheck(lambda rows, weight, bias: eqb.largest_of_pairs(rows, cu, weight, bias).square(), rows, weight, bias)
    leaves = tuple(x.clone().requires_grad_() for x in (rows, weight, bias))
    assert torch.autograd.gradgradcheck(lambda rows, weight, bias: eqb.largest_of_pairs(rows, cu, weight, bias).square(), leaves)


def test_uniform_draws_are_those_of_the_counter():
    seed = 2**40 + 3
    expected = [(slow_philox((place, 0, 0, 8), (seed & 0xFFFFFFFF, seed >> 32))[0] + 0.5) / 2**32 for place in range(50)]
    found = eqb.uniform(50, seed)
    assert found.tolist() == expected and found.dtype == torch.float64 and 0 < found.min() < 0.2 < 0.8 < found.max() < 1
    assert eqb.uniform(50, torch.tensor(seed)).equal(found) and eqb.uniform(0, seed).shape == (0,)


def test_states_of_packed_rows_are_those_of_each_sequence_alone():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 5).double()
    for sizes in ([2, 0, 4, 1, 4], [3], [0, 0]):
        rows, cu = packed(sizes)
        parts = [lstm(part)[0] if len(part) else torch.zeros(0, 5) for part in split_rows(rows, cu)]
        same(states_in_order(lstm, rows, cu), torch.cat(parts).double(), 1e-12)


# ---- what gradients reach, and what they do not


def test_the_generators_turn_reaches_the_generator_by_its_words_alone():
    """The adversarial term has a gradient at the decoder's states, and none at what was read of the context."""
    _, _, batch = batches()[0]
    model = talkative(model_of())
    reading, hidden = model._decoded(batch)
    rows, hidden = reading.memories[0].rows.detach().requires_grad_(), hidden.detach().requires_grad_()
    reading.memories = [replace(reading.memories[0], rows=rows)]
    out = model(batch)
    out = replace(out, loss=torch.zeros((), dtype=torch.float64), losses={}, hidden=hidden)
    model._add_losses(batch, reading, out)
    at_words, at_context = torch.autograd.grad(out.loss, (hidden, rows), allow_unused=True)
    assert at_words.abs().max() > 1e-6 and at_context is None
    judged = batch.feedback.reply.tolist()
    assert all((row.abs().max() > 0) <= (place in judged) for place, row in enumerate(at_words))
    assert not any(p.requires_grad for critic in model.critics for p in critic.parameters())


def test_without_feedback_in_the_batch_the_loss_is_empdgs_bit_for_bit():
    model, plain = model_of(label_smoothing=0.1), model_of("empdg", label_smoothing=0.1)
    batch = silent()
    assert len(batch.feedback.dialogue) == 0
    out, expected = model(batch), plain(batch)
    assert out.loss.equal(expected.loss) and out.losses["adversarial"] == 0
    mine, theirs = gradients(model, out.loss), gradients(plain, expected.loss)
    assert mine.keys() == theirs.keys() and all(gradient.equal(theirs[name]) for name, gradient in mine.items())
    model.set_phase("discriminators")
    out = model(batch)
    found = gradients(model, out.loss)
    assert out.loss == 0 and len(found) == 24 and all(gradient.abs().max() == 0 for gradient in found.values())


def test_the_first_phase_is_the_training_of_empdg():
    """The same weights of the same seed, the same random state after, the same losses and gradients whatever the feedback."""
    torch.manual_seed(3)
    model, state = build("empdg-d", **TINY), torch.get_rng_state()
    torch.manual_seed(3)
    plain = build("empdg", **TINY)
    assert torch.get_rng_state().equal(state)
    own = dict(model.named_parameters())
    assert all(own[name].equal(p) for name, p in plain.named_parameters())
    examples, texts = random_examples(5)
    batch = make_batch(examples, texts)
    model.train().set_phase("generator")
    out, expected = model(batch), plain.train()(batch)
    assert out.loss.equal(expected.loss) and out.losses.keys() == expected.losses.keys()
    mine, theirs = gradients(model, out.loss), gradients(plain, expected.loss)
    assert mine.keys() == theirs.keys() and all(gradient.equal(theirs[name]) for name, gradient in mine.items())


def test_a_judgement_does_not_depend_on_the_batch():
    examples, texts, batch = batches()[1]
    for phase, name in (("interactive", "adversarial"), ("discriminators", "critic")):
        model = talkative(model_of())
        model.set_phase(phase)
        judged = len(batch.feedback.dialogue)
        alone = [model(as_double(make_batch([e], texts, model.needs))).losses[name] for e in examples if len(e.feedback)]
        same(model(batch).losses[name] * judged, sum(alone), 1e-10)
        turned = as_double(make_batch(examples[::-1], texts, model.needs))
        same(model(turned).losses[name], model(batch).losses[name], 1e-10)
    assert 1 < judged < len(examples)


def test_the_emotional_critic_sees_emotional_words_alone():
    _, _, batch = batches()[2]
    model = talkative(model_of())
    model.set_phase("discriminators")
    model.semantic_critic.outer.weight.data.zero_()
    found = model(batch).losses["critic"]
    part = batch.feedback
    word, target = (torch.where(part.lexicon[ids], ids, (ids + 1) % 8) for ids in (part.word, batch.target))
    same(model(replace(batch, target=target, feedback=replace(part, word=word))).losses["critic"], found, 1e-12)
    other = replace(part, emotional=part.emotional.flip(0))
    assert model(replace(batch, feedback=other)).losses["critic"] != found


# ---- whose turn it is


def test_turns_freeze_what_they_do_not_train():
    model = build("empdg-d", **TINY, critic_steps=2, generator_steps=3)
    critics = {name for name, _ in model.named_parameters() if "critic" in name}

    def trained() -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    everything = {name for name, _ in model.named_parameters()}
    assert trained() == everything - critics and len(critics) == 24
    for phase, turns in (("generator", [GENERATOR] * 7), ("discriminators", [DISCRIMINATORS] * 7),
                         ("interactive", [DISCRIMINATORS] * 2 + [GENERATOR] * 3 + [DISCRIMINATORS] * 2)):
        model.set_phase(phase)
        for step, turn in enumerate(turns):
            model.set_turn(step)
            assert model.turn == turn and trained() == (critics if turn == DISCRIMINATORS else everything - critics)
        first, second = model.parameter_groups()
        names = {id(p): name for name, p in model.named_parameters()}
        assert {names[id(p)] for p in second["params"]} == critics and second["lr"] == 1e-4
        assert {names[id(p)] for p in first["params"]} == everything - critics and first.keys() == {"params"}
    assert model.config.length("generator") is None and model.config.length("discriminators") == Length(1000)
    assert model.config.length("interactive") == Length(25_000, 1_000)


def test_the_tables_of_words_start_as_the_generators():
    model = build("empdg-d", **TINY)
    ids, vectors = torch.tensor([9, 12]), torch.randn(2, 16, generator=generator())
    for _ in range(2):
        for critic in model.critics:
            assert critic.embedding.weight.equal(model.embedding.weight)
            assert critic.embedding.weight.data_ptr() != model.embedding.weight.data_ptr()
        model.load_embeddings(ids, vectors)
    assert model.semantic_critic.embedding.weight[ids].equal(vectors)


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"critic_steps": 0}, {"discriminator_steps": 0}, {"penalty": -1.0},
                                     {"critic_lr": 0.0}], ids=str)
def test_settings_that_cannot_work_are_named(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        build("empdg-d", **changes)
