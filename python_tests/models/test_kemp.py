"""KEMP against its slow form, and what must hold of its graph, its emotional signal and its attention loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import as_double, close, handmade_examples, parameter_count, random_examples, same, tiny_vocabulary
from slow_kemp import SlowKEMP

from case_fast import equations as eq
from case_fast import equations_baselines as eqb
from case_fast.batch import Batch
from case_fast.data.pack import make_batch
from case_fast.errors import ConfigError
from case_fast.models import build
from case_fast.models.kemp import KEMP, KEMPConfig

TINY = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12, "attention_width": 8, "label_smoothing": 0.0,
        "graph_dropout": 0.0}
FRAME = {"attention_width": None, "emotion_scale": "one", "attention_scale": "one", "gamma_attention": 30.0}
CONFIGS = {"": {}, **KEMPConfig.ablations, "frame": FRAME, "two layers": {"layers": 2} | FRAME,
           "w/o ECE, EDD": {"concepts": False, "emotion_dependency": False}}


def model_of(**changes: object) -> KEMP:
    torch.manual_seed(0)
    return build("kemp", **TINY | changes).double()


def batch_of(count: int, seed: int = 0) -> Batch:
    return as_double(make_batch(*random_examples(count, seed), KEMP.needs))


@pytest.mark.parametrize(("recipe", "words", "expected"), [
    ("released", 22_796, 14_589_896), ("released", 100, 949_600), ("frame", 22_796, 15_706_196),
])
def test_as_many_parameters_as_the_closed_form_says(recipe, words, expected):
    assert parameter_count("kemp", recipe, words) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_equal_the_slow_model(changes, training):
    for examples, texts in (handmade_examples(), random_examples(4, seed=1)):
        model = model_of(**changes).train(training)
        slow = SlowKEMP(model)
        expected, out = slow.forward(examples, training), model(as_double(make_batch(examples, texts, KEMP.needs)))
        for name, loss in {"loss": out.loss, "nll": out.nll, **out.losses}.items():
            same(loss, expected[name], 1e-9)
        assert out.losses.keys() == expected.keys() - {"loss", "nll"}
        slow.same_gradients(model, out.loss, expected["loss"])


def test_a_scale_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="attention_scale must be one, dialogue or batch, not 'all'"):
        KEMPConfig(attention_scale="all")


def test_the_signal_is_the_mean_of_equal_vertices_and_the_row_of_one_that_outweighs_all():
    model, batch = model_of().eval(), batch_of(4)
    part, graph = batch.concept, batch.concept.graph
    rows, dialogue = model.read(batch).memories[0].rows, graph.dialogue
    equal = replace(batch, concept=replace(part, intensity=torch.full_like(part.intensity, 0.3)))
    same(model.read(equal).added, eq.segment_mean(rows, dialogue, 4), 1e-12)
    chosen = graph.cu_vertices[:-1] + 2
    peak = torch.zeros_like(part.intensity).index_fill(0, chosen, 1e4)
    same(model.read(replace(batch, concept=replace(part, intensity=peak))).added, rows[chosen], 1e-12)


def test_an_edge_that_goes_changes_its_own_end_alone():
    model, batch = model_of().eval(), batch_of(3, seed=4)
    graph = batch.concept.graph
    before = model._vertices(batch, model.look_up(model._words(batch)))
    vertex = 3  # a word: its row goes from its neighbours to itself and the first of them
    kept = torch.ones(len(graph.indices), dtype=torch.bool)
    kept[int(graph.indptr[vertex + 1]) - 1] = False
    indptr = graph.indptr.clone()
    indptr[vertex + 1 :] -= 1
    changed = replace(graph, indices=graph.indices[kept], indptr=indptr, relation=graph.relation[kept])
    after = model._vertices(replace(batch, concept=replace(batch.concept, graph=changed)), model.look_up(model._words(batch)))
    moved = (before != after).any(1)
    assert moved.nonzero().flatten().tolist() == [vertex]


def test_concepts_keep_their_rows_in_the_graph():
    model, batch = model_of().eval(), batch_of(4)
    concepts = batch.concept.type == 1
    words = model.look_up(model._words(batch))
    rows = model.place(words["concept"], batch.concept.position, batch.longest) + model.concept_state
    assert concepts.any() and close(model._vertices(batch, words)[concepts], rows[concepts], 1e-12)


def test_attention_is_averaged_over_heads_and_rows_as_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, 2, 4, generator=generator, dtype=torch.float64) for n in (7, 9))
    of_row, of_key = torch.tensor([0, 0, 0, 1, 1, 2, 3]), torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 4])  # 3 has no key, 4 no row
    found = eqb.mean_attention(query, key, of_row, of_key, 5)
    for b in range(5):
        q, k = query[of_row == b], key[of_key == b]
        expected = torch.einsum("mhd,shd->hms", q, k).div(2).softmax(-1).mean((0, 1)) if len(q) else torch.zeros(len(k))
        same(found[of_key == b], expected.double(), 1e-12)


def test_even_attention_over_equal_intensities_costs_nothing():
    model, batch = model_of().train(), batch_of(4)
    with torch.no_grad():
        model.decoder.layers[-1].cross_attention[0].query.weight.zero_()
    batch = replace(batch, concept=replace(batch.concept, intensity=torch.ones_like(batch.concept.intensity)))
    same(model(batch).losses["attention"], torch.zeros((), dtype=torch.float64), 1e-24)


def test_a_mix_of_identity_and_nothing_is_the_plain_decoder():
    model, plain, batch = model_of().eval(), model_of(emotion_dependency=False).eval(), batch_of(4)
    with torch.no_grad():
        model.decoder.layers[0].mix.weight.copy_(torch.cat([torch.eye(16), torch.zeros(16, 16)], 1))
    weights = {name: x for name, x in model.state_dict().items() if ".mix." not in name}
    plain.load_state_dict(weights)
    same(model(batch).nll, plain(batch).nll, 1e-12)
