"""What a dialogue owes to its batch mates (nothing but L_coarse and L_fine), decoding word by word, and long contexts."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    ALL_SETTINGS,
    PRINTED,
    close,
    dialogue,
    handmade_examples,
    inferences,
    random_examples,
    real_store,
    speakers_prompts,
    split_rows,
    tensors,
    tiny_config,
    tiny_featurizer,
    tiny_model,
    tiny_vocabulary,
)
from torch import Tensor

from case_fast.batch import Batch
from case_fast.data.pack import make_batch
from case_fast.data.store import Store
from case_fast.models import CASE, CASEConfig

TOLERANCE = 1e-5  # times max(1, |x|): reliability, row 10
MEMORIZED = 8


def fit(store: Store, steps: int, indices: range, batch_size: int = 8) -> CASE:
    """A small model trained on these dialogues."""
    torch.manual_seed(0)
    model = CASE(CASEConfig(vocab_size=len(store.featurizer.vocabulary), d_model=32, ffn=32)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    starts = range(0, len(indices), batch_size)
    for step in range(steps):
        first = starts[step % len(starts)]
        optimizer.zero_grad()
        model(store.batch("train", indices[first : first + batch_size])).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained(sample_store: Store) -> CASE:
    return fit(sample_store, 100, range(MEMORIZED))


def perplexity(model: CASE, batch: Batch) -> float:
    with torch.no_grad():
        return model(batch).nll.mean().exp().item()


def test_one_batch_can_be_memorized(trained: CASE, sample_store: Store):
    batch = sample_store.batch("train", range(MEMORIZED))
    untrained = CASE(trained.config).eval()
    assert perplexity(trained, batch) < 1.5 < 500 < perplexity(untrained, batch)
    assert (trained(batch).emotion_logits.argmax(1) == batch.emotion).all()
    assert trained.word_counts.sum() > 0 and trained.word_counts[trained.config.eos_id] == 0


# ---- one dialogue and its batch mates


@torch.no_grad()
def per_dialogue(model: CASE, batch: Batch) -> list[dict[str, Tensor]]:
    """The outputs that belong to each dialogue alone."""
    out = model(batch)
    packed = {
        "logits": (model.output(out.hidden), batch.cu_target),
        "nll": (out.nll, batch.cu_target),
        "prior_cognition": (out.prior_cognition, batch.case.cu_knowledge),
        "posterior_cognition": (out.posterior_cognition, batch.case.cu_knowledge),
        "prior_concept": (out.prior_concept, batch.concept.graph.cu_vertices),
        "posterior_concept": (out.posterior_concept, batch.concept.graph.cu_vertices),
    }
    whole = {name: getattr(out, name) for name in ("gate", "emotion_logits", "r_cog", "r_emo", "r_aff")}
    rows = {name: split_rows(tensor, cu) for name, (tensor, cu) in packed.items()} | whole
    return [{name: found[b] for name, found in rows.items()} for b in range(batch.size)]


def check_invariance(model: CASE, store: Store, split: str, count: int, rng: random.Random) -> None:
    """Every dialogue alone, and twice among 1 to 63 others in any order."""
    alone = [per_dialogue(model, store.batch(split, [i]))[0] for i in range(count)]
    for _ in range(2):
        order = rng.sample(range(count), count)
        while order:
            members = order[: rng.randint(2, 64)]
            order = order[len(members) :]
            for i, found in zip(members, per_dialogue(model, store.batch(split, members)), strict=True):
                for name, value in found.items():
                    assert close(value, alone[i][name], TOLERANCE), (split, i, name, len(members))


def test_a_dialogue_does_not_depend_on_its_batch(trained: CASE, sample_store: Store):
    check_invariance(trained, sample_store, "test", sample_store.size("test"), random.Random(3))


@pytest.mark.slow
def test_a_real_dialogue_does_not_depend_on_its_batch(real_data: Path, tmp_path: Path):
    store = real_store(real_data, tmp_path, 120)
    assert store.size("test") >= 200
    check_invariance(fit(store, 60, range(128), 16), store, "test", 200, random.Random(4))


@pytest.mark.parametrize("changes", [PRINTED, ALL_SETTINGS], ids=["printed", "all settings"])
def test_every_gap_among_others(changes):
    """Dialogues with and without each kind of knowledge do not touch one another."""
    model = tiny_model(**changes).eval()
    for examples, texts in (handmade_examples(), random_examples(24, seed=9)):
        together = per_dialogue(model, make_batch(examples, texts))
        for example, found in zip(examples, together, strict=True):
            alone = per_dialogue(model, make_batch([example], texts))[0]
            assert all(close(found[name], alone[name], TOLERANCE) for name in alone)
            twice = per_dialogue(model, make_batch([example, example], texts))
            assert all(close(t[name], alone[name], TOLERANCE) for t in twice for name in alone)


@pytest.mark.parametrize("changes", [PRINTED, ALL_SETTINGS], ids=["printed", "all settings"])
def test_nan_in_one_dialogue_stays_there(changes):
    """The others' outputs are bit-identical; L_coarse and L_fine, which mix dialogues, show the NaN."""
    examples, texts = random_examples(9, seed=1)
    model, batch = tiny_model(**changes).eval(), make_batch(examples, texts)
    clean = per_dialogue(model, batch)
    assert model(batch).loss.isfinite()
    for victim in (0, 4, 8):
        intensity = batch.concept.intensity.clone()
        intensity[batch.concept.graph.dialogue == victim] = torch.nan
        spoiled = replace(batch, concept=replace(batch.concept, intensity=intensity))
        for b, (before, after) in enumerate(zip(clean, per_dialogue(model, spoiled), strict=True)):
            if b == victim:
                assert after["logits"].isnan().all() and after["gate"].isnan()
            else:
                assert all(after[name].equal(before[name]) for name in before)
        out = model(spoiled)
        has_knowledge = bool(batch.case.cu_knowledge[victim + 1] > batch.case.cu_knowledge[victim])
        assert bool(out.losses["coarse"].isnan()) == has_knowledge and out.loss.isnan()


def test_the_batch_is_not_changed_by_the_model():
    examples, texts = handmade_examples()
    batch = make_batch(examples, texts)
    before = copy.deepcopy(batch)
    tiny_model().train()(batch).loss.backward()
    found = dict(tensors(before))
    assert len(found) > 40 and all(torch.equal(tensor, found[name]) for name, tensor in tensors(batch))


# ---- one word at a time


@torch.no_grad()
def check_decoding(model: CASE, batch: Batch, beams: int) -> None:
    """Feeding the reply word by word gives the logits of teacher forcing, position by position."""
    forced = split_rows(model.output(model(batch).hidden), batch.cu_target)
    words = split_rows(batch.decoder_input, batch.cu_target)
    state = model.start_decoding(model.read(batch), beams, max(map(len, words)))
    for position in range(max(map(len, words))):
        newest = torch.tensor([int(row[min(position, len(row) - 1)]) for row in words]).repeat_interleave(beams)
        logits = model.next_word_logits(newest, state).unflatten(0, (batch.size, beams))
        for b, row in enumerate(forced):
            for beam in range(beams if position < len(row) else 0):
                assert close(logits[b, beam], row[position], TOLERANCE), (b, beam, position)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("which", ["some without knowledge", "none has knowledge", "one dialogue", "two layers", "settings"])
def test_decoding_equals_teacher_forcing(which: str, beams: int):
    examples, texts = handmade_examples()
    if which == "none has knowledge":
        examples = [e for e in examples if not len(e.knowledge)]
        assert len(examples) == 2
    elif which == "one dialogue":
        examples = examples[:1]
    model = tiny_model(layers=2 if which == "two layers" else 1, **(ALL_SETTINGS if which == "settings" else {})).eval()
    check_decoding(model, make_batch(examples, texts), beams)


def test_decoding_of_sample_dialogues(trained: CASE, sample_store: Store):
    check_decoding(trained, sample_store.batch("test", range(16)), 1)


@torch.no_grad()
def test_hypotheses_can_be_reordered_and_dialogues_dropped():
    examples, texts = handmade_examples()
    model, batch = tiny_model().eval(), make_batch(examples[:3], texts)
    state = model.start_decoding(model.read(batch), 2)
    first = torch.tensor([2, 9, 2, 10, 2, 11])  # two hypotheses a dialogue
    model.next_word_logits(first, state)
    state.reorder(torch.tensor([1, 1, 2, 3, 5, 4]))
    state.keep(torch.tensor([0, 2]))
    logits = model.next_word_logits(torch.tensor([12, 13, 14, 15]), state)
    for row, (example, past, word) in zip(logits, [(0, 9, 12), (0, 9, 13), (2, 11, 14), (2, 2, 15)], strict=True):
        single = model.start_decoding(model.read(make_batch([examples[example]], texts)))
        model.next_word_logits(torch.tensor([past]), single)
        assert close(row, model.next_word_logits(torch.tensor([word]), single)[0], TOLERANCE)


@torch.no_grad()
def test_the_cache_takes_as_many_words_as_it_was_made_for():
    examples, texts = handmade_examples()
    said = " ".join(random.Random(2).choices(["happy", "exam", "so", "dog"], k=69))
    examples = [replace(e, response=dialogue(["rain ."], texts, {}, said).response) for e in examples[:3]]
    model, batch = tiny_model(layers=2).eval(), make_batch(examples, texts)
    check_decoding(model, batch, 2)
    state = model.start_decoding(model.read(batch), 2, words=3)
    for _ in range(3):
        model.next_word_logits(torch.full((6,), 20), state)
    with pytest.raises(IndexError, match="there is room for 3 words, and all of them are said"):
        model.next_word_logits(torch.full((6,), 20), state)


@torch.no_grad()
def test_beams_read_the_keys_of_their_dialogue_without_a_copy():
    examples, texts = handmade_examples()
    model, batch = tiny_model().eval(), make_batch(examples, texts)
    reading = model.read(batch)
    state = model.start_decoding(reading, 5)
    keys = [source.key for source in state.sources[0]]
    assert [len(key) for key in keys] == [len(memory.rows) for memory in reading.memories]
    model.next_word_logits(torch.full((35,), 20), state)
    past = state.past.data_ptr()
    state.reorder(torch.arange(35))
    state.keep(torch.tensor([1, 4, 6]))
    model.next_word_logits(torch.full((15,), 20), state)
    assert all(source.key is key for source, key in zip(state.sources[0], keys, strict=True))
    assert state.past.data_ptr() == past


# ---- short and long contexts


@pytest.mark.parametrize(
    "words, limit, cut", [(1, 512, 0), (2000, 512, 1488), (2000, 4000, 0), (512, 512, 0), (513, 512, 1)]
)
def test_contexts_of_any_length(words: int, limit: int, cut: int):
    rng = random.Random(words)
    said = [rng.choice(["exam", "rain", "dog", "study", "happy"]) for _ in range(words)]
    texts = tiny_featurizer().text_table()
    known = inferences(speakers_prompts(["so sad"]), rng, share=1.0)
    turns = [" ".join(said)] if words == 1 else [" ".join(said[:-4]), " ".join(said[-4:-2]), " ".join(said[-2:])]
    known |= inferences(speakers_prompts(turns), rng, share=1.0)
    example = dialogue(turns, texts, known, featurizer=tiny_featurizer(max_context=limit))
    assert example.truncated == cut and len(example.context) == words - cut
    assert tiny_vocabulary().decode(example.context) == said[cut:]  # the latest words are kept
    assert int(example.concept_position.max(initial=0)) <= len(example.context)
    model = CASE(tiny_config(d_model=8, ffn=8)).train()
    out = model(make_batch([example], texts))
    out.loss.backward()
    assert out.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
