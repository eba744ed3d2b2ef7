"""MoEL against its slow form, and what must hold of its gates, its listeners, its coin and its cache."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import as_double, close, handmade_examples, parameter_count, random_examples, same, slow_philox, tiny_vocabulary
from slow_moel import SlowMoEL
from torch import Tensor
from training_helpers import MemoryStore, outcome, run, tiny_run

from case_fast import equations_baselines as eqb
from case_fast.batch import Batch
from case_fast.data.pack import make_batch
from case_fast.errors import ConfigError
from case_fast.generation import GenerationConfig, Replayed
from case_fast.models import build
from case_fast.models.base import Reading
from case_fast.models.layers import normalized
from case_fast.models.moel import Audiences, MoEL, MoELConfig
from case_fast.training import step as forms

TINY = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12, "attention_width": 8, "label_smoothing": 0.0}
CONFIGS = {"": {}, "frame": {"attention_width": None, "emotion_scale": "one"}, "two layers": {"layers": 2},
           "two listeners": {"top_k": 2}}
ALWAYS, NEVER = {"schedule_floor": 1.0}, {"schedule_floor": 0.0, "schedule": 1e-9}  # never but at step 0


def model_of(**changes: object) -> MoEL:
    torch.manual_seed(0)
    model = build("moel", **TINY | changes).double()
    with torch.no_grad():
        model.w_emo *= 3  # gates that differ
        model.steps += 1
    return model


def batch_of(count: int, seed: int = 0) -> Batch:
    return as_double(make_batch(*random_examples(count, seed), MoEL.needs))


def decoded(model: MoEL, batch: Batch, reading: Reading) -> Tensor:
    rows = model.look_up({"words": batch.decoder_input})["words"]
    return model.decode(rows, batch.cu_target, reading, batch.target_position, batch.longest)


def said(model: MoEL, batch: Batch, reading: Reading) -> list[Tensor]:
    """V of every listener for the whole batch, the shared one first, (M, d) each."""
    rows = model.place(model.look_up({"words": batch.decoder_input})["words"], batch.target_position, batch.longest)
    return [layer(*normalized(rows, layer.self_norm), batch.cu_target, reading.memories)[0]
            for layer in model.decoder.listeners]


@pytest.mark.parametrize(("recipe", "words", "expected"), [
    ("released", 22_796, 20_251_346), ("released", 100, 6_611_050), ("frame", 22_796, 44_934_596),
])
def test_as_many_parameters_as_the_closed_form_says(recipe, words, expected):
    assert parameter_count("moel", recipe, words) == expected


@pytest.mark.parametrize("how", ["forced", "free", "evaluation"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_equal_the_slow_model(changes, how):
    for examples, texts in (handmade_examples(), random_examples(4, seed=1)):
        model = model_of(**changes, **(NEVER if how == "free" else ALWAYS)).train(how != "evaluation")
        slow = SlowMoEL(model)
        batch = as_double(make_batch(examples, texts, MoEL.needs))
        expected = slow.forward(examples, how == "forced")
        same(model.read(batch).gates, expected.pop("gates"), 1e-12)
        out = model(batch)
        for name, loss in {"loss": out.loss, "nll": out.nll, **out.losses}.items():
            same(loss, expected[name], 1e-9)
        assert out.losses.keys() == expected.keys() - {"loss", "nll"}
        ours = dict(model.named_parameters())
        theirs = torch.autograd.grad(expected["loss"], [*slow.weights.values()], allow_unused=True)
        mine = torch.autograd.grad(out.loss, [ours[name] for name in slow.weights])
        for a, b in zip(mine, theirs, strict=True):
            same(a, torch.zeros_like(a) if b is None else b, 1e-9)  # None: a listener that nobody has


def test_settings_that_cannot_work_are_refused():
    for name, wrong in (("top_k", 0), ("schedule", 0.0), ("schedule_floor", 1.5), ("schedule", math.nan)):
        with pytest.raises(ConfigError, match=name):
            MoELConfig(**{name: wrong})


# ---- gates


@pytest.mark.parametrize(("emotions", "k"), [(32, 5), (3, 5), (5, 5), (7, 1)])
def test_gates_are_a_softmax_over_the_greatest_scores(emotions, k):
    score = torch.randn(20, emotions, dtype=torch.float64).round(decimals=1).requires_grad_()  # with equals among them
    gates = eqb.listener_gates(score, k)
    same(gates.sum(1), torch.ones(20), 1e-12)
    for row, found in zip(score.tolist(), gates, strict=True):
        best = sorted(range(emotions), key=lambda e: (-row[e], e))[:k]
        assert sorted(found.nonzero().flatten().tolist()) == sorted(best)
        same(found[best], torch.tensor([row[e] for e in best], dtype=torch.float64).softmax(0), 1e-12)
    gradient = torch.autograd.grad((gates * torch.randn_like(gates)).sum(), score)[0]
    assert gradient.isfinite().all() and (gradient[gates == 0] == 0).all()


def test_gates_all_on_one_listener_are_that_one_and_the_shared_one():
    model, batch = model_of().eval(), batch_of(4)
    reading, label = model.read(batch), 7
    one = torch.zeros_like(reading.gates).index_fill_(1, torch.tensor([label]), 1.0)
    shared, own = (said(model, batch, reading)[place] for place in (0, label + 1))
    meta = super(type(model.decoder), model.decoder).forward
    same(decoded(model, batch, replace(reading, gates=one)), meta(shared + own, batch.cu_target, reading.memories), 1e-12)


def test_the_listeners_in_use_are_the_sum_over_all_of_them():
    model, batch = model_of().eval(), batch_of(6)
    reading = model.read(batch)
    weights = reading.gates[batch.target_segment]  # (M, emotions)
    shared, *own = said(model, batch, reading)
    mixed = shared + sum(weights[:, [label]] * rows for label, rows in enumerate(own))
    meta = super(type(model.decoder), model.decoder).forward
    same(decoded(model, batch, reading), meta(mixed, batch.cu_target, reading.memories), 1e-12)


def test_listeners_that_change_places_with_their_keys_change_nothing():
    model, batch = model_of().eval(), batch_of(6)
    before = model(batch).nll
    i, j = (model.read(batch).gates > 0).sum(0).argsort()[-2:].tolist()  # those with most dialogues
    with torch.no_grad():
        model.w_emo[[i, j]] = model.w_emo[[j, i]]
    assert not close(model(batch).nll, before, 1e-6)
    listeners = model.decoder.listeners
    listeners[i + 1], listeners[j + 1] = listeners[j + 1], listeners[i + 1]
    same(model(batch).nll, before, 1e-12)


def test_a_listener_runs_on_its_own_dialogues_alone_and_the_others_have_gradients_of_zeros():
    model, batch = model_of(**NEVER).train(), batch_of(4)
    rows: dict[int, int] = {}
    for place, listener in enumerate(model.decoder.listeners):
        listener.register_forward_hook(lambda _, inputs, out, place=place: rows.update({place: len(inputs[0])}))
    gates = model.read(batch).gates
    model(batch).loss.backward()
    length = batch.cu_target.diff()
    expected = {label + 1: int(length[gates[:, label] > 0].sum()) for label in range(32) if (gates[:, label] > 0).any()}
    assert rows == {0: len(batch.target)} | expected and 5 <= len(expected) < 32
    for place, listener in enumerate(model.decoder.listeners):
        assert all(p.grad is not None for p in listener.parameters())
        assert any(p.grad.abs().max() > 0 for p in listener.parameters()) == (place in rows)


# ---- teacher forcing


def test_the_coin_is_that_of_its_counter():
    for step, seed in ((0, 0), (3, 5), (70_000, 2**62 + 11), (2**32 + 1, 9)):
        word = slow_philox((step & 0xFFFFFFFF, 0, 0, 7), (seed & 0xFFFFFFFF, seed >> 32))[0]
        for beside, expected in ((0, False), (1, True)):  # below what is just above it, and not below itself
            probability = torch.tensor((word + beside) / 2**32, dtype=torch.float64)
            for given in (seed, torch.tensor(seed)):
                assert eqb.coin(torch.tensor(step), probability, given).item() == expected
    assert eqb.coin(torch.tensor(0), eqb.forcing_probability(torch.tensor(0), 10_000, 1e-4), 3)  # always at the first step


def test_steps_are_forced_as_often_as_the_schedule_says():
    steps = torch.arange(0, 50_001, 25)
    probability = eqb.forcing_probability(steps, 10_000, 1e-4)
    same(probability[400], 1e-4 + (1 - 1e-4) * math.exp(-1), 1e-12)
    coins = torch.stack([eqb.coin(step, p, 1000 + int(step)) for step, p in zip(steps, probability, strict=True)])
    for part in torch.arange(len(steps)).split(500):
        mean, deviation = probability[part].sum(), (probability[part] * (1 - probability[part])).sum().sqrt()
        assert abs(coins[part].sum() - mean) <= 3 * deviation


def test_training_counts_its_steps_and_evaluation_neither_counts_nor_forces():
    model, batch = model_of(**ALWAYS).train(), batch_of(5)
    model.read(batch)
    model(batch)
    assert model.steps == 2 and "steps" in model.state_dict()
    model.eval()
    first = model(batch)
    assert model.steps == 2 and ((model.read(batch).gates > 0).sum(1) == 5).all()
    model.steps.fill_(10**6)
    assert model(batch).nll.equal(first.nll) and model.steps == 10**6


def test_an_unknown_emotion_keeps_its_own_gates():
    model, batch = model_of(**ALWAYS).train(), batch_of(4)
    own = eqb.listener_gates(model.read(batch).emotion_logits, 5)
    gates = model.read(replace(batch, emotion=torch.tensor([-1, 3, -1, 31]))).gates
    assert gates[[0, 2]].equal(own[[0, 2]])
    assert gates[1].equal(torch.eye(32).double()[3]) and gates[3].equal(torch.eye(32).double()[31])


def test_dropout_and_coin_repeat_with_the_seed():
    model, batch = model_of(decoder_dropout=0.3).train(), batch_of(4)
    first, again, other = (model(b).nll for b in (batch, batch, replace(batch, seed=batch.seed + 1)))
    assert first.equal(again) and not first.equal(other)


# ---- decoding


def test_a_cache_whose_dialogues_leave_scores_as_the_decoder_without_one():
    model, batch, beams = model_of().eval(), batch_of(5, seed=3), 2
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        reading = model.read(batch)
        state = model.start_decoding(reading, beams, 6)
        used = len(state.listening)
        going, words = list(range(5)), [[] for _ in range(5 * beams)]
        for kept in ([0, 1, 2, 3, 4], [0, 2, 4], [1, 2], [1], [0]):
            if len(kept) < len(going):
                state.keep(torch.tensor(kept), len(kept))
                words = [words[place * beams + beam] for place in kept for beam in range(beams)]
                going = [going[place] for place in kept]
            newest = torch.randint(4, 40, (len(words),), generator=generator)
            words = [[*before, word] for before, word in zip(words, newest.tolist(), strict=True)]
            found = model.next_word_logits(newest, state)
            for place, dialogue in enumerate(going):
                hypotheses = torch.tensor(words[place * beams : (place + 1) * beams])
                cu = torch.arange(beams + 1) * hypotheses.shape[1]
                expected = model.reply_logits(hypotheses.flatten(), cu, reading.repeat(dialogue, beams), last_only=True)
                same(found[place * beams : (place + 1) * beams], expected, 1e-10)
            origin = torch.randint(beams, (len(going), beams), generator=generator)  # of each hypothesis, in its dialogue
            state.reorder((origin + torch.arange(len(going)).unsqueeze(1) * beams).flatten())
            words = [words[place * beams + old] for place, row in enumerate(origin.tolist()) for old in row]
    assert len(state.listening) == 6 < used  # the shared one and five
    with pytest.raises(ValueError, match="goes on with the 1 dialogues that are kept, not with 2"):
        state.keep(torch.tensor([0]), 2)


def test_what_must_not_ask_the_device_is_refused(tmp_path):
    model, config = model_of(), MoELConfig(**TINY)
    with pytest.raises(ConfigError, match="what moel decodes cannot be replayed: which listeners answer"):
        Replayed(model, GenerationConfig())
    for device in ("cpu", "cuda"):
        assert "which listeners answer a dialogue is read from the device" in forms._obstacle(model, torch.device(device))
    store = MemoryStore()
    with pytest.raises(ConfigError, match="step captured: of moel no step can be captured: which .*Set step to eager or auto"):
        run(store, tmp_path / "captured", tiny_run(model=config, step="captured"))
    for form in ("auto", "eager"):
        run(store, tmp_path / form, tiny_run(model=config, step=form, max_steps=2))
    assert outcome(tmp_path / "auto") == outcome(tmp_path / "eager")


def test_rows_of_a_listener_are_those_of_its_dialogues_in_order():
    heard = Audiences(torch.tensor([[0.0, 0.4, 0.6], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    assert heard.counts == [3, 0, 2, 2] and heard.dialogue.tolist() == [0, 1, 2, 0, 2, 0, 1]
    same(heard.gate, [1, 1, 1, 0.4, 1, 0.6, 1], 1e-7)
    cut = heard.cut(torch.tensor([0, 2, 2, 5]))
    assert [rows.tolist() for rows in cut.index.split(cut.sizes)] == [[0, 1, 2, 3, 4], [], [0, 1, 2, 3, 4], [0, 1]]
    assert [cu.tolist() for cu in cut.cu] == [[0, 2, 2, 5], [0], [0, 2, 5], [0, 2, 2]]
