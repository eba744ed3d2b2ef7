"""Small makers that the tests share: dialogues with every kind of gap, tiny models, and arithmetic in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from case_fast.batch import Batch
from case_fast.data.empathetic_dialogues import EMOTIONS, Turn
from case_fast.data.featurizer import Example, FeatureSettings, Featurizer, TextTable, prompts
from case_fast.data.pack import make_batch
from case_fast.data.prepare import PrepareSettings, prepare
from case_fast.data.store import Store
from case_fast.data.vocabulary import SPECIALS, Vocabulary
from case_fast.knowledge.source import COGNITION_RELATIONS, REACTION_RELATION, RELATIONS
from case_fast.models import CASE, CASEConfig, DialogueModel, model_class
from case_fast.training import preset

PLAIN_WORDS = "i you we my the a to was is am not and so it had went feel".split()
MARKS = ". , ! ?".split()
CONTENT_WORDS = (
    "exam dog rain boss letter party cake lost passed failed broke happy sad proud angry joy grief fear hope alone love "
    "hug cry smile sleep work study call help friend sister home"
).split()
WORDS = [*PLAIN_WORDS, *MARKS, *CONTENT_WORDS]
CONCEPTS = {
    "exam": ["grief", "proud", "fear"],
    "dog": ["love", "happy"],
    "boss": ["angry", "fear"],
    "party": ["joy", "happy", "love"],
    "lost": ["grief", "sad"],
    "friend": ["love", "hope"],
    "letter": ["hope"],
}
INTENSITY = {
    "happy": 0.9, "sad": 0.8, "proud": 0.75, "angry": 0.85, "joy": 0.95, "grief": 0.88, "fear": 0.82, "hope": 0.7,
    "love": 0.92, "alone": 0.5, "exam": 0.3, "dog": 0.4, "home": -0.02,
}
NO_CONCEPT_WORDS = ("rain", "cake", "sister", "home", "work", "sleep")  # words that no concept belongs to


PRINTED = CASEConfig.printed
ALL_SETTINGS = {"mim_score": "standardized", "discernment_scale": "sqrt_d", "vertex_pooling": "mean", "special_scale": 0.1,
                "kl_reduction": "mean"}  # none of them printed


@cache
def tiny_vocabulary() -> Vocabulary:
    return Vocabulary([*SPECIALS, *WORDS])


def tiny_featurizer(**settings: int | float) -> Featurizer:
    return Featurizer(tiny_vocabulary(), CONCEPTS, INTENSITY, FeatureSettings(**settings))


def tiny_config(**changes: object) -> CASEConfig:
    """A model of a few thousand weights; dropout off unless asked for, so that outputs can be compared."""
    sizes = {"vocab_size": len(tiny_vocabulary()), "d_model": 16, "ffn": 12, "graph_dropout": 0.0}
    return CASEConfig(**(sizes | changes))


def tiny_model(seed: int = 0, **changes: object) -> CASE:
    torch.manual_seed(seed)
    return CASE(tiny_config(**changes))


def parameter_count(name: str, recipe: str, words: int) -> int:
    """Of a model of this recipe and so many words; nothing is allocated."""
    with torch.device("meta"):
        model = model_class(name)(preset(recipe, name).resolved(words).model)
    return sum(parameter.numel() for parameter in model.parameters())


def inferences(
    texts: Iterable[str], rng: random.Random, relations: Sequence[str] = RELATIONS, share: float = 0.7, most: int = 3
) -> dict[str, dict[str, list[str]]]:
    """Made-up inferences of ``relations`` for each text; a relation of a text is there with probability ``share``."""
    made: dict[str, dict[str, list[str]]] = {}
    for text in dict.fromkeys(texts):
        made[text] = {}
        for relation in relations:
            if rng.random() < share:
                length = (1, 2) if relation == REACTION_RELATION else (1, 5)
                phrases = [
                    " ".join(rng.choices(CONTENT_WORDS, k=rng.randint(*length))) for _ in range(rng.randint(1, most))
                ]
                made[text][relation] = list(dict.fromkeys(phrases))
    return made


def dialogue(
    turns: Sequence[str],
    texts: TextTable,
    known: Mapping[str, Mapping[str, Sequence[str]]],
    response: str = "i am so sad .",
    emotion: str = "sad",
    featurizer: Featurizer | None = None,
    feedback: str = "",
) -> Example:
    """The example of alternating turns (the speaker begins) with these inferences."""
    context = [Turn(text, place % 2 == 0) for place, text in enumerate(turns)]
    return (featurizer or tiny_featurizer()).example(context, known, texts, response, emotion, feedback)


def speakers_prompts(turns: Sequence[str]) -> list[str]:
    """The texts that inferences are asked for."""
    return prompts([Turn(text, place % 2 == 0) for place, text in enumerate(turns)])


def handmade_examples() -> tuple[list[Example], TextTable]:
    """Seven dialogues, each with another gap: complete; one sentence; no reaction; reaction alone; nothing at all; a
    reaction on the whole utterance only; one word. The second and third have no feedback, the last two none with an emotional
    word."""
    texts = tiny_featurizer().text_table()
    rng = random.Random(5)
    both = "I failed my exam. My boss was angry! I lost it"
    repeated = "so sad. so sad. the dog was lost"
    cognition = list(COGNITION_RELATIONS)

    def full(turns: Sequence[str], relations: Sequence[str] = RELATIONS) -> dict:
        return inferences(speakers_prompts(turns), rng, relations, share=1.0)

    two_turns = ["I went to the party.", "so happy !", both]
    only_whole = {both: {"xReact": ["sad", "angry"], "xWant": ["to cry", "to study"]}}
    last = speakers_prompts([both])[1:]
    only_whole |= {text: {"xNeed": ["to work", "help"]} for text in last}
    examples = [
        dialogue(two_turns, texts, full(two_turns), "i am so sad . call my friend", "devastated",
                 feedback="so happy ! you are my hope and joy"),
        dialogue(["my dog is happy ."], texts, full(["my dog is happy ."]), "so happy for you !", "joyful"),
        dialogue([both], texts, full([both], cognition), "you failed ?", "angry"),
        dialogue([repeated], texts, full([repeated], [REACTION_RELATION]), "a hug .", "lonely", feedback="love"),
        dialogue(["rain ."], texts, {}, "", "content", feedback="so sad ."),
        dialogue([both], texts, only_whole, "i feel with you . study !", "sad", feedback="i had to call"),
        dialogue(["exam"], texts, full(["exam"]), "exam", "afraid", feedback="rain"),
    ]
    return examples, texts


def random_examples(
    count: int, seed: int = 0, max_turns: int = 3, max_words: int = 9
) -> tuple[list[Example], TextTable]:
    """Ragged dialogues: any number of turns, sentences, words, inferences, concepts, words of feedback, some of them none."""
    rng, later = random.Random(seed), random.Random(f"feedback {seed}")
    featurizer = tiny_featurizer()
    texts = featurizer.text_table()
    examples = []
    for _ in range(count):
        words = NO_CONCEPT_WORDS if rng.random() < 0.2 else PLAIN_WORDS + CONTENT_WORDS
        turns = [
            " ".join(
                " ".join(rng.choices(words, k=rng.randint(1, max_words))) + rng.choice([".", "!", "?"])
                for _ in range(rng.randint(1, 3))
            )
            for _ in range(rng.randrange(1, 2 * max_turns, 2))
        ]
        known = inferences(speakers_prompts(turns), rng, share=rng.choice([0.0, 0.3, 0.7, 1.0]))
        response = " ".join(rng.choices(WORDS, k=rng.randint(0, max_words)))
        feedback = " ".join(later.choices(WORDS, k=later.choice([0, 1, 4, max_words])))
        examples.append(dialogue(turns, texts, known, response, rng.choice(EMOTIONS), featurizer, feedback))
    return examples, texts


def random_batch(count: int, seed: int = 0) -> Batch:
    examples, texts = random_examples(count, seed)
    return make_batch(examples, texts)


def seeded(batch: Batch, seed: int) -> Batch:
    """The batch with another seed."""
    return replace(batch, seed=torch.tensor(seed))


def as_double(batch: Batch) -> Batch:
    """The batch with its floating-point fields in float64."""
    return batch._map(lambda x: x.double() if x.is_floating_point() else x)


def tensors(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in a dataclass, dict or list."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors(getattr(value, item.name), f"{name}.{item.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from tensors(part, f"{name}.{place}".lstrip("."))


def split_rows(packed: Tensor, cu: Tensor) -> list[Tensor]:
    """Packed rows as one tensor a sequence."""
    return list(packed.split((cu[1:] - cu[:-1]).tolist()))


def model_outputs(model: DialogueModel, batch: Batch) -> list[dict[str, Tensor]]:
    """hidden, nll and emotion of each dialogue."""
    out = model(batch)
    found = {"hidden": split_rows(out.hidden, batch.cu_target), "nll": split_rows(out.nll, batch.cu_target)}
    if out.emotion_logits is not None:
        found["emotion"] = list(out.emotion_logits)
    return [{name: rows[b] for name, rows in found.items()} for b in range(batch.size)]


def close(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray, tolerance: float) -> bool:
    """Whether |actual - expected| <= tolerance * max(1, |expected|) everywhere, same shape."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    if actual.shape != expected.shape:
        return False
    return bool(((actual - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all())


def bundled_store(folder: Path) -> Store:
    """The sample that comes with the package, prepared into ``folder``."""
    return prepare(PrepareSettings("bundled", "bundled", "bundled", "bundled", str(folder / "sample.store")))


def real_store(data: Path, folder: Path, limit: int) -> Store:
    """The first ``limit`` conversations of each split of the real data, prepared into ``folder``."""
    return prepare(
        PrepareSettings(
            dialogues=str(data / "empatheticdialogues"),
            knowledge=f"atomic:{data / 'atomic'}",
            conceptnet=str(data / "conceptnet" / "assertions.csv"),
            lexicon=str(data / "nrc_vad" / "NRC-VAD-Lexicon.txt"),
            out=str(folder / "real.store"),
            limit=limit,
        )
    )


# ---- numbers, for comparing with loops

EXACT = 1e-12  # float64 against loops in another order of summation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale


def same(actual: Tensor, expected: object, tolerance: float = EXACT) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype).reshape(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Analytic against numerical gradients with respect to all ``inputs`` (float64)."""
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    if any(leaf.numel() for leaf in leaves):
        assert torch.autograd.gradcheck(function, leaves)
    else:
        function(*leaves).sum().backward()
    grads = torch.autograd.grad(function(*leaves).sum(), leaves)
    assert all(g.shape == leaf.shape and g.isfinite().all() for g, leaf in zip(grads, leaves, strict=True))


def softmax(values: list[float]) -> list[float]:
    peak = max(values)
    terms = [math.exp(v - peak) for v in values]
    return [t / math.fsum(terms) for t in terms]


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def slow_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


@contextmanager
def limited_memory(most: int) -> Iterator[None]:
    """Fails where what stands inside lifts the process's resident memory by more than ``most`` bytes; what other tests of the
    same process hold does not count. Linux only."""

    def resident(field: str) -> int:
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    yield
    risen = (resident("VmHWM") - before) << 10
    assert risen < most, f"{risen >> 20} MiB more than before, {most >> 20} allowed"
