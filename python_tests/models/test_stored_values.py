"""CASE's numbers are those of the code before models shared a contract (commit 99ff353): values that it gave, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import PRINTED, as_double, handmade_examples, random_examples, tiny_model

from case_fast.data.pack import make_batch
from case_fast.generation import GenerationConfig, generate

STORED = json.loads((Path(__file__).parent / "stored" / "case.json").read_text())
EXAMPLES = {"handmade": handmade_examples, "random": lambda: random_examples(9, seed=11)}
SEARCHES = {"greedy": GenerationConfig(max_words=8), "beam": GenerationConfig("beam", beams=3, max_words=8)}


@pytest.mark.parametrize("phase", ["bow", "all"])
@pytest.mark.parametrize("which", EXAMPLES)
def test_losses_and_gradients_are_those_stored(which, phase):
    model = tiny_model(0, layers=2, **PRINTED).double().train()
    model.set_phase(phase)
    out = model(as_double(make_batch(*EXAMPLES[which]())))
    out.loss.backward()
    stored = STORED[f"{which}, {phase}"]
    assert {name: value.item() for name, value in out.losses.items()} == pytest.approx(stored["losses"], rel=1e-11)
    found = {name: [p.grad.norm().item(), p.grad.sum().item()] for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == stored["gradients"].keys()
    for name, (norm, total) in stored["gradients"].items():
        assert found[name] == pytest.approx([norm, total], rel=1e-9, abs=1e-10 * max(norm, 1e-3)), name


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("which", EXAMPLES)
def test_replies_are_those_stored(which, search):
    model = tiny_model(0, layers=2, **PRINTED).double().eval()
    with torch.no_grad():
        model.output.weight *= 8
    found = generate(model, as_double(make_batch(*EXAMPLES[which]())), SEARCHES[search])
    stored = STORED[f"{which}, {search}"]
    assert [list(reply.words) for reply in found] == [words for words, _ in stored]
    assert [reply.score for reply in found] == pytest.approx([score for _, score in stored], rel=1e-10)
