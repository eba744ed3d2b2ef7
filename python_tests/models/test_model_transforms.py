"""Whole models under transforms of torch, and weights of half precision."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import as_double, handmade_examples, same, tiny_vocabulary
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jvp, vjp, vmap

from case_fast.data.pack import make_batch
from case_fast.errors import ConfigError
from case_fast.generation import GenerationConfig, generate, generate_uncached
from case_fast.models import MODELS, build

SIZES = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12}
of_model = pytest.mark.parametrize("name", ["case", "cem", "transformer"])


@cache
def batch_of_three():
    examples, texts = handmade_examples()
    return as_double(make_batch(examples[:3], texts))


class Tiny:
    """A model in float64 as a function of its weights, with a tangent of them."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.model = build(name, **SIZES).double().eval()
        self.batch = batch_of_three()
        self.weights = {key: x.detach() for key, x in self.model.named_parameters() if x.requires_grad}
        self.tangents = {key: torch.randn_like(x) for key, x in self.weights.items()}

    def loss(self, weights: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, weights, (self.batch,)).loss

    def gradient(self) -> dict[str, Tensor]:
        """By an ordinary backward pass of the kernels."""
        leaves = [x for x in self.model.parameters() if x.requires_grad]
        found = torch.autograd.grad(self.model(self.batch).loss, leaves, allow_unused=True, materialize_grads=True)
        return dict(zip(self.weights, found, strict=True))

    def along(self, gradient: dict[str, Tensor]) -> Tensor:
        return sum((x * self.tangents[key]).sum() for key, x in gradient.items())


@of_model
def test_first_derivatives_of_a_model_are_those_of_its_backward_pass(native, name):
    tiny = Tiny(name)
    expected = tiny.gradient()
    for found in (grad(tiny.loss)(tiny.weights), vjp(tiny.loss, tiny.weights)[1](torch.ones((), dtype=torch.float64))[0]):
        for key, x in expected.items():
            same(found[key], x, 1e-9)
    value, slope = jvp(tiny.loss, (tiny.weights,), (tiny.tangents,))
    same(value, tiny.model(tiny.batch).loss.detach(), 1e-10)
    same(slope, tiny.along(expected), 1e-8)
    with forward_ad.dual_level():
        dual = {key: forward_ad.make_dual(x, tiny.tangents[key]) for key, x in tiny.weights.items()}
        same(forward_ad.unpack_dual(tiny.loss(dual)).tangent, tiny.along(expected), 1e-8)


@of_model
def test_second_derivatives_of_a_model_are_those_of_plain_torch(native, monkeypatch, name):
    tiny = Tiny(name)
    found = jvp(grad(tiny.loss), (tiny.weights,), (tiny.tangents,))[1]
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")
    leaves = {key: x.clone().requires_grad_() for key, x in tiny.weights.items()}
    more = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(tiny.loss(leaves), list(leaves.values()), create_graph=True, **more)
    second = torch.autograd.grad(tiny.along(dict(zip(leaves, first, strict=True))), list(leaves.values()), **more)
    for key, x in zip(leaves, second, strict=True):
        same(found[key], x, 1e-8 * max(1.0, float(x.abs().max())))


@of_model
def test_many_models_and_many_gradients_at_once(native, name):
    tiny = Tiny(name)
    moved = {key: x + 0.01 * tiny.tangents[key] for key, x in tiny.weights.items()}
    both = {key: torch.stack([x, moved[key]]) for key, x in tiny.weights.items()}
    same(vmap(tiny.loss)(both), torch.stack([tiny.loss(tiny.weights), tiny.loss(moved)]), 1e-9)
    gradients, expected = vmap(grad(tiny.loss))(both), tiny.gradient()
    for key, x in expected.items():
        same(gradients[key][0], x, 1e-9)
    out = tiny.model(tiny.batch)
    leaves, ways = [x for x in tiny.model.parameters() if x.requires_grad], torch.eye(2, dtype=torch.float64)
    found = torch.autograd.grad(torch.stack([out.nll.sum(), out.loss]), leaves, ways, is_grads_batched=True, allow_unused=True,
                                materialize_grads=True)
    for x, of_both in zip(expected.values(), found, strict=True):
        same(of_both[1], x, 1e-9)
    same(functionalize(tiny.loss)(tiny.weights), tiny.loss(tiny.weights), 1e-10)


@pytest.mark.parametrize("transform, said", [(grad, "torch.func.grad or vjp"), (lambda f: vmap(f), "torch.vmap"),
                                             (lambda f: lambda x: jvp(f, (x,), (x,)), "torch.func.jvp"),
                                             (lambda f: vmap(grad(f)), "torch.func.grad or vjp in torch.vmap")])
def test_words_that_a_model_counts_in_training_are_no_part_of_a_transform(native, transform, said):
    """Counts of a buffer that stays outside; torch alone would not say which model that was."""
    tiny = Tiny("case")
    tiny.model.train()
    both = {key: torch.stack([x, x]) if "vmap" in said else x for key, x in tiny.weights.items()}
    before = tiny.model.word_counts.clone()
    try:
        transform(tiny.loss)(both)
    except NotImplementedError as error:
        assert str(error).startswith(f"the model case cannot run so under {said}: ")
        assert torch.equal(tiny.model.word_counts, before)
    else:
        assert said == "torch.func.jvp" and tiny.model.word_counts.sum() > before.sum()


# ---- half precision

HALVES = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to(float16)": lambda model: model.to(torch.float16),
    "to(dtype=bfloat16)": lambda model: model.to(dtype=torch.bfloat16),
    "type(half)": lambda model: model.type(torch.float16),
}


@pytest.mark.parametrize("how", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_weights_of_half_precision_are_refused_by_name(name, how):
    model = HALVES[how](build(name, **SIZES))
    examples, texts = handmade_examples()
    batch, greedy = make_batch(examples[:2], texts), GenerationConfig(max_words=3)
    calls = {
        "training": lambda: model.train()(batch), "evaluation": lambda: model.eval()(batch), "read": lambda: model.read(batch),
        "generate": lambda: generate(model, batch, greedy), "uncached": lambda: generate_uncached(model, batch, greedy),
    }
    for call in calls.values():
        with pytest.raises(ConfigError, match=rf"^the weights of {name} are torch\.b?float16, and it needs them in float32: call "
                                              r"model\.float\(\), .* torch\.autocast\(.*--precision bf16$"):
            call()


@pytest.mark.parametrize("name", MODELS)
def test_what_the_refusal_says_to_do_instead_works(name):
    """Within 2 % of float32's loss, in training and in decoding."""
    torch.manual_seed(0)
    model = build(name, **SIZES)
    examples, texts = handmade_examples()
    batch, greedy = make_batch(examples, texts), GenerationConfig(max_words=5)
    loss = model(batch).loss.item()
    scores = [reply.score for reply in generate(model, batch, greedy)]
    model.half().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch).loss.item() == pytest.approx(loss, rel=0.02)
        assert [reply.score for reply in generate(model, batch, greedy)] == pytest.approx(scores, rel=0.02)


# ---- torch.export


class Read(torch.nn.Module):
    """What CASE reads of a batch, as a function of the context's words (n,) and the intensities of G_EC's vertices (V,): all else
    of the batch, its shape too, is the program's own."""

    def __init__(self, model, batch):
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self, words: Tensor, intensity: Tensor) -> list[Tensor]:
        batch = replace(self.batch, context=words, concept=replace(self.batch.concept, intensity=intensity))
        reading = self.model.read(batch)
        return [*(memory.rows for memory in reading.memories), reading.emotion_logits]


def test_what_case_reads_exports_at_a_fixed_shape_with_the_ops_in_it(native):
    torch.manual_seed(0)
    examples, texts = handmade_examples()
    batch = make_batch(examples[:3], texts)
    read = Read(build("case", **SIZES).eval(), batch)
    given = batch.context, batch.concept.intensity
    program = torch.export.export(read, given)
    targets = {str(node.target) for node in program.graph.nodes}
    families = {"packed_attention", "graph_attention", "pooled_attention", "linear", "residual_norm", "segment_sum"}
    assert {f"case_fast.{family}_forward.default" for family in families} <= targets
    with torch.no_grad():
        for words, intensity in (given, (given[0].flip(0), 1 - given[1])):  # not those that it was traced with
            for found, expected in zip(program.module()(words, intensity), read(words, intensity), strict=True):
                same(found, expected, 1e-6)
        assert not torch.allclose(read(*given)[-1], read(given[0].flip(0), given[1])[-1])
