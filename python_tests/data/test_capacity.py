"""Batches filled up to a capacity: the same losses, gradients and counts as the batch itself, whatever fills it up."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import ALL_SETTINGS, as_double, close, handmade_examples, random_examples, real_store, seeded, tensors, tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from case_fast.batch import PARTS, Batch
from case_fast.data.capacity import Capacity, capacities, fitted, measured
from case_fast.data.pack import make_batch
from case_fast.models import MODELS, DialogueModel, build, model_class
from case_fast.models.base import POSITIONS

DROPOUT = {"encoder_dropout": 0.1, "decoder_dropout": 0.1}


@cache
def ragged(count: int, seed: int = 0, parts: tuple[str, ...] = PARTS) -> Batch:
    """Nothing changes it."""
    return make_batch(*random_examples(count, seed), parts, seed=seed)


@cache
def buckets(count: int = 8) -> list[Capacity]:
    return capacities((ragged(count, seed) for seed in range(12)), POSITIONS)


def model_of(name: str = "case", phase: str = "", dtype: torch.dtype = torch.float64, **changes: object) -> DialogueModel:
    torch.manual_seed(0)
    settings = {"vocab_size": tiny_config().vocab_size, "d_model": 16, "ffn": 12}
    model = build(name, **settings | ({"graph_dropout": 0.0} if name == "case" else {"attention_width": 8}) | changes)
    model.to(dtype).train().set_phase(phase or model.phases[-1])
    return model


def trained(batch: Batch, name: str = "case", phase: str = "", dtype: torch.dtype = torch.float64, **changes: object
            ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Losses and diagnostics, gradients, and the words counted, of one step of a new model."""
    model = model_of(name, phase, dtype, **changes)
    out = model(batch)
    out.loss.backward()
    numbers = {"loss": out.loss, **out.losses, **out.diagnostics}
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: x.detach() for key, x in numbers.items()}, gradients, getattr(model, "word_counts", None)


def same_step(found: tuple, expected: tuple, tolerance: float) -> None:
    for mine, its in zip(found[:2], expected[:2], strict=True):
        assert mine.keys() == its.keys()
        for name, x in its.items():
            scale = x.abs().max().clamp(min=1e-3)
            assert close(mine[name] / scale, x / scale, tolerance), name
    assert (found[2] is None and expected[2] is None) or torch.equal(found[2], expected[2])


CONFIGS = [{}, {"num_negatives": 3}, {"mim_score": "dot"}, {"mim_score": "dot", "num_negatives": 3}, {"layers": 2},
           {"detach_posterior": False, "intensity": "before_norm"},
           ALL_SETTINGS | {"layers": 2},
           {"mim_score": "standardized", "num_negatives": 3, "kl_reduction": "mean", "detach_posterior": False}]


@pytest.mark.parametrize("phase", ["bow", "all"])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_a_filled_batch_gives_the_losses_gradients_and_counts_of_the_batch(changes, phase):
    held = 0
    for seed in (0, 3):
        batch = as_double(ragged(8, seed))
        expected = trained(batch, phase=phase, **changes)
        for capacity in buckets():
            filled = fitted(batch, capacity)
            if filled is not None:
                held += 1
                same_step(trained(filled, phase=phase, **changes), expected, 1e-12)
    assert held >= 4


def test_in_float32_the_difference_is_one_of_rounding():
    batch = ragged(8)
    expected = trained(batch, dtype=torch.float32)
    for capacity in buckets()[1:]:
        same_step(trained(fitted(batch, capacity), dtype=torch.float32), expected, 1e-5)


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.0}], ids=str)
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"case"}))
def test_every_other_model_takes_filled_batches(name, changes):
    needs = model_of(name).needs
    sizes = capacities((ragged(8, seed, needs) for seed in range(12)), POSITIONS)
    batch = ragged(8, 1, needs)
    filled = fitted(batch, sizes[-1])
    assert filled.case is None and sizes[-1].text == 0
    for phase in model_class(name).phases:
        same_step(trained(as_double(filled), name, phase, **changes), trained(as_double(batch), name, phase, **changes), 1e-12)


@pytest.mark.parametrize("kept", [[4], [4, 3], [0], [3], [0, 1, 2, 3, 4, 5, 6]])
def test_gaps_and_short_batches_are_filled_up_too(kept):
    """Without knowledge, without reactions, without words; and fewer dialogues than the capacity is for."""
    examples, texts = handmade_examples()
    size = capacities([make_batch(examples, texts)], POSITIONS)[-1]
    batch = as_double(make_batch([examples[place] for place in kept], texts))
    for phase in ("bow", "all"):
        same_step(trained(fitted(batch, size), phase=phase), trained(batch, phase=phase), 1e-12)


def test_a_batch_that_just_fits_and_one_that_does_not():
    batch = ragged(6)
    sizes = measured(batch)
    room = Capacity(**{name: size + 1 for name, size in sizes.items()})
    same_step(trained(as_double(fitted(batch, room))), trained(as_double(batch)), 1e-12)
    may_be_full = {"longest", "distinct", "cognition_edges", "knowledge", "reaction", "concept_edges", "felt", "feedback"}
    for name, size in sizes.items():
        assert (fitted(batch, replace(room, **{name: size})) is not None) == (name in may_be_full), name
        assert fitted(batch, replace(room, **{name: size - 1})) is None, name
    full = replace(room, **{name: sizes[name] for name in may_be_full})
    same_step(trained(as_double(fitted(batch, full))), trained(as_double(batch)), 1e-12)


def test_what_is_filled_up_has_the_shape_of_the_capacity_and_sound_offsets():
    first, last = buckets()[0], buckets()[-1]
    assert first.target < last.target and first.text <= last.text
    shapes = []
    for seed in range(4):
        filled = fitted(ragged(8, seed), last)
        found = dict(tensors(filled))
        shapes.append({name: (x.shape, x.dtype) for name, x in found.items()})
        ends = {"cu_context": last.context, "cu_target": last.target, "case.cu_text": last.text, "case.cu_response": last.target,
                "case.cu_reaction": last.reaction, "case.cu_reaction_context": last.reaction_context,
                "case.cu_knowledge": last.knowledge, "case.cognition.indptr": last.cognition_edges,
                "case.cognition.cu_vertices": last.cognition_vertices, "concept.graph.indptr": last.concept_edges,
                "concept.graph.cu_vertices": last.concept_vertices, "relations.cu_cognition": last.strung,
                "relations.cu_reaction": last.felt, "emotional.cu": last.emotional, "feedback.cu": last.feedback,
                "feedback.cu_emotional": last.feedback, "feedback.cu_reply": last.target,
                "feedback.cu_reply_emotional": last.target}
        is_offsets = re.compile(r"(^|\.)(cu(_|$)|indptr$)")
        assert {name for name in found if is_offsets.search(name)} == set(ends)
        for name, end in ends.items():
            cu = found[name]
            assert cu[0] == 0 and cu[-1] == end and (cu.diff() >= 0).all(), name
        for name, most in (("cu_context", last.context), ("case.cu_text", last.text), ("case.cu_reaction_context", 0),
                           ("relations.cu_cognition", last.strung), ("emotional.cu", last.emotional)):
            assert (found[name][:-1] < (most or last.reaction_context)).all(), name  # each has a first row
        for name in ("context", "target"):
            starts = found[f"cu_{name}"]
            rows = [(s, i - a) for s, (a, b) in enumerate(pairwise(starts.tolist())) for i in range(a, b)]
            assert list(zip(found[f"{name}_segment"].tolist(), found[f"{name}_position"].tolist(), strict=True)) == rows
        assert max(x.max() for name, x in found.items() if name.endswith("position")) < last.longest
        part, real = filled.feedback, len(ragged(8, seed).feedback.dialogue)
        assert part.dialogue[:real].max() < 8 <= part.dialogue[real:].min() and part.reply.max() < last.target
        assert part.weight.sum().item() == pytest.approx(1) and (part.weight == 0).any()
        assert filled.size == last.dialogues and found["sizes"][0] == 8
        for name, total in (("dialogue_weight", 1), ("target_weight", 1), ("bow_weight", 1)):
            assert found[name].sum().item() == pytest.approx(total) and (found[name] == 0).any()
    assert all(shape == shapes[0] for shape in shapes)


def test_capacities_hold_the_shares_of_the_batches_that_they_are_for():
    seen = [ragged(8, seed) for seed in range(60)]
    sizes = capacities(seen, POSITIONS)
    shares = [sum(size.holds(batch) for batch in seen) / len(seen) for size in sizes]
    assert 0.5 <= shares[0] <= 0.75 and shares[1] >= 0.97 and shares[-1] == 1
    assert capacities(seen, POSITIONS) == sizes and all(size.dialogues == 12 for size in sizes)
    assert not any(size.holds(replace(seen[0], longest=POSITIONS + 1)) for size in sizes)
    assert len(capacities([seen[0]], POSITIONS)) <= 2  # equal ones are one


def test_all_tensors_of_a_batch_lie_in_one_block():
    batch = ragged(5)
    joined, block = batch.joined()
    before = dict(tensors(batch))
    for name, x in tensors(joined):
        assert torch.equal(x, before[name]) and x.dtype == before[name].dtype and x.shape == before[name].shape
        assert x.untyped_storage().data_ptr() == block.data_ptr() and (x.data_ptr() - block.data_ptr()) % 16 == 0
    other = torch.empty_like(block)
    over = joined.laid_over(other)
    other.copy_(block)
    assert all(torch.equal(x, before[name]) for name, x in tensors(over)) and type(over) is Batch and over.size == 5
    assert over.target.data_ptr() != joined.target.data_ptr()


# ---- what a captured step forbids


class Asked(TorchDispatchMode):
    """The operators that ask a device for a number, or whose result's shape depends on what a tensor holds."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor", "is_nonzero",
                 "equal", "bincount", "randint")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        name = function.name().removeprefix("aten::")
        if name in self.FORBIDDEN or name.partition(".")[0] in self.FORBIDDEN:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("phase", ["bow", "all"])
@pytest.mark.parametrize("changes", [{}, {"num_negatives": 3}, ALL_SETTINGS], ids=str)
def test_a_step_asks_the_device_for_nothing(changes, phase):
    model = model_of(phase=phase, dtype=torch.float32, graph_dropout=0.2, **DROPOUT, **changes)
    batch = seeded(fitted(ragged(8), buckets()[-1]), 5)
    with Asked() as asked:
        model(batch).loss.backward()
    assert asked.count > 100 and not asked.found


@pytest.mark.parametrize("name", [name for name in MODELS if not model_class(name).asks])
def test_shapes_of_a_step_are_known_without_any_content(name, monkeypatch):
    """With tensors that hold nothing, whatever needs a content raises."""
    monkeypatch.delenv("CASE_FAST_BACKEND", raising=False)
    if name == "case":
        pytest.importorskip("case_fast._native", reason="the plain form of the attentions asks for sizes")
    model = model_of(name, dtype=torch.float32, **DROPOUT)
    batch = fitted(ragged(8, 0, model.needs), capacities([ragged(8, 0, model.needs)], POSITIONS)[-1])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = batch._map(lambda x: mode.from_tensor(x))
        out = model(fake)
        out.loss.backward()
    assert out.loss.shape == () and type(out.loss).__name__ == "FakeTensor"


# ---- real dialogues


@pytest.mark.slow
def test_real_batches_of_every_capacity(real_data: Path, tmp_path: Path):
    store = real_store(real_data, tmp_path, 400)
    steps = range(store.size("train") // 16)
    batches = [store.batch("train", range(16 * step, 16 * step + 16), seed=step) for step in steps]
    sizes = capacities(batches, POSITIONS)
    words = {"vocab_size": len(store.featurizer.vocabulary), "d_model": 32, "ffn": 32}
    assert len(sizes) == 3
    for place, capacity in enumerate(sizes):
        batch = next(batch for batch in batches if capacity.holds(batch)
                     and not any(smaller.holds(batch) for smaller in sizes[:place]) or capacity is sizes[-1])
        for phase in ("bow", "all"):
            for kind, dtype, tolerance in ((as_double, torch.float64, 1e-11), (lambda x: x, torch.float32, 1e-4)):
                filled, exact = (trained(kind(x), phase=phase, dtype=dtype, **words) for x in (fitted(batch, capacity), batch))
                same_step(filled, exact, tolerance)
