"""The plain padded form that `case-fast bench step` measures against is the same model: losses and gradients, to the last bits of
float64, on dialogues with every kind of gap."""

from __future__ import annotations

import pytest
import torch
from helpers import ALL_SETTINGS, PRINTED, as_double, handmade_examples, random_examples, tiny_model

from benchmarks.step.plain_case import PaddedBatch, collate, plain_of
from case_fast.data.pack import make_batch

WIDE = {"n": 60, "U": 7, "Lu": 40, "K": 50, "Lk": 11, "N": 70, "R": 5, "Lr": 9, "m": 20}
EXAMPLES = {"handmade": handmade_examples, "random": lambda: random_examples(9, 3), "one": lambda: random_examples(1, 4)}


def as_double_padded(batch: PaddedBatch) -> PaddedBatch:
    batch.concept_intensity = batch.concept_intensity.double()
    return batch


@pytest.mark.parametrize("made", EXAMPLES)
@pytest.mark.parametrize(("layers", "least"), [(1, None), (2, WIDE)])
@pytest.mark.parametrize("phase", ["bow", "all"])
def test_plain_form_has_the_losses_and_gradients_of_the_packed_one(made, layers, least, phase):
    examples, texts = EXAMPLES[made]()
    model = tiny_model(layers=layers, **PRINTED).double()
    model.word_counts.random_(5, generator=torch.Generator().manual_seed(1))
    model.set_phase(phase)
    plain = plain_of(model)
    output = model(as_double(make_batch(examples, texts)))
    loss, losses = plain(as_double_padded(collate(examples, texts, least)))
    output.loss.backward()
    loss.backward()
    assert losses.keys() == output.losses.keys()
    for name, value in {"loss": output.loss, **output.losses}.items():
        found = loss if name == "loss" else losses[name]
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12, msg=name)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert torch.equal(plain.word_counts, model.word_counts)


def test_plain_form_refuses_settings_that_it_lacks():
    for name, value in ALL_SETTINGS.items():
        with pytest.raises(ValueError, match=name):
            plain_of(tiny_model(**PRINTED | {name: value}))
