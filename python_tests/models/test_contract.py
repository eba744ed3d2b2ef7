"""What every model of `MODELS` owes to training, decoding and evaluation, whichever it is."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers import (
    as_double,
    close,
    handmade_examples,
    random_batch,
    random_examples,
    same,
    seeded,
    split_rows,
    tensors,
    tiny_vocabulary,
)
from torch import Tensor
from training_helpers import MemoryStore, interrupt_at, outcome, records, run, tiny_run

from case_fast.data.pack import make_batch
from case_fast.errors import CheckpointError, ConfigError
from case_fast.generation import GenerationConfig, generate, generate_uncached
from case_fast.models import MODELS, DialogueModel, build, load, model_class
from case_fast.models.base import Inside, Reading
from case_fast.references import read_references

GREEDY, BEAM = GenerationConfig(max_words=8), GenerationConfig(strategy="beam", beams=3, max_words=8)
TINY = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12}


SHORT = {"discriminator_steps": 4, "rounds": 3, "validate_rounds": 1, "generator_steps": 2}  # phases of empdg-d


def tiny(name: str, **changes: object) -> DialogueModel:
    """A few thousand weights, no dropout."""
    torch.manual_seed(0)
    own = {"case": {"graph_dropout": 0.0}, "empdg-d": SHORT | {"attention_width": 8}}.get(name, {"attention_width": 8})
    return build(name, **TINY | own | changes)


def outputs(model: DialogueModel, batch) -> list[dict[str, Tensor]]:
    """hidden, nll and emotion of each dialogue."""
    out = model(batch)
    found = {"hidden": split_rows(out.hidden, batch.cu_target), "nll": split_rows(out.nll, batch.cu_target)}
    if out.emotion_logits is not None:
        found["emotion"] = list(out.emotion_logits)
    return [{name: rows[b] for name, rows in found.items()} for b in range(batch.size)]


pytestmark = pytest.mark.parametrize("name", MODELS)


def test_a_model_names_what_it_is(name):
    kind = model_class(name)
    assert kind.Config.kind == name and issubclass(kind, DialogueModel) and kind.needs[0] == "dialogue"
    assert tiny(name).config.as_dict()["model"] == name
    assert all("source" in figures for figures in kind.published.values()) and "demo" in kind.presets
    assert kind.Config.from_dict(tiny(name).config.as_dict()) == tiny(name).config


def test_a_dialogue_does_not_depend_on_its_batch_and_gradients_add_up(name):
    examples, texts = handmade_examples()
    model = tiny(name).double().eval()
    whole = as_double(make_batch(examples, texts))
    alone = [as_double(make_batch([e], texts)) for e in examples]
    backwards = outputs(model, as_double(make_batch(examples[::-1], texts)))[::-1]
    for found, other, one in zip(outputs(model, whole), backwards, alone, strict=True):
        (own,) = outputs(model, one)
        for part, value in own.items():
            same(found[part], value, 1e-10)
            same(other[part], value, 1e-10)

    def gradients(batches: list) -> list[Tensor | None]:
        total = sum(model(batch).nll.sum() for batch in batches)
        wanted = [p for p in model.parameters() if p.requires_grad]
        return list(torch.autograd.grad(total, wanted, allow_unused=True))

    for together, apart in zip(gradients([whole]), gradients(alone), strict=True):
        assert (together is None) == (apart is None)
        if together is not None:
            same(together, apart, 1e-10)


def test_cached_decoding_is_uncached_decoding_whatever_the_batch(name):
    examples, texts = random_examples(6, seed=2)
    model = tiny(name).double().eval()
    with torch.no_grad():
        model.output.weight *= 8  # replies that differ
    batch = as_double(make_batch(examples, texts))
    for config in (GREEDY, BEAM):
        found = generate(model, batch, config)
        expected = generate_uncached(model, batch, config)
        assert [reply.words for reply in found] == [reply.words for reply in expected]
        assert all(abs(a.score - b.score) < 1e-9 for a, b in zip(found, expected, strict=True))
        alone = [generate(model, as_double(make_batch([e], texts)), config)[0].words for e in examples]
        assert [reply.words for reply in found] == alone
    assert len({reply.words for reply in found}) > 2


def test_reading_sees_neither_the_reply_nor_the_feedback_nor_the_emotion(name):
    model, batch = tiny(name).eval(), random_batch(5)
    case = replace(batch.case, response=batch.case.response * 0 + 9, response_role=batch.case.response_role * 0 + 9)
    feedback = batch.feedback._map(lambda x: x * 0 + 9)
    other = replace(batch, emotion=(batch.emotion + 7) % 32, target=batch.target * 0, decoder_input=batch.decoder_input * 0,
                    case=case, feedback=feedback)
    found = dict(tensors(model.read(other)))
    assert found and all(tensor.equal(found[path]) for path, tensor in tensors(model.read(batch)))


def test_forward_in_evaluation_is_reading_and_scoring(name):
    model, batch = tiny(name).eval(), random_batch(5)
    out, reading = model(batch), model.read(batch)
    same(model.reply_nll(batch.decoder_input, batch.cu_target, reading, batch.target), out.nll, 1e-5)
    assert (out.emotion_logits is None) == (reading.emotion_logits is None)
    whole, quick = read_references(model, [batch], model), read_references(model, [batch])
    assert all(close(a, b, 1e-5) for a, b in zip(whole.nll, quick.nll, strict=True)) and whole.words == batch.target.numel()
    assert whole.accuracy == quick.accuracy and not quick.losses
    assert whole.losses["generation"] == pytest.approx(out.losses["generation"].item(), rel=1e-5)
    assert whole.losses["loss"] == pytest.approx(out.loss.item(), rel=1e-6)


def test_inside_it_is_what_it_says_or_nothing(name):
    model, batch = tiny(name).eval(), random_batch(5)
    found = model.inside(batch, model(batch))
    assert (found != Inside()) == (name == "case")
    assert all(rows.dim() == 2 for rows in found.vectors.values())
    for choice in found.choices.values():
        number = choice.dialogue.bincount(minlength=batch.size)
        for sums in (torch.zeros(batch.size).index_add(0, choice.dialogue, p) for p in (choice.prior, choice.posterior)):
            assert close(sums, (number > 0).double(), 1e-5)
    for alignment in found.alignments.values():
        assert alignment.scores.shape[0] == len(alignment.positive) and alignment.positive.max() < alignment.scores.shape[1]
    assert found.gate is None or found.gate.shape == (batch.size,)
    assert all(isinstance(getattr(model, part), torch.nn.Module) for part in model.shared)


def test_a_model_says_what_it_weighs_and_what_its_sources_are(name):
    model, batch = tiny(name).double().eval(), as_double(random_batch(5))
    reading = model.read(batch)
    why = model.explain(batch, reading, posterior=True)
    rows = {"inferences": batch.case.knowledge_dialogue, "concepts": batch.concept.graph.dialogue,
            "context": batch.context_segment, "emotional": batch.emotional.segment}
    for names, memory in zip(model.sources, reading.memories, strict=True):
        assert memory.cu.diff().equal(sum(rows[part].bincount(minlength=batch.size) for part in names))
    for part, choice in why.choices.items():
        assert choice.dialogue.equal(rows[part])
        for weights in (choice.prior, choice.posterior):
            if weights is not None:
                sums = torch.zeros(batch.size, dtype=torch.float64).index_add(0, choice.dialogue, weights)
                same(sums, (rows[part].bincount(minlength=batch.size) > 0).double(), 1e-10)
    assert (why.gate is None) == (model.balance is None) and (why.emotion is None) == (reading.emotion_logits is None)
    if model.balance:
        again, other = (model.with_gate(batch, reading, gate) for gate in (why.gate, 1 - why.gate))
        assert all(x.equal(dict(tensors(reading))[path]) for path, x in tensors(again))
        assert not close(other.emotion_logits, reading.emotion_logits, 1e-6) and other.gate.equal(1 - why.gate)


def test_every_trained_parameter_is_in_the_graph_of_each_phase(name):
    model, batch = tiny(name).train(), random_batch(4)
    for phase in model.phases:
        model.set_phase(phase)
        model.zero_grad()
        model(batch).loss.backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    with pytest.raises(ConfigError, match=f"{name} has no phase 'else'; it has {', '.join(model.phases)}"):
        model.set_phase("else")


def test_a_batch_without_a_part_that_the_model_needs_is_refused(name):
    examples, texts = random_examples(2)
    model = tiny(name)
    model(make_batch(examples, texts, model.needs))
    for part in set(model.needs) - {"dialogue"}:
        with pytest.raises(ConfigError, match=f"lacks what the model reads: {part}"):
            model(make_batch(examples, texts, [need for need in model.needs if need != part]))


@pytest.mark.slow
def test_eight_dialogues_are_learnt_by_heart(name):
    """In 300 steps at most."""
    examples, texts = random_examples(8, seed=5)
    smoothing = {} if name == "case" else {"label_smoothing": 0.0}
    batch, model = make_batch(examples, texts), tiny(name, d_model=32, ffn=64, **smoothing)
    optimizer, steps = torch.optim.Adam(model.parameters(), lr=3e-3), 0
    while model.eval()(batch).losses["generation"] >= 0.05:
        assert steps < 300
        model.train()
        for _ in range(20):
            optimizer.zero_grad()
            model(batch).loss.backward()
            optimizer.step()
        steps += 20


def never_asks(name: str) -> None:
    """Leave out a model that asks the device for what a tensor holds: its forward pass is of no fixed shape."""
    if model_class(name).asks:
        pytest.skip(model_class(name).asks)


def test_a_compiler_sees_the_forward_pass_whole(name):
    never_asks(name)
    torch._dynamo.reset()
    model, batch = tiny(name, encoder_dropout=0.1).eval(), random_batch(4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():  # as models are evaluated; with gradients: the next
        same(compiled(batch).loss, model(batch).loss, 1e-6)


def test_a_new_seed_does_not_compile_a_model_again(name):
    never_asks(name)
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, batch = tiny(name, encoder_dropout=0.2, decoder_dropout=0.2).train(), random_batch(4)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for seed in (3, 4, 2**62):
        expected = deepcopy(model)  # forward may count words
        losses = []
        for function in (expected, compiled):
            torch.manual_seed(0)  # of nn.Dropout
            losses.append(function(seeded(batch, seed)).loss)
        same(losses[1], losses[0], 1e-5)
    assert len(graphs) == 1


def test_bf16_autocast_stays_near_float32(name):
    model, batch = tiny(name).eval(), random_batch(8)
    exact = model(batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(model(batch).loss - exact) <= 0.02 * exact.abs()


def test_words_alone_and_nothing_else_are_finite(name):
    examples, texts = handmade_examples()
    model = tiny(name).train()
    for example in (examples[4], examples[6]):  # no knowledge, no reaction, no concept, no reply; one word
        out = model(make_batch([example], texts))
        out.loss.backward()
        assert out.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_saved_weights_come_back_as_the_model_they_are(name, tmp_path):
    model, batch = tiny(name).eval(), random_batch(3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == name
    loaded = load(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert loaded(batch).loss.equal(model(batch).loss)
    other = next(kind for kind in MODELS if kind != name)
    with pytest.raises(CheckpointError, match=f"holds the model {name}, not {other}"):
        model_class(other).from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "checksums.json").unlink()  # as another version wrote it, not damaged
    (tmp_path / "config.json").write_text(json.dumps(config | {"model": "oracle"}))
    with pytest.raises(CheckpointError, match="'oracle', which this version does not know; it knows case, "):
        load(tmp_path)


def test_a_resumed_run_ends_as_one_that_was_never_stopped(name, tmp_path):
    settings = tiny_run().model if name == "case" else tiny(name, encoder_dropout=0.1, decoder_dropout=0.1).config
    store = MemoryStore()
    whole = run(store, tmp_path / "whole", tiny_run(model=settings))
    interrupt_at(store, tmp_path / "parts", 6, tiny_run(model=settings))
    ended = run(store, tmp_path / "parts", tiny_run(model=settings), resume=True)
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts") and (whole.steps, whole.best) == (ended.steps, ended.best)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["kind"] == name
    phases = [record["name"] for record in records(tmp_path / "whole", "phase")]
    assert phases == list(model_class(name).phases)
    with pytest.raises(ConfigError, match=f"cannot be resumed so: the model is {name} in the run and"):
        run(store, tmp_path / "whole", tiny_run(model=tiny(next(k for k in MODELS if k != name)).config), resume=True)


# ---- the first input and the added row of a `Reading`: room for models to come; here any model's decoder takes them


def test_a_given_first_input_and_an_added_row_decode_alike_with_and_without_a_cache(name):
    examples, texts = random_examples(3, seed=4)
    model = tiny(name).double().eval()
    with torch.no_grad():
        model.output.weight *= 8
    batch = as_double(make_batch(examples, texts))
    start, added = torch.randn(2, 3, 16, dtype=torch.float64)
    plain = model.read(batch)
    opened = Reading(memories=plain.memories, start=start, added=added, gates=plain.gates)
    for config in (GREEDY, BEAM):
        found = generate(model, batch, config, reading=opened)
        model.read = lambda batch: opened
        assert [reply.words for reply in found] == [reply.words for reply in generate_uncached(model, batch, config)]
        del model.read
        assert found != generate(model, batch, config, reading=plain)
    words, cu = batch.decoder_input, batch.cu_target
    both, neither = (model.reply_logits(words, cu, reading) for reading in (opened, plain))
    assert not close(both, neither, 1e-3)
    (whole,) = [split_rows(both, cu)[2]]
    same(model.reply_logits(words[cu[2] :], torch.tensor([0, len(whole)]), opened.repeat(2, 1)), whole, 1e-10)
    bos = model.embedding(words[cu[:-1]]) * model.config.d_model**0.5
    given, none = (replace_reading(plain, added=plain.added, start=start) for start in (bos, None))
    same(model.reply_logits(words, cu, given), model.reply_logits(words, cu, none), 1e-12)


def replace_reading(reading: Reading, **changes: Tensor | None) -> Reading:
    return Reading(memories=reading.memories, gates=reading.gates, **changes)
