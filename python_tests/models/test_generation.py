"""Greedy search, beam search and sampling: against the decoder without cache, exhaustive search and exact distributions."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    as_double,
    dialogue,
    inferences,
    random_examples,
    speakers_prompts,
    tiny_config,
    tiny_featurizer,
    tiny_model,
    tiny_vocabulary,
)
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from case_fast import generation
from case_fast.data.pack import make_batch
from case_fast.data.vocabulary import BOS, EOS, SPECIALS, UNK
from case_fast.errors import CheckpointError, ConfigError
from case_fast.generation import Generated, GenerationConfig, Replayed, generate, generate_all, generate_uncached
from case_fast.models import CASE
from case_fast.models.base import evaluating

NEAR_TIE = 1e-4
GREEDY, BEAM = GenerationConfig(max_words=12), GenerationConfig("beam", max_words=10)


def lively_model(seed: int = 0, **changes: object) -> CASE:
    """A random model that is sure enough of its words to say different things, and ends some replies early."""
    model = tiny_model(seed, **changes).eval()
    with torch.no_grad():
        model.output.weight *= 4
        model.output.bias[EOS] = 1.5
    return model


def batches(examples, texts, size: int):
    for start in range(0, len(examples), size):
        yield make_batch(examples[start : start + size], texts)


def all_replies(model, examples, texts, config, size=16, function=generate, **keywords) -> list[Generated]:
    return [reply for batch in batches(examples, texts, size) for reply in function(model, batch, config, **keywords)]


def rank(reply: Generated, config: GenerationConfig) -> float:
    return reply.score / (len(reply.words) + (reply.ended_by == "eos")) ** config.length_penalty


def near_ties(left: list[Generated], right: list[Generated], config: GenerationConfig) -> int:
    """How many replies differ; each of them must be a near tie."""
    count = 0
    for a, b in zip(left, right, strict=True):
        if (a.words, a.ended_by) != (b.words, b.ended_by):
            count += 1
            assert abs(rank(a, config) - rank(b, config)) < NEAR_TIE, (a, b)
        assert a.score == pytest.approx(b.score, abs=1e-3)
    return count


@pytest.fixture(scope="module")
def many():
    return random_examples(120, seed=3)


# ---- the cache


@pytest.mark.parametrize("config", [GREEDY, BEAM], ids=["greedy", "beam"])
def test_cached_equals_uncached_in_float64(config, many):
    examples, texts = many
    model = lively_model(layers=2).double()
    said = []
    for batch in batches(examples[:80], texts, 16):
        batch = as_double(batch)
        cached, plain = generate(model, batch, config), generate_uncached(model, batch, config)
        assert [(r.words, r.ended_by) for r in cached] == [(r.words, r.ended_by) for r in plain]
        assert [r.score for r in cached] == pytest.approx([r.score for r in plain], abs=1e-9)
        said += cached
    assert {r.ended_by for r in said} == {"eos", "length"}  # both ways of ending were tried
    assert len({r.words for r in said}) > 40


@pytest.mark.parametrize("config", [GREEDY, BEAM], ids=["greedy", "beam"])
def test_cached_equals_uncached_in_float32(config, many):
    examples, texts = many
    assert any(len(e.knowledge) == 0 for e in examples) and any(len(e.concept) == 0 for e in examples)
    model = lively_model()
    cached = all_replies(model, examples, texts, config)
    plain = all_replies(model, examples, texts, config, function=generate_uncached)
    assert near_ties(cached, plain, config) <= 1


def test_no_dialogue_with_knowledge():
    examples, texts = random_examples(60, seed=1)
    bare = [e for e in examples if len(e.knowledge) == 0]
    assert len(bare) >= 5
    model = lively_model()
    for config in (GREEDY, BEAM):
        together = all_replies(model, bare, texts, config)
        assert near_ties(together, all_replies(model, bare, texts, config, function=generate_uncached), config) == 0
        assert near_ties(together, all_replies(model, bare, texts, config, size=1), config) == 0


# ---- batches


@pytest.mark.parametrize(
    "config", [GREEDY, BEAM, GenerationConfig("sample", top_p=0.9, seed=4, max_words=12)], ids=lambda c: c.strategy
)
def test_batch_mates_change_nothing(config, many):
    examples, texts = many
    examples = examples[:70]
    model = lively_model()
    alone = [generate(model, make_batch([e], texts), config, first_index=i)[0] for i, e in enumerate(examples)]
    sevens = [r for i, b in enumerate(batches(examples, texts, 7)) for r in generate(model, b, config, first_index=7 * i)]
    backwards = generate(model, make_batch(examples[::-1], texts), config, range(len(examples))[::-1])[::-1]
    assert near_ties(alone, sevens, config) == 0
    assert near_ties(alone, backwards, config) == 0


def test_reply_and_emotion_of_the_batch_are_not_read(many):
    examples, texts = many
    bare = [replace(e, response=e.response[:0], emotion=-1) for e in examples[:16]]
    for config in (GREEDY, BEAM):
        assert generate(lively_model(), make_batch(bare, texts), config) == generate(
            lively_model(), make_batch(examples[:16], texts), config
        )


def test_training_mode_and_dropout_do_not_matter_and_are_restored(many):
    examples, texts = many
    batch = make_batch(examples[:8], texts)
    model = lively_model(decoder_dropout=0.5, encoder_dropout=0.5, graph_dropout=0.5)
    expected = generate(model, batch, GREEDY)
    counts = model.word_counts.clone()
    model.train()
    assert generate(model, batch, GREEDY) == expected
    assert model.training and torch.equal(model.word_counts, counts)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(CheckpointError), torch.no_grad():
        model.output.bias[9] = math.nan
        generate(model, batch, GREEDY)
    assert model.training


# ---- without asking the device: what a CUDA graph can hold


SEARCHES = [
    replace(GREEDY, min_words=2), BEAM, GenerationConfig("sample", max_words=12, seed=3),
    GenerationConfig("sample", max_words=12, top_k=7, top_p=0.9),
]


@pytest.mark.parametrize("look_every", [1, 5, 8])
@pytest.mark.parametrize("config", SEARCHES, ids=lambda c: f"{c.strategy} {c.top_k}")
def test_replayed_steps_in_the_same_memory_give_the_same_replies(config, look_every, many):
    """Batch after batch, also of fewer dialogues, and of more keys than there is room for; here a step is its own replay."""
    examples, texts = many
    examples = sorted(examples[:60], key=lambda e: len(e.context))
    model, recorded, states = lively_model(layers=2).double(), [], []
    replayed = Replayed(model, config, lambda step: recorded.append(len(states)) or step, look_every)
    for start, size in [(50, 10), (0, 10), (10, 7), (20, 30), (15, 1)]:
        batch = as_double(make_batch(examples[start : start + size], texts))
        found, expected = replayed.generate(batch, start), generate(model, batch, config, start)
        assert [(r.words, r.ended_by) for r in found] == [(r.words, r.ended_by) for r in expected]
        assert [r.score for r in found] == pytest.approx([r.score for r in expected], abs=1e-9)
        states += [replayed.search.state] if replayed.search.state not in states else []
    assert len(states) == 2 and len(recorded) >= len(replayed.steps) > 1


@pytest.mark.parametrize("fixed", [False, True], ids=["plain", "fixed"])
@pytest.mark.parametrize("config", SEARCHES, ids=lambda c: f"{c.strategy} {c.top_k}")
def test_a_word_asks_the_device_for_nothing(config, fixed, many, monkeypatch):
    examples, texts = many
    model = lively_model()
    with evaluating(model):
        search = generation._search(model, config, model.read(make_batch(examples[:9], texts)), fixed)
        search.begin(range(9))
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"a step calls {name}"))
        with Asked() as seen:
            for _ in range(3):
                search.step()
    assert len(seen.names) > 20 and not seen.names & {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select"}


class Asked(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_nan_is_noticed_however_seldom_one_looks(many):
    examples, texts = many
    for config in (GREEDY, BEAM):
        for look_every in (1, 8):
            model = lively_model()
            with torch.no_grad():
                model.output.bias[9] = math.nan
            with pytest.raises(CheckpointError, match="not numbers"):
                Replayed(model, config, lambda step: step, look_every).generate(make_batch(examples[:6], texts))


# ---- laws


def test_one_beam_is_greedy_search(many):
    examples, texts = many
    model = lively_model()
    greedy = all_replies(model, examples, texts, GREEDY)
    for penalty in (0.0, 1.0, 3.0):
        beam = all_replies(model, examples, texts, GenerationConfig("beam", beams=1, length_penalty=penalty, max_words=12))
        assert [(r.words, r.ended_by) for r in beam] == [(r.words, r.ended_by) for r in greedy]
        assert [r.score for r in beam] == pytest.approx([r.score for r in greedy], abs=1e-4)


def test_score_is_the_log_probability_of_the_words_that_may_be_said(many):
    examples, texts = many
    model = lively_model()
    batch = make_batch(examples[:12], texts)
    for config in (GREEDY, BEAM, GenerationConfig("sample", temperature=2.0, top_k=20, max_words=8)):
        for place, reply in enumerate(generate(model, batch, config)):
            expected = log_probabilities(model, batch, place, reply)
            assert reply.score == pytest.approx(expected.sum().item(), abs=1e-4)


def log_probabilities(model, batch, place, reply) -> torch.Tensor:
    """(words + EOS,) by the training-time decoder."""
    said = [*reply.words, *([EOS] if reply.ended_by == "eos" else [])]
    with torch.no_grad():
        reading = model.read(batch)
        words, cu = torch.tensor([BOS, *said[:-1]]), torch.tensor([0, len(said)])
        logits = model.reply_logits(words, cu, reading.repeat(place, 1))
    logits[:, [w for w in range(len(SPECIALS)) if w != EOS]] = -math.inf
    return logits.log_softmax(1)[torch.arange(len(said)), said]


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sample"])
def test_ends_at_eos_or_after_max_words(strategy, many):
    examples, texts = many
    batch = make_batch(examples[:9], texts)
    model = tiny_model().eval()
    with torch.no_grad():
        model.output.bias[EOS] = -1e4
    for words in (1, 2, 30):
        replies = generate(model, batch, GenerationConfig(strategy, max_words=words))
        assert all(len(r.words) == words and r.ended_by == "length" for r in replies)
    with torch.no_grad():
        model.output.bias[EOS] = 1e4
    assert all(r.words == () and r.ended_by == "eos" for r in generate(model, batch, GenerationConfig(strategy)))
    at_least = generate(model, batch, GenerationConfig(strategy, min_words=3))
    assert all(len(r.words) == 3 and r.ended_by == "eos" for r in at_least)
    exactly = generate(model, batch, GenerationConfig(strategy, min_words=3, max_words=3))
    assert all(len(r.words) == 3 and r.ended_by == "length" for r in exactly)


def test_dialogues_that_ended_leave_the_batch(many, monkeypatch):
    examples, texts = many
    model = lively_model()
    sizes = []
    step = model.next_words
    monkeypatch.setattr(model, "next_words", lambda w, *more: (sizes.append(len(w)), step(w, *more))[1])
    replies = generate(model, make_batch(examples[:40], texts), GREEDY)
    steps = [len(r.words) + (r.ended_by == "eos") for r in replies]
    assert sizes == [sum(s > t for s in steps) for t in range(max(steps))]
    assert sizes[0] > sizes[-1]


@pytest.mark.parametrize("config", SEARCHES, ids=lambda c: f"{c.strategy} {c.top_k}")
def test_special_words_are_never_said(config, many):
    """However probable they are, by none of the ways to say something; to whom the unknown word is allowed, it is said."""
    examples, texts = many
    model = lively_model()
    with torch.no_grad():
        model.output.bias[: len(SPECIALS)] += 100
        model.output.bias[EOS] -= 105
    batch = make_batch(examples[:16], texts)
    ways = [generate, lambda model, batch, config: Replayed(model, config, lambda step: step).generate(batch)]
    ways += [] if config.strategy == "sample" else [generate_uncached]
    for say in ways:
        for reply in say(model, batch, config):
            assert reply.words and min(reply.words) >= len(SPECIALS) and math.isfinite(reply.score)
        with_unk = say(model, batch, replace(config, allow_unk=True))
        assert {word for reply in with_unk for word in reply.words} == {UNK}


def test_an_unknown_word_that_may_not_be_said_counts_in_perplexity(many):
    """What may not be said leaves the softmax of a search, not that of the likelihood of a reply."""
    examples, texts = many
    model = lively_model()
    unknown = [replace(example, response=np.full(3, UNK, dtype=np.int32)) for example in examples[:4]]
    batch = make_batch(unknown, texts)
    with evaluating(model):
        reading = model.read(batch)
        nll = model.reply_nll(batch.decoder_input, batch.cu_target, reading, batch.target)
        logits = model.reply_logits(batch.decoder_input, batch.cu_target, reading)
    assert torch.allclose(nll, -logits.log_softmax(1).gather(1, batch.target.unsqueeze(1)).squeeze(1), atol=1e-5)
    assert nll.isfinite().all() and (batch.target == UNK).sum() == 12


def test_equal_scores_go_to_the_lowest_word(many):
    examples, texts = many
    model = tiny_model().eval()
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()
        model.output.bias[[20, 12, 30]] = 5.0
    batch = make_batch(examples[:3], texts)
    assert all(r.words == (12,) * 4 for r in generate(model, batch, GenerationConfig(max_words=4)))
    assert all(r.words == (12,) * 4 for r in generate(model, batch, GenerationConfig("beam", max_words=4, beams=2)))


# ---- beam search against every possible reply


def every_reply(model, batch, place, config, words) -> tuple[float, tuple[int, ...]]:
    """The best reply of all, and its rank, by scoring each possible one."""
    found = []
    for length in range(config.max_words + 1):
        for said in itertools.product(words, repeat=length):
            endings = ["eos"] if length < config.max_words else []
            for ended in [*endings, *(["length"] if length == config.max_words else [])]:
                if ended == "eos" and length < config.min_words:
                    continue
                reply = Generated(said, 0.0, ended)
                score = log_probabilities(model, batch, place, reply).sum().item()
                found.append((rank(replace(reply, score=score), config), said))
    return max(found)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
def test_beam_search_with_enough_beams_finds_the_best_reply_of_all(penalty):
    model = tiny_model(vocab_size=12).eval()
    with torch.no_grad():
        model.output.weight *= 4
    examples, texts = random_examples(6, seed=8)
    for e in examples:  # a vocabulary of four words
        for ids in (e.context, e.concept, e.response):
            np.minimum(ids, 8 + ids % 4, out=ids)
    texts.words = [np.minimum(words, 8 + words % 4) for words in texts.words]
    batch = make_batch(examples, texts)
    config = GenerationConfig("beam", max_words=3, beams=100, length_penalty=penalty)
    replies = generate(model, batch, config)
    for place in range(2):
        best, words = every_reply(model, batch, place, config, range(8, 12))
        assert rank(replies[place], config) == pytest.approx(best, abs=1e-5)
        assert replies[place].words == words
    assert replies == generate(model, batch, replace(config, beams=200))


def test_more_beams_do_better_on_the_whole(many):
    examples, texts = many
    model = lively_model()
    mean = []
    for beams in (1, 2, 5, 20):
        config = GenerationConfig("beam", beams=beams, max_words=8)
        mean.append(np.mean([rank(r, config) for r in all_replies(model, examples[:100], texts, config)]))
    assert mean == sorted(mean)


def test_length_penalty_lengthens(many):
    examples, texts = many
    model = lively_model()
    lengths = [
        sum(
            len(r.words)
            for r in all_replies(model, examples[:100], texts, GenerationConfig("beam", length_penalty=p, max_words=12))
        )
        for p in (0.0, 1.0, 4.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2]


# ---- sampling


def first_words(config: GenerationConfig, model: CASE, count: int = 4000) -> tuple[Counter, np.ndarray]:
    """First words of ``count`` samples for one dialogue, and the exact probabilities before any truncation."""
    examples, texts = random_examples(1, seed=11)
    batch = make_batch(examples, texts)
    with torch.no_grad():
        reading = model.read(batch)
        state = model.start_decoding(reading)
        logits = model.next_word_logits(torch.tensor([BOS]), state)[0].double()
    logits[[w for w in range(len(SPECIALS)) if w != EOS]] = -math.inf
    seen: Counter = Counter()
    wide = make_batch(examples * 500, texts)
    for start in range(0, count, 500):
        for reply in generate(model, wide, config, first_index=start):
            seen[reply.words[0] if reply.words else EOS] += 1
    return seen, (logits / config.temperature).softmax(0).numpy()


def truncated(p: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    kept = np.zeros_like(p)
    total = 0.0
    order = np.argsort(-p, kind="stable")[: top_k or None]
    for word in order:
        if total >= top_p * p[order].sum():
            break
        kept[word] = p[word]
        total += p[word]
    return kept / kept.sum()


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.6}, {"top_p": 0.9, "temperature": 0.5}, {"top_k": 5}, {"top_k": 10, "top_p": 0.7}, {"temperature": 2.0}],
    ids=str,
)
def test_samples_follow_the_exact_distribution(settings):
    config = GenerationConfig("sample", max_words=1, seed=2, **settings)
    seen, p = first_words(config, tiny_model().eval())
    expected = truncated(p, config.top_k, config.top_p)
    support = set(np.flatnonzero(expected))
    assert set(seen) <= support
    assert len(support) < np.count_nonzero(p) or not (config.top_k or config.top_p < 1)
    words = [w for w in support if expected[w] * 4000 >= 5]
    observed = [seen[w] for w in words] + [4000 - sum(seen[w] for w in words)]
    wanted = [expected[w] * 4000 for w in words] + [4000 * (1 - sum(expected[w] for w in words))]
    if wanted[-1] < 1:  # nothing is left over
        assert observed.pop() <= 5
        wanted.pop()
    assert stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue > 1e-3


def test_top_1_and_cold_samples_are_greedy(many):
    examples, texts = many
    model = lively_model()
    batch = make_batch(examples[:30], texts)
    greedy = generate(model, batch, GREEDY)
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}):
        sampled = generate(model, batch, GenerationConfig("sample", max_words=12, seed=5, **settings))
        assert [r.words for r in sampled] == [r.words for r in greedy]


def test_a_short_head_draws_the_same_words(monkeypatch):
    logits = 3 * torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = GenerationConfig("sample", top_p=0.8)
    whole = generation._draw(logits, config, uniform)
    for head in (2, 100):  # 2: never enough; 100: always
        monkeypatch.setattr(generation, "_HEAD", head)
        assert torch.equal(generation._draw(logits, config, uniform), whole)
    assert len(set(whole.tolist())) > 20


def test_extreme_draws_stay_among_the_words_that_may_be_said():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, 49]] = -math.inf
    for config in (GenerationConfig("sample"), GenerationConfig("sample", top_k=3), GenerationConfig("sample", top_p=0.5)):
        for u in (0.0, 1 - 2**-53):
            words = generation._draw(logits, config, torch.full((4,), u, dtype=torch.float64))
            assert logits.gather(1, words.unsqueeze(1)).isfinite().all()


def test_seed_and_number_decide_a_sample(many):
    examples, texts = many
    model = lively_model()
    batch = make_batch(examples[:20], texts)
    config = GenerationConfig("sample", seed=1, max_words=10)
    once = generate(model, batch, config)
    assert generate(model, batch, config) == once
    assert generate(model, batch, config, first_index=20) != once
    assert generate(model, batch, replace(config, seed=2)) != once
    same = make_batch(examples[:1] * 20, texts)
    assert len({r.words for r in generate(model, same, config)}) > 5
    with pytest.raises(ValueError, match="first_index names 3 dialogues, the batch holds 20"):
        generate(model, batch, config, first_index=[1, 2, 3])


# ---- a model that has learnt something


def test_a_model_that_knows_its_dialogues_says_their_replies():
    texts = tiny_featurizer().text_table()
    pairs = [
        ("I failed my exam. So sad.", "i am so sad . call my friend ."),
        ("my dog is happy!", "you love the dog !"),
        ("My boss was angry. I lost it.", "you feel lost ?"),
        ("party and cake", "joy !"),
    ]
    examples = [
        dialogue([said], texts, inferences(speakers_prompts([said]), random.Random(i)), reply)
        for i, (said, reply) in enumerate(pairs)
    ]
    torch.manual_seed(0)
    model = CASE(tiny_config(gamma_diversity=0.0))
    batch = make_batch(examples, texts)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    vocabulary = tiny_vocabulary()
    for config in (GenerationConfig(), GenerationConfig("beam"), GenerationConfig("sample", top_p=0.5)):
        replies = generate(model, batch, config)
        assert [" ".join(vocabulary.decode(r.words)) for r in replies] == [reply for _, reply in pairs]
        assert all(r.ended_by == "eos" and r.score > -2 for r in replies)


# ---- a whole split


def test_generate_all_keeps_the_order_of_the_indices(sample_store):
    model = CASE(tiny_config(vocab_size=len(sample_store.featurizer.vocabulary))).eval()
    with torch.no_grad():
        model.output.weight *= 4
    indices = [7, 0, 12, 3, 3, 5, 9]
    told = []
    for config in (GenerationConfig(max_words=5), GenerationConfig("sample", max_words=5)):
        found = generate_all(
            model, sample_store, "test", indices, config, batch_size=3, progress=lambda d, t: told.append((d, t))
        )
        alone = [generate(model, sample_store.batch("test", [i]), config, first_index=i)[0] for i in indices]
        assert [r.words for r in found] == [r.words for r in alone]
    assert told == [(3, 7), (6, 7), (7, 7)] * 2
    assert generate_all(model, sample_store, "test", []) == []
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        generate_all(model, sample_store, "test", indices, batch_size=0)
    assert len(generate_all(model, sample_store, "test", config=GenerationConfig(max_words=1))) == sample_store.size("test")


# ---- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "best"}, "strategy must be greedy, beam or sample, not 'best'"),
        ({"max_words": 0}, "max_words must be a whole number, at least 1, not 0"),
        ({"max_words": 2.5}, "max_words must be a whole number"),
        ({"min_words": 31}, "min_words must not be above max_words: 31 > 30"),
        ({"strategy": "beam", "beams": 0}, "beams must be a whole number, at least 1"),
        ({"strategy": "beam", "length_penalty": -1.0}, r"length_penalty must be in 0 \.\. 10, not -1.0"),
        ({"strategy": "beam", "length_penalty": math.nan}, "length_penalty must be"),
        ({"strategy": "sample", "top_k": -1}, "top_k must be a whole number, at least 0"),
        ({"strategy": "sample", "top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"strategy": "sample", "top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"strategy": "sample", "temperature": 0.0}, "temperature must be above 0, not 0.0; near 0, use strategy greedy"),
        ({"strategy": "sample", "temperature": math.inf}, "temperature must be"),
        ({"strategy": "sample", "seed": -1}, "seed must be a whole number, at least 0"),
        ({"top_p": 0.9}, "top_p has no effect with strategy greedy; use strategy sample"),
        ({"strategy": "beam", "temperature": 0.7}, "temperature has no effect with strategy beam"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        GenerationConfig(**settings)


def test_the_reference_does_not_sample(many):
    examples, texts = many
    with pytest.raises(ConfigError, match="greedy and beam"):
        generate_uncached(lively_model(), make_batch(examples[:1], texts), GenerationConfig("sample"))
