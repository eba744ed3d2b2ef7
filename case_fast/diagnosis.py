"""Does a model read its knowledge, and do its alignments align? Figures over fixed held-out batches, for training and `diagnose`.

What they say, and what is healthy: docs/diagnose.md. A model shows what can be looked at by `DialogueModel.inside`.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from case_fast.batch import Batch
from case_fast.data import Store
from case_fast.data.edited import edges_of, with_concepts, with_inferences, with_reactions
from case_fast.data.featurizer import Example
from case_fast.data.pack import make_batch
from case_fast.errors import ConfigError
from case_fast.models import MODELS, DialogueModel, model_class
from case_fast.models.base import evaluating
from case_fast.models.results import Alignment, Choice, Inside, Output
from case_fast.references import References, read_references

BATCH, SEED = 16, 99  # dialogues of a held-out batch, and what they are drawn by
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the gate
ALL = "everything"  # the last swap

Forward = Callable[[Batch], Output]


# ---------------------------------------------------------------------------------------------------------- what is measured


def held_out(store: Store, split: str, count: int) -> list[list[int]]:
    """Examples of ``count`` batches of 16, no two of one conversation; fewer where the split ends."""
    order = torch.randperm(store.size(split), generator=torch.Generator().manual_seed(SEED)).tolist()
    seen: set[str] = set()
    chosen: list[int] = []
    for index in order:
        conversation = store.example(split, index).source.get("id", f"{index}").split("#")[0]
        if conversation not in seen:
            seen.add(conversation)
            chosen.append(index)
        if len(chosen) == BATCH * count:
            break
    whole = max(1, len(chosen) // BATCH)
    return [chosen[BATCH * place : BATCH * (place + 1)] for place in range(whole)]


def common_share(rows: Tensor) -> float:
    """Length of the mean row over the mean length of the rows (n, d): 1 where all are one vector, about n^-1/2 where they point
    anywhere. Rows of zeros, of dialogues without knowledge, are left out; NaN without any other."""
    rows = rows[rows.any(1)]
    return float(rows.mean(0).norm() / rows.norm(dim=1).mean())


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the singular values of rows (n, d), as shares of their sum (Roy and Vetterli, "The effective rank",
    EUSIPCO 2007): in how many directions they lie, 1 where all are one vector. NaN where all are 0 or one is not finite."""
    if not rows.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()  # d x d: a tenth of the time of a decomposition of the rows
    return float(torch.special.entr(values / values.sum()).sum().exp())


def perplexities(probability: Tensor, dialogue: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the entropy of each dialogue's distribution, and over how many rows it is; dialogues without any left out."""
    number = torch.bincount(dialogue)
    entropy = torch.zeros(len(number), dtype=probability.dtype).index_add_(0, dialogue, torch.special.entr(probability))
    return entropy[number > 0].exp(), number[number > 0].to(probability.dtype)


def retrieval(alignment: Alignment) -> dict[str, tuple[Tensor, Tensor]]:
    """For both sides of an alignment (P,) whether the positive comes first among the set that the loss has, a first place with
    others shared out, and (P,) the chance of that.

    "affection": for a row of x among all rows of y. "cognition": for the row of y among rows of x, those of its own group left
    out (`ops.mim_sides`). NaN where a score is not finite.
    """
    scores, positive = alignment.scores, alignment.positive
    paired = scores.gather(1, positive[:, None])
    place = torch.arange(scores.shape[1])
    sides = {}
    for name, compared, negative in (
        ("affection", scores, place != positive[:, None]),
        ("cognition", scores[:, positive].T, positive != positive[:, None]),
    ):
        better, equal = ((found & negative).sum(1) for found in (compared > paired, compared == paired))
        first = (better == 0).double() / (1 + equal)
        sides[name] = first.masked_fill(~compared.isfinite().all(1), math.nan), 1 / (1 + negative.sum(1).double())
    return sides


def figures(insides: Sequence[Inside]) -> dict[str, Any]:
    """The figures of what `DialogueModel.inside` gave of some batches, all rows and pairs together; {} where it gave nothing."""
    first = insides[0]
    found: dict[str, Any] = {}
    if first.vectors:
        rows = {name: torch.cat([inside.vectors[name] for inside in insides]) for name in first.vectors}
        found["vectors"] = {name: {"common_share": common_share(x), "effective_rank": effective_rank(x), "rows": len(x),
                                   "width": x.shape[1]} for name, x in rows.items()}
    if first.choices:
        found["choices"] = {name: _choice([inside.choices[name] for inside in insides]) for name in first.choices}
    if first.alignments:
        found["alignments"] = {name: _alignment([inside.alignments[name] for inside in insides]) for name in first.alignments}
    if first.gate is not None:
        gate = torch.cat([inside.gate for inside in insides])
        quantiles = torch.quantile(gate, torch.tensor(QUANTILES, dtype=gate.dtype)).tolist()
        found["gate"] = {"mean": gate.mean().item(), "std": gate.std(correction=0).item(),
                         "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True))}
    return found


def _choice(choices: Sequence[Choice]) -> dict[str, Any]:
    """Means over dialogues, and over how many rows a dialogue chooses."""
    found: dict[str, Any] = {}
    for name in ("prior", "posterior"):
        parts = [perplexities(getattr(choice, name), choice.dialogue) for choice in choices]
        perplexity, number = (torch.cat(part) for part in zip(*parts, strict=True))
        found |= {"dialogues": len(number), "number": number.mean().item(), f"{name}_perplexity": perplexity.mean().item(),
                  f"{name}_ratio": (perplexity.mean() / number.mean()).item()}
    return found


def _alignment(alignments: Sequence[Alignment]) -> dict[str, Any]:
    """Means over pairs."""
    parts = [retrieval(alignment) for alignment in alignments]
    found: dict[str, Any] = {"pairs": sum(len(alignment.positive) for alignment in alignments)}
    for side in parts[0]:
        first, chance = (torch.cat(part).mean() for part in zip(*(part[side] for part in parts), strict=True))
        found[side] = {"top1": first.item(), "chance": chance.item(), "over_chance": (first / chance).item()}
    return found


def in_short(found: dict[str, Any]) -> dict[str, float]:
    """What a training log keeps of `figures`, by names that stand for themselves."""
    return {
        **{f"{name}_common_share": of["common_share"] for name, of in found.get("vectors", {}).items()},
        **{f"{name}_prior_ratio": of["prior_ratio"] for name, of in found.get("choices", {}).items()},
        **{f"{name}_over_chance": of["affection"]["over_chance"] for name, of in found.get("alignments", {}).items()},
    }


def look(model: DialogueModel, batches: Iterable[Batch], forward: Forward | None = None) -> list[Inside]:
    """Inside the model after each batch, in evaluation mode, float64 and on the CPU; [] of a model without an inside.

    Args:
        forward: gives the model's `Output` of a batch; default the model itself.
    """
    found = []
    with evaluating(model):
        for batch in batches:
            batch = batch.to(model.embedding.weight.device)
            inside = model.inside(batch, (forward or model)(batch))
            if inside == Inside():
                break
            found.append(_at_hand(inside))
    return found


def _at_hand(inside: Inside) -> Inside:
    def moved(x: Tensor) -> Tensor:
        return x.cpu().double() if x.is_floating_point() else x.cpu()

    return Inside(
        vectors={name: moved(x) for name, x in inside.vectors.items()},
        choices={name: Choice(**{key: moved(x) for key, x in vars(of).items()}) for name, of in inside.choices.items()},
        alignments={name: Alignment(**{key: moved(x) for key, x in vars(of).items()}) for name, of in inside.alignments.items()},
        gate=None if inside.gate is None else moved(inside.gate),
    )


# ------------------------------------------------------------------------------------------------------------ gradients by loss


def gradient_norms(model: DialogueModel, batches: Sequence[Batch]) -> dict[str, float]:
    """Norm of the gradient of each loss, times its weight in the whole, on the parts `DialogueModel.shared`; "loss": of the
    whole. Without dropout; the mean of the batches' norms. {} of a model that shares nothing."""
    shared = [p for name in model.shared for p in getattr(model, name).parameters() if p.requires_grad]
    if not shared:
        return {}
    sums: defaultdict[str, float] = defaultdict(float)
    with evaluating(model, gradients=True):
        for batch in batches:
            output = model(batch)
            sums["loss"] += _norm(output.loss, shared, torch.ones_like(output.loss))
            for name, loss in output.losses.items():
                if loss.requires_grad:  # not of a switched-off alignment
                    (weight,) = torch.autograd.grad(output.loss, loss, retain_graph=True, allow_unused=True)
                    sums[name] += _norm(loss, shared, weight)
    return {name: total / len(batches) for name, total in sums.items()}


def _norm(loss: Tensor, parameters: Sequence[Tensor], weight: Tensor | None) -> float:
    """Of the gradient of ``weight`` times ``loss``; 0 where it has no weight."""
    if weight is None:
        return 0.0
    parts = torch.autograd.grad(loss, parameters, weight, retain_graph=True, allow_unused=True)
    return math.sqrt(math.fsum(float(part.double().square().sum()) for part in parts if part is not None))


# -------------------------------------------------------------------------------------------------------- another's knowledge


def with_inferences_of(example: Example, other: Example) -> Example:
    """Its own sub-utterances with the other's inferences, at the sub-utterance of the same place, or at the last one."""
    sub = np.minimum(other.knowledge_sub, len(example.sub_utterance) - 1)
    return with_inferences(example, other.knowledge, sub, other.knowledge_relation)


def with_reactions_of(example: Example, other: Example) -> Example:
    """Its own sub-utterances with the other's reactions, placed as in `with_inferences_of`."""
    return with_reactions(example, other.reaction, np.minimum(other.reaction_sub, len(example.sub_utterance) - 1))


def with_concepts_of(example: Example, other: Example) -> Example:
    """Its own words with the other's concepts, each joined to the words at the same places, or to the last one."""
    last = len(example.context) - 1
    edges = {(min(word, last), of) for word, of in edges_of(other)}
    return with_concepts(example, other.concept, other.concept_intensity, list(edges))


# what is swapped -> the part of a batch that a model reads it from, and how
SWAPS: dict[str, tuple[str, Callable[[Example, Example], Example]]] = {
    "inferences": ("case", with_inferences_of),
    "concepts": ("concept", with_concepts_of),
    "reactions": ("case", with_reactions_of),
}


def swaps(model: DialogueModel, store: Store, split: str, groups: Sequence[Sequence[int]], device: torch.device | str = "cpu"
          ) -> dict[str, dict[str, Any]]:
    """Perplexity and emotion accuracy with a dialogue's own knowledge ("own"), and with that of the next dialogue of its group,
    kind by kind and "everything" at once. "rise" is that of the perplexity in per cent, and "rise_error" its standard error.
    {} of a model that reads no knowledge.
    """
    kinds = {name: [change] for name, (part, change) in SWAPS.items() if part in model.needs}
    if not kinds:
        return {}
    examples = [[store.example(split, index) for index in group] for group in groups]

    def read(changes: Sequence[Callable[[Example, Example], Example]]) -> References:
        def batches() -> Iterable[Batch]:
            for group in examples:
                changed = list(group)
                for change in changes:
                    changed = [change(example, group[(place + 1) % len(group)]) for place, example in enumerate(changed)]
                yield make_batch(changed, store.texts, model.needs).to(device)
        return read_references(model, batches())

    own = read([])
    found: dict[str, dict[str, Any]] = {"own": {"ppl": math.exp(own.mean_nll), "accuracy": own.accuracy}}
    for name, changes in {**kinds, ALL: [change for (change,) in kinds.values()]}.items():
        other = read(changes)
        rise, error = _rise(own, other)
        found[name] = {"ppl": math.exp(other.mean_nll), "accuracy": other.accuracy, "rise": rise, "rise_error": error}
    return found


def _rise(own: References, other: References) -> tuple[float, float]:
    """By how much the perplexity is higher, in per cent, and the standard error: that of a ratio of sums over replies, which are
    drawn independently, of the rise of -log P of a word."""
    words = np.array([len(row) for row in own.nll], dtype=np.float64)
    differences = np.array([after.sum() - before.sum() for before, after in zip(own.nll, other.nll, strict=True)])
    rise, n = differences.sum() / words.sum(), len(words)
    error = np.sqrt(np.square(differences - rise * words).sum() * n / max(n - 1, 1)) / words.sum()
    return 100 * math.expm1(rise), 100 * math.exp(rise) * float(error)


# -------------------------------------------------------------------------------------------------------------------- all of it


def diagnose(model: DialogueModel, store: Store, split: str = "valid", batches: int = 16, gradient_batches: int = 4,
             device: torch.device | str = "cpu", progress: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Every figure that the model has, as plain values: "vectors", "choices", "alignments", "gate" (`figures`), "gradients"
    (`gradient_norms` on the first ``gradient_batches``), "swaps", and "seconds" of each part.

    Args:
        batches: of 16 dialogues of the split, see `held_out`.
        progress: told what is measured next.

    Raises:
        ConfigError: the model has nothing of this, or the split has a single conversation.
    """
    groups = held_out(store, split, batches)
    if len(groups[0]) < 2:
        raise ConfigError(f"the split {split!r} of {store.path} has {len(groups[0])} conversation: there is nothing to compare")
    packed = [store.batch(split, group, model.needs, seed=0).to(device) for group in groups]
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "inside": lambda: figures(insides) if (insides := look(model, packed)) else {},
        "gradients": lambda: gradient_norms(model, packed[:gradient_batches]),
        "swaps": lambda: swaps(model, store, split, groups, device),
    }
    found: dict[str, Any] = {"split": split, "batches": len(groups), "dialogues": sum(map(len, groups))}
    seconds = {}
    for name, measure in parts.items():
        progress(name)
        started = time.perf_counter()
        part = measure()
        seconds[name] = round(time.perf_counter() - started, 2)
        found |= part if name == "inside" else {name: part} if part else {}
    if len(found) == 3:
        others = ", ".join(name for name in MODELS if len(model_class(name).needs) > 1)
        raise ConfigError(f"model {model.config.kind} reads no knowledge and has no alignment: nothing to diagnose. Models that "
                          f"do: {others}")
    return found | {"seconds": seconds}
