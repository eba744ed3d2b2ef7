"""The CASE model: against the slow one, its ablations, phases, empty sets, counters, dtypes and files.

What one dialogue owes to its batch mates, and decoding, are in test_model_batches.py.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import random
import re
import socket
import zlib
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import (
    ALL_SETTINGS,
    CONCEPTS,
    CONTENT_WORDS,
    NO_CONCEPT_WORDS,
    PRINTED,
    as_double,
    close,
    dialogue,
    handmade_examples,
    inferences,
    random_batch,
    same,
    seeded,
    speakers_prompts,
    tensors,
    tiny_config,
    tiny_featurizer,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from slow_case import SlowCase
from torch.utils._python_dispatch import TorchDispatchMode

from case_fast import checksums
from case_fast import equations as eq
from case_fast.batch import Batch
from case_fast.data.featurizer import Example, TextTable
from case_fast.data.pack import make_batch
from case_fast.data.vocabulary import SPECIALS
from case_fast.errors import CheckpointError, ConfigError
from case_fast.knowledge.source import RELATIONS
from case_fast.models import CASE, CASEConfig, CASEOutput, build, case, layers, load
from case_fast.models.layers import drawn, seed_at
from case_fast.training.sampler import step_seed

# The parameters that each row of Table 2 leaves without use, by the start of their names.
SWITCHED_OFF = {
    "w/o Graph": ("cognition_graph.", "concept_graph."),
    "w/o Align": ("w_coarse", "w_fine"),
    "w/o CSGraph": ("cognition_graph.",),
    "w/o ECGraph": ("concept_graph.",),
    "w/o CGAlign": ("w_coarse",),
    "w/o FGAlign": ("w_fine",),
}
# What follows from cs_i and from ec_i: the rest of the forward pass must not change without that graph encoder.
FROM_COGNITION = {
    "knowledge",
    "prior_cognition",
    "posterior_cognition",
    "r_cog",
    "losses.bow",
    "losses.kl",
    "losses.coarse",
    "losses.fine",
}
FROM_CONCEPT = {
    "concept", "prior_concept", "posterior_concept", "r_emo", "r_aff", "gate", "emotion_logits", "losses.bow", "losses.kl",
    "losses.coarse", "losses.emotion",
}
DECODED = {"loss", "hidden", "nll", "prediction", "losses.generation", "losses.diversity"}


def ablated_model(name: str | None, **changes: object) -> CASE:
    """The tiny model of one seed with one row of Table 2."""
    torch.manual_seed(0)
    config = tiny_config(**changes)
    return CASE(config.ablated(name) if name else config)


def grads(model: CASE, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    names, leaves = zip(*model.named_parameters(), strict=True)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return {name: next(found) if leaf.requires_grad else None for name, leaf in zip(names, leaves, strict=True)}


def trainable(model: CASE) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- against the slow model

CONFIGS = {
    "as it comes": {},
    "as printed": PRINTED,
    "discernment scaled by the fourth root": {"discernment_scale": "fourth_root_d"},
    "all of these": ALL_SETTINGS,
    "standardized MIM scores": {"mim_score": "standardized"},
    "L_KL averaged over vertices": {"kl_reduction": "mean", "detach_posterior": False},
    "mean of the rows": {"vertex_pooling": "mean"},
    "small special words": {"special_scale": 0.1},
    "two layers, four heads": {"layers": 2, "heads": 4},
    "intensity before the norm": {"intensity": "before_norm"},
    "no intensity": {"intensity": "off"},
    "posterior not detached": {"detach_posterior": False},
    "dot product in the MIM losses": {"mim_score": "dot"},
    "other weights of the losses": {"alpha": 0.7, "gamma_align": 0.5, "gamma_emotion": 2.0, "gamma_generation": 0.3},
    **{name: changes for name, changes in CASEConfig.ablations.items()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_the_slow_model(name: str):
    """Every loss, every intermediate quantity and every gradient, in float64."""
    examples, texts = handmade_examples()
    model = tiny_model(d_model=12, **CONFIGS[name]).double().eval()
    model.word_counts.copy_(torch.arange(len(model.word_counts)) % 5)
    out = model(as_double(make_batch(examples, texts)))
    slow = SlowCase(model, CONCEPTS)
    loss, losses, dialogues = slow.forward(examples, texts)
    same(out.loss, loss)
    assert out.losses.keys() == losses.keys()
    for part in losses:
        same(out.losses[part], losses[part])
    for mine, its in {
        "prior_cognition": "prior_cognition", "posterior_cognition": "posterior_cognition", "prior_concept": "prior_concept",
        "posterior_concept": "posterior_concept",
    }.items():
        same(getattr(out, mine), torch.cat([getattr(x, its) for x in dialogues]))
    same(model.output(out.hidden), torch.cat([x.logits for x in dialogues]))
    same(out.nll, torch.cat([x.losses["nll"] for x in dialogues]))
    for mine in ("gate", "r_cog", "r_emo", "r_aff"):
        same(getattr(out, mine), torch.stack([getattr(x, mine) for x in dialogues]))
    same(out.emotion_logits.exp(), torch.stack([x.emotion for x in dialogues]))
    same(out.reaction, torch.stack([er for x in dialogues for er in x.er.values()]))
    expected = torch.autograd.grad(loss, list(slow.weights.values()), allow_unused=True)
    for (name, found), want in zip(grads(model, out.loss).items(), expected, strict=True):
        if found is None:
            assert want is None, name
        else:
            same(found, torch.zeros_like(found) if want is None else want, 1e-11)


def test_reading_needs_no_reply():
    """Decoding sees what training saw: `read` alone gives the intermediate quantities of `forward`."""
    model, batch = tiny_model().eval(), random_batch(5)
    out = model(batch)
    blank = replace(
        batch, case=replace(batch.case, response=batch.case.response * 0), target=batch.target * 0,
        decoder_input=batch.decoder_input * 0, emotion=-1,
    )
    reading = model.read(blank)
    assert reading.log_prior_cognition.exp().equal(out.prior_cognition) and reading.gate.equal(out.gate)
    assert reading.emotion_logits.equal(out.emotion_logits) and reading.reaction.equal(out.reaction)


# ---- ablations


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_ablation_changes_what_it_names_and_nothing_else(name: str):
    batch = random_batch(6)
    full, model = ablated_model(None).eval(), ablated_model(name).eval()
    assert full.state_dict().keys() == model.state_dict().keys()
    assert all(a.equal(b) for a, b in zip(full.state_dict().values(), model.state_dict().values(), strict=True))

    unused = {n for n, _ in full.named_parameters() if n.startswith(SWITCHED_OFF[name])}
    assert unused and trainable(full) - trainable(model) == unused
    out = model(batch)
    found = grads(model, out.loss)
    assert {n for n, g in found.items() if g is None} == unused
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if n in unused:
                parameter.fill_(torch.nan)
    spoiled = dict(tensors(model(batch)))
    assert all(t.equal(spoiled[n]) for n, t in tensors(out))

    may_change = set(DECODED) if "Graph" in name else {"loss"}
    off = CASEConfig.ablations[name]
    if "cognition_graph" in off:
        may_change |= FROM_COGNITION
    if "concept_graph" in off:
        may_change |= FROM_CONCEPT
    for part in ("coarse", "fine"):
        if f"{part}_alignment" in off:
            may_change.add(f"losses.{part}")
            assert out.losses[part] == 0 and not any(key.startswith(part) for key in out.diagnostics)
    got = dict(tensors(out))
    for n, before in tensors(full(batch)):
        if n in may_change:
            assert not got[n].equal(before) or n == "prediction", n
        elif not n.startswith("diagnostics"):
            assert got[n].equal(before), n


def test_without_a_graph_encoder_the_initial_vertices_stand_in():
    batch = random_batch(5)
    model = ablated_model("w/o Graph", **PRINTED).eval()
    reading = model.read(batch)
    d = model.config.d_model
    position = eq.sinusoidal_position(batch.concept.position, d)
    initial = model.embedding(batch.concept.word) * d**0.5 + position + model.vertex_type(batch.concept.type)
    same(reading.concept, initial, 1e-6)
    text = model.embedding(batch.case.text) * d**0.5 + eq.sinusoidal_position(
        eq.segment_positions(batch.case.cu_text, len(batch.case.text)), d
    )
    vertices = model.cognition_encoder(text, batch.case.cu_text)[batch.case.cu_text[:-1]][batch.case.cognition_text]
    same(reading.knowledge, vertices[batch.case.knowledge], 1e-6)


def test_config_refuses_what_cannot_work():
    for wrong in (
        {"heads": 5}, {"d_model": 0}, {"graph_dropout": 1.0}, {"intensity": "before"}, {"num_negatives": 0}, {"layers": 0},
        {"mim_score": "cosine"}, {"discernment_scale": 0.1}, {"kl_reduction": "none"},
        {"vertex_pooling": "max"}, {"special_scale": -0.1}, {"special_scale": math.inf}, {"special_scale": True},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            tiny_config(**wrong)
    with pytest.raises(ConfigError, match="w/o Nothing"):
        tiny_config().ablated("w/o Nothing")


# ---- empty sets

SUBSETS = [tuple(c) for n in range(6) for c in itertools.combinations(RELATIONS, n)]


def dialogues_with(relations: tuple[str, ...], concepts: bool, count: int) -> tuple[list[Example], TextTable]:
    rng = random.Random(len(relations) * 100 + count)
    texts = tiny_featurizer().text_table()
    words = CONTENT_WORDS if concepts else NO_CONCEPT_WORDS
    examples = []
    for _ in range(count):
        turns = [
            " ".join([*rng.choices(words, k=rng.randint(1, 4)), ".", *rng.choices(words, k=2)])
            for _ in range(rng.choice([1, 3]))
        ]
        known = inferences(speakers_prompts(turns), rng, relations, share=1.0)
        examples.append(dialogue(turns, texts, known, " ".join(rng.choices(CONTENT_WORDS, k=rng.randint(0, 4)))))
    return examples, texts


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("concepts", [True, False])
def test_empty_knowledge(concepts: bool, size: int):
    """Every subset of the five relations missing: a finite loss, and a finite gradient for every trainable parameter."""
    models = [tiny_model(d_model=8, heads=2, ffn=8, num_negatives=k, **changes).train()
              for k, changes in ((None, PRINTED), (3, ALL_SETTINGS))]
    for number, missing in enumerate(SUBSETS):
        kept = tuple(r for r in RELATIONS if r not in missing)
        batch = make_batch(*dialogues_with(kept, concepts, size))
        assert (batch.concept.type == 0).all() or concepts
        model = models[number % 2]
        out = model(batch)
        found = grads(model, out.loss)
        assert out.loss.isfinite() and all(part.isfinite() for part in out.losses.values()), missing
        wrong = [n for n, g in found.items() if n in trainable(model) and (g is None or not g.isfinite().all())]
        assert not wrong, (missing, wrong)
        no_cognition = set(missing) >= set(RELATIONS[:4])
        if no_cognition:
            assert len(batch.case.knowledge) == 0 and (out.r_cog == 0).all()
            rows = size if model.config.kl_reduction == "sum" else len(out.prior_concept)
            kl = eq.discernment_kl(out.posterior_concept.log(), out.prior_concept.log(), 1 / rows)
            same(out.losses["kl"], kl, 1e-4)
        if no_cognition or "xReact" in missing:
            assert out.losses["fine"] == 0 and (found["w_fine"] == 0).all()
        if no_cognition or size == 1:
            assert out.losses["coarse"] == 0 and (found["w_coarse"] == 0).all()


@pytest.mark.parametrize("changes", [PRINTED, ALL_SETTINGS], ids=["printed", "all settings"])
def test_each_gap_in_phase_1_and_no_nan_on_the_way_back(changes):
    """A dialogue of every kind by itself; anomaly mode also sees a NaN that is dropped before it reaches a parameter."""
    examples, texts = handmade_examples()
    for phase, e in itertools.product(CASE.phases, examples):
        model = tiny_model(d_model=8, ffn=8, graph_dropout=0.1, **changes).train()
        model.set_phase(phase)
        with torch.autograd.set_detect_anomaly(True):
            model(make_batch([e], texts)).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_what_is_left_out_leaves_the_divisor_too():
    """L_coarse over the dialogues that have knowledge, L_fine over the pairs that exist, as if the others were not there."""
    examples, texts = handmade_examples()
    model = tiny_model().double().eval()
    complete = [examples[0], examples[1], examples[6]]  # knowledge and reactions everywhere
    bare = [examples[4], examples[3]]  # nothing at all; a reaction without knowledge
    alone, mixed = (model(as_double(make_batch(e, texts))) for e in (complete, complete + bare[:1]))
    same(mixed.losses["coarse"], alone.losses["coarse"])
    same(mixed.losses["fine"], alone.losses["fine"])
    wider = model(as_double(make_batch(complete + bare, texts)))  # its reaction is one more negative
    same(wider.losses["coarse"], alone.losses["coarse"])
    assert wider.losses["fine"] > alone.losses["fine"]


# ---- phases


@pytest.mark.parametrize("name", [None, *SWITCHED_OFF])
def test_phase_1_trains_exactly_what_bow_reaches(name: str | None):
    batch = random_batch(4)
    model = ablated_model(name).train()
    before = trainable(model)
    bow = model(batch).losses["bow"]
    reached = {n for n, g in grads(model, bow).items() if g is not None}
    model.set_phase("bow")
    assert trainable(model) == reached < before
    counts = model.word_counts.clone()
    out = model(batch)
    assert out.loss.equal(bow) and out.losses.keys() == {"bow"}
    assert all(g is not None for n, g in grads(model, out.loss).items() if n in reached)
    assert model.word_counts.equal(counts)
    model.set_phase("bow")
    model.set_phase("all")
    assert trainable(model) == before
    assert {n for n, g in grads(model, model(batch).loss).items() if g is not None} == before


def test_what_the_user_froze_stays_frozen():
    model = tiny_model()
    for part in (model.embedding, model.decoder):
        part.requires_grad_(False)
    mine = trainable(model)
    model.set_phase("bow")
    assert not model.embedding.weight.requires_grad
    model.set_phase("all")
    assert trainable(model) == mine
    with pytest.raises(ConfigError, match="case has no phase 'cog'; it has bow, all"):
        model.set_phase("cog")


# ---- counters


def test_word_counts():
    """Training only, EOS not counted, and grown before the weights are read."""
    batch = random_batch(6)
    model = tiny_model().train()
    for step in (1, 2):
        before = model.word_counts.clone()
        out = model(batch)
        said = [word for word in out.prediction.tolist() if word != model.config.eos_id]
        assert (model.word_counts - before).tolist() == [said.count(word) for word in range(model.config.vocab_size)]
        weights = eq.diversity_weights(model.word_counts)
        same(out.losses["diversity"], (weights[batch.target] * out.nll).mean(), 1e-6)
        assert not out.losses["diversity"].equal(out.losses["generation"]), step
    frozen = model.word_counts.clone()
    model.eval()
    model(batch)
    assert model.word_counts.equal(frozen) and frozen.dtype == torch.int64
    with torch.no_grad():
        model.output.bias[model.config.eos_id] = 1e4
    model.train()
    assert (model(batch).prediction == model.config.eos_id).all() and model.word_counts.equal(frozen)


def test_no_counts_weigh_all_words_alike():
    out = tiny_model().eval()(random_batch(3))
    same(out.losses["diversity"], out.losses["generation"], 1e-6)


def test_sampled_negatives_follow_the_seed_of_the_batch():
    batch = random_batch(8)
    model = ablated_model(None, num_negatives=3, **PRINTED).eval()
    quiet = [model(batch).losses["fine"] for _ in range(2)]
    assert quiet[0].equal(quiet[1])
    losses = [model(seeded(batch, seed)).losses["fine"].item() for seed in range(4)]
    assert len(set(losses)) == 4 and losses[0] == quiet[0].item()
    assert model.train()(batch).losses["fine"].equal(quiet[0])
    case, reading = batch.case, model.eval().read(batch)
    knowledge, reaction = reading.knowledge[case.paired], reading.reaction[case.with_reaction]
    loss = eq.bilinear_mim(knowledge, reaction, model.w_fine, case.positive, 3, drawn(seed_at(0, "negatives")))
    same(loss, quiet[0], 1e-6)
    full = ablated_model(None, **PRINTED).eval()(batch)
    assert full.losses["coarse"].equal(model(batch).losses["coarse"])  # only L_fine is sampled


def test_forward_asks_the_device_for_no_size_and_draws_no_seed(monkeypatch):
    """What a captured step forbids: `nonzero`, `.item()`, `.tolist()`, and random numbers of the host for kernels' dropout."""
    dropout = {"graph_dropout": 0.3, "encoder_dropout": 0.2, "decoder_dropout": 0.1}
    model, batch = tiny_model(num_negatives=3, **dropout).train(), random_batch(6)
    model.decoder.requires_grad_()
    seeds = []
    for module in (layers, case):
        monkeypatch.setattr(module, "drawn", lambda seed: seeds.append(drawn(seed)) or seeds[-1])
    for phase in CASE.phases:
        model.set_phase(phase)
        seeds.clear()
        with Seen() as seen:
            model(seeded(batch, 5)).loss.backward()
        asked = {"aten::nonzero", "aten::_local_scalar_dense", "aten::item", "aten::randint", "aten::masked_select"}
        assert len(seen.names) > 40 and not set(seen.names) & asked
        assert seen.numbers["aten::rsub"] == len(seeds) > 9  # a launch for each seed
    with Seen() as seen, torch.no_grad():
        model.eval().read(batch)
    assert seen.names and not seen.numbers["aten::rsub"]
    sources = [path.read_text() for path in Path(inspect.getfile(CASE)).parent.glob("*.py")]
    source = "".join(text for text in sources if "    asks = " not in text)  # MoEL says that it asks
    assert len(sources) > 8 and not re.findall(r"\.(?:nonzero|item|tolist)\(|randint", source)


class Seen(TorchDispatchMode):
    """How often each operator ran, and how often it gave one whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        found = function(*args, **(kwargs or {}))
        self.names[name] += 1
        self.numbers[name] += isinstance(found, torch.Tensor) and found.dtype == torch.int64 and found.dim() == 0
        return found


def test_vertices_of_equal_rows_are_projected_once():
    """With dropout, in two layers, of which the first alone knows what is equal."""
    encoder = layers.GraphEncoder(2, 6, 2, 6, 0.3, relations=3).double()
    rows, index = torch.randn(3, 6, dtype=torch.float64), torch.tensor([2, 0, 2, 1, 0])
    graph = tuple(torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 3, 3, 6, 7], [1, 4, 0, 0, 2, 3, 4], [0, 1, 2, 2, 1, 0, 0]))
    found = []
    for given in ({"index": index}, {}):
        leaf = rows.clone().requires_grad_()
        out = encoder(leaf if given else leaf[index], *graph, seed=5, **given)
        gradients = torch.autograd.grad(out.square().sum(), [leaf, *encoder.parameters()])
        found.append([out.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dropout_follows_the_seed_of_the_batch():
    model, batch = tiny_model(graph_dropout=0.5).train(), random_batch(6)
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(0)  # of nn.Dropout
        found.append(model(seeded(batch, seed)).losses["bow"].item())
    assert found[0] == found[2] != found[1]


def test_the_seed_of_a_batch_may_change_in_place():
    """As that of a captured step does: the same batch, another dropout and other negatives."""
    model, batch = tiny_model(graph_dropout=0.5, num_negatives=3).train(), random_batch(6)

    def losses(batch: Batch) -> dict[str, float]:
        torch.manual_seed(0)  # of nn.Dropout
        return {name: value.item() for name, value in deepcopy(model)(batch).losses.items()}  # a copy: forward counts words

    found = []
    for seed in (1, 2**62 + 3, 1):
        batch.seed.fill_(seed)
        found.append(losses(batch))
        assert found[-1] == losses(seeded(random_batch(6), seed))
    assert found[0] == found[2] and all(found[0][name] != found[1][name] for name in ("bow", "fine", "generation"))


@pytest.mark.parametrize("step", [0, 1, 7, 2**31, 2**40 + 3, 2**62, 2**63 - 1, *[step_seed(3, step) for step in range(60)]])
def test_the_seed_of_a_place_is_the_same_number_in_a_tensor(step):
    """Of a place, of one within it, and so on: as whole numbers count, modulo 2^63."""
    of_number, of_tensor, expected = step, torch.tensor(step), step
    for place in ("texts", 0, "cross", 5, 2**40):
        number = zlib.crc32(place.encode()) if isinstance(place, str) else place
        expected = (expected * 6364136223846793005 + number * 1442695040888963407 + 1) % 2**63
        of_number, of_tensor = seed_at(of_number, place), seed_at(of_tensor, place)
        assert drawn(of_number) == expected == int(drawn(of_tensor)) % 2**63


def test_dot_product_scores_leave_the_bilinear_weights_out():
    batch = random_batch(8)
    model = ablated_model(None, mim_score="dot").train()
    out = model(batch)
    assert set(out.diagnostics) == {f"{loss}_bound_{side}" for loss in ("coarse", "fine") for side in ("affection", "cognition")}
    found = grads(model, out.loss)
    assert {name for name, grad in found.items() if grad is None} == {"w_coarse", "w_fine"} == set(found) - trainable(model)
    bilinear = ablated_model(None).train()(batch)
    assert "coarse_saturated" in bilinear.diagnostics and not bilinear.losses["fine"].equal(out.losses["fine"])
    assert bilinear.losses["bow"].equal(out.losses["bow"])


@pytest.mark.parametrize("changes", [{}, {"num_negatives": 3}, {"mim_score": "dot"}, {"mim_score": "standardized"}])
def test_the_mim_losses_are_those_of_the_plain_equation(monkeypatch, changes):
    """Whatever backend ops.mim_sides chooses."""
    batch = random_batch(8)
    model = tiny_model(**changes).eval()
    found = model(batch)
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")
    plain = model(batch)
    for name in ("coarse", "fine"):
        assert close(found.losses[name], plain.losses[name], 1e-5)
    assert found.diagnostics.keys() == plain.diagnostics.keys()
    assert all(close(value, plain.diagnostics[name], 1e-5) for name, value in found.diagnostics.items())


@pytest.mark.parametrize("k", [None, 3])
def test_diagnostics_of_standardized_scores(k: int | None):
    """Bounds and the saturated share by the definition, from what `read` gives; the latter small at the start at any width."""
    batch = random_batch(9)
    model = tiny_model(mim_score="standardized", d_model=64, num_negatives=k).double().eval()
    out, case = model(as_double(batch)), batch.case
    coarse = out.r_cog[case.known], out.r_emo[case.known], model.w_coarse, torch.arange(len(case.known)), None
    reading = model.read(as_double(batch))
    fine = reading.knowledge[case.paired], out.reaction[case.with_reaction], model.w_fine, case.positive, k
    for name, (x, y, weight, positive, drawn_negatives) in {"coarse": coarse, "fine": fine}.items():
        x, y = ((t - t.mean(0)) / (t.var(0, correction=0) + 1e-5).sqrt() for t in (x, y))
        z = x @ weight @ y.T / 64
        seed = 0 if drawn_negatives is None else drawn(seed_at(batch.seed, "negatives"))
        sides = eq.mim_sides(x, y, weight / 64, positive, drawn_negatives, seed)
        counts = eq.mim_negatives(positive, len(y), drawn_negatives)
        same(out.losses[name], (sides[0] + sides[1]).mean())
        for side, loss, count in zip(("affection", "cognition"), sides, counts, strict=False):
            same(out.diagnostics[f"{name}_bound_{side}"], ((count + 1).double().log() - loss).mean())
        same(out.diagnostics[f"{name}_saturated"], (z[torch.arange(len(x)), positive].abs() > 5).double().mean())
        assert out.diagnostics[f"{name}_saturated"] < 0.05 and 0.3 < z.std() < 3


def test_special_words_and_place_0_start_as_large_as_asked():
    assert case.SPECIAL_WORDS == len(SPECIALS)
    printed, small = (tiny_model(special_scale=scale) for scale in (1.0, 0.1))
    scale = torch.ones(printed.config.vocab_size, 1)
    scale[: len(SPECIALS)] = 0.1
    assert small.embedding.weight.equal(printed.embedding.weight * scale)
    assert small.vertex_type.weight.equal(printed.vertex_type.weight * 0.1)
    position = torch.tensor([0, 1, 0, 7])
    for longest in (8, 5000):  # looked up, computed
        found, whole = (model.positions(position, longest, torch.float32) for model in (small, printed))
        assert found.equal(whole * torch.tensor([[0.1], [1], [0.1], [1]]))


def test_many_sampled_negatives_approach_all():
    """k draws stand for n rows: with the log of each set's size taken off, the bounds agree."""
    batch = random_batch(8)
    exact, sampled = (tiny_model(num_negatives=k).eval()(batch).diagnostics for k in (None, 4000))
    for side in ("fine_bound_affection", "fine_bound_cognition"):
        assert abs(exact[side] - sampled[side]) < 0.05


def test_published_figures_are_those_of_the_ablation_and_of_no_unnamed_mixture():
    for name in CASEConfig.ablations:
        assert CASEConfig().ablated(name).ablation == name and CASE.published[name]["ppl_geometric"] > 35.37
    assert CASEConfig(d_model=100).ablation == "" and CASE.published[""]["acc_1"] == 0.402
    assert CASEConfig(cognition_graph=False, fine_alignment=False).ablation is None


# ---- intensity


def test_intensity():
    batch = random_batch(5)
    off, after, inside = (tiny_model(intensity=kind).eval() for kind in ("off", "after", "before_norm"))
    plain = off.read(batch).concept
    same(after.read(batch).concept, plain * (1 + batch.concept.intensity)[:, None], 1e-6)
    assert close(inside.read(batch).concept, plain, 1e-3)  # it cancels in the norm
    assert not close(after.read(batch).concept, plain, 1e-1)
    strong = replace(batch, concept=replace(batch.concept, intensity=batch.concept.intensity + 1))
    assert all(a.equal(b) for (_, a), (_, b) in zip(tensors(off(batch)), tensors(off(strong)), strict=True))


# ---- dtypes


def _relative(out: CASEOutput, truth: CASEOutput) -> dict[str, float]:
    return {n: ((out.losses[n].double() - v).abs() / v.abs().clamp(min=1)).item() for n, v in truth.losses.items()}


@pytest.mark.parametrize("changes", [PRINTED, ALL_SETTINGS], ids=["printed", "all settings"])
def test_bfloat16_autocast_is_finite_and_close(changes):
    batch = random_batch(8, seed=2)
    model = tiny_model(d_model=32, **changes).eval()
    truth = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch)
    assert max(_relative(out, truth).values()) < 0.03
    for name in (
        "prior_cognition",
        "posterior_cognition",
        "prior_concept",
        "posterior_concept",
        "gate",
        "emotion_logits",
        "nll",
    ):
        assert getattr(out, name).dtype == torch.float32, name
    sums = eq.segment_sum(out.prior_concept, batch.concept.graph.dialogue, batch.size)
    same(sums, torch.ones(batch.size), 1e-6)
    found = grads(model, out.loss)
    assert all(g is not None and g.isfinite().all() and g.dtype == torch.float32 for g in found.values())
    for (name, exact), g in zip(grads(model, truth.loss).items(), found.values(), strict=True):
        assert (g - exact).norm() <= 0.15 * exact.norm() + 0.02, name


def test_float32_against_float64():
    batch = random_batch(8, seed=2)
    model = tiny_model(d_model=32).eval()
    single = model(batch)
    double = model.double()(as_double(random_batch(8, seed=2)))
    assert double.loss.dtype == double.hidden.dtype == torch.float64
    assert max(_relative(single, double).values()) < 1e-5
    assert close(single.hidden, double.hidden, 1e-5) and close(single.nll, double.nll, 1e-5)


# ---- files


def test_state_dict_has_the_same_keys_whatever_is_switched_off():
    keys = {tuple(ablated_model(name).state_dict()) for name in (None, *SWITCHED_OFF)}
    assert len(keys) == 1 and "word_counts" in next(iter(keys))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network connection was attempted")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _outputs(model: CASE, batch: Batch) -> dict[str, torch.Tensor]:
    return dict(tensors(model.eval()(batch)))


def test_save_and_load(tmp_path, no_network: None):
    batch = random_batch(4)
    model = tiny_model(num_negatives=4, intensity="before_norm", fine_alignment=True, coarse_alignment=False).train()
    model(batch)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    assert not [p.name for p in tmp_path.iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".pickle")]
    loaded = CASE.from_pretrained(tmp_path)
    assert isinstance(loaded.config, CASEConfig) and loaded.config == model.config
    assert loaded.word_counts.sum() > 0
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert trainable(loaded) == trainable(model)
    before, after = _outputs(model, batch), _outputs(loaded, batch)
    assert before.keys() == after.keys() and all(before[n].equal(after[n]) for n in before)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_loading_is_strict_and_takes_folders_only(tmp_path, no_network: None):
    for absent in (tmp_path / "absent", "runs/best", "best", tmp_path):  # the mixin would look for two of these on the hub
        with pytest.raises(CheckpointError, match="save_pretrained"):
            CASE.from_pretrained(absent)
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for spoiled in (
        {n: t for n, t in weights.items() if n != "word_counts"},
        {n: t for n, t in weights.items() if n != "decoder.norm.weight"},
        weights | {"another": torch.zeros(1)},
        weights | {"w_aff": torch.zeros(3)},
    ):
        save_file(spoiled, path)
        with pytest.raises(CheckpointError):
            CASE.from_pretrained(tmp_path)
    save_file(weights, path)
    CASE.from_pretrained(tmp_path)
    good = (tmp_path / "config.json").read_text()
    for wrong in (json.dumps(json.loads(good) | {"d_model": 5}), json.dumps(json.loads(good) | {"colour": 1}), good[:-9], "[]"):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(CheckpointError):
            CASE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(good)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError):
        CASE.from_pretrained(tmp_path)


def test_load_embeddings():
    model = tiny_model()
    before = model.embedding.weight.detach().clone()
    ids = torch.tensor([9, 12], dtype=torch.int32)
    model.load_embeddings(ids, torch.ones(2, 16, dtype=torch.float64))
    others = [i for i in range(len(before)) if i not in (9, 12)]
    assert (model.embedding.weight[[9, 12]] == 1).all() and model.embedding.weight[others].equal(before[others])
    with pytest.raises(ValueError, match="vectors"):
        model.load_embeddings(ids, torch.ones(2, 15))


def test_weights_of_earlier_versions_load(tmp_path):
    """Without the model's name, with the seed of drawn negatives and its counter."""
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    (tmp_path / checksums.NAME).unlink()
    config = {key: value for key, value in model.config.as_dict().items() if key != "model"} | {"seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"draws": torch.tensor(7)}, tmp_path / "model.safetensors")
    for loaded in (load(tmp_path), CASE.from_pretrained(tmp_path)):
        assert loaded.config == model.config
        assert all(a.equal(b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


@dataclass(frozen=True)
class LaterConfig(CASEConfig):
    """As it would be with other defaults."""

    mim_score: str = "dot"
    discernment_scale: str = "sqrt_d"
    vertex_pooling: str = "mean"
    special_scale: float = 0.1
    kl_reduction: str = "mean"


def test_weights_saved_before_a_setting_existed_load_with_what_they_were_trained_with(tmp_path, monkeypatch):
    """Whatever the default is by then; new models take the new default, and saved settings stay."""
    model = tiny_model(**PRINTED).eval()
    monkeypatch.setattr(CASE, "Config", LaterConfig)
    first = {"vocab_size", "emotions", "eos_id", "d_model", "heads", "layers", "ffn", "encoder_dropout", "decoder_dropout",
             "cognition_relations", "graph_dropout", "cognition_graph", "concept_graph", "coarse_alignment", "fine_alignment",
             "intensity", "num_negatives", "detach_posterior", "alpha", "gamma_align", "gamma_emotion", "gamma_generation",
             "gamma_diversity"}
    config = model.config.as_dict()
    assert config.keys() - first - {"model"} == CASEConfig.came_later.keys()  # a new setting says what came before it
    model.save_pretrained(tmp_path)
    (tmp_path / checksums.NAME).unlink()
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in first}))
    later = {name: getattr(LaterConfig(), name) for name in CASEConfig.came_later}
    for loaded in (load(tmp_path), CASE.from_pretrained(tmp_path)):
        assert loaded.config.as_dict() == config
        assert all(a.equal(b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    assert {name: getattr(build("case").config, name) for name in later} == later
    (tmp_path / "config.json").write_text(json.dumps(config | later))
    assert load(tmp_path).config.as_dict() == config | later


def test_an_unknown_model_or_setting_is_named():
    with pytest.raises(ConfigError, match="there is no model 'gpt'; one of case, "):
        build("gpt")
    with pytest.raises(ConfigError, match="unknown setting colour of case"):
        build("case", colour=1)
