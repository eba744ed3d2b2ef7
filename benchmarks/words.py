"""The inputs of the vocabulary_loss benchmarks: decoder states and target words, in the shapes of training and of decoding."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import MODES, Case
from case_fast import equations
from case_fast.errors import ConfigError

DIMENSION, GENERATION, DIVERSITY = 300, 1.0, 1.5  # of the paper: d, g3, g4
WORDS, BAG = 24_000, 17  # words of the vocabulary; mean number of target words of a row of a bag of words
NAMED = {"bow16": f"16x{WORDS}:bow"}
KEEP = {"": 64 << 20, "bow": 64 << 20, "kept": 1 << 62, "recomputed": 0}  # keep_bytes of ours; its default, but where named


@dataclass(frozen=True)
class WordCase(Case):
    """hidden (T, d), weight (V, d), bias (V,); target (M,), and cu_target (T + 1,) where rows have several; word_weight (V,).

    The loss is (1 / M) sum_m (g3 + g4 word_weight[target_m]) nll_m; with ``best``, instead, the log-probabilities and words
    (T, best) of the most probable words."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    cu_target: Tensor | None
    word_weight: Tensor
    keep_bytes: int
    best: int | None
    how: str

    @property
    def grad_out(self) -> Tensor:
        """(), M: as a loss is scaled, so that errors of gradients stand out from the limits' 1e-5."""
        return torch.tensor(float(self.target.numel()), device=self.hidden.device)

    @property
    def row_of(self) -> Tensor:
        """(M,): the row of each target."""
        if self.cu_target is None:
            return torch.arange(self.target.numel(), device=self.target.device)
        return equations.segment_ids(self.cu_target, self.target.numel())

    @property
    def shape(self) -> dict[str, int]:
        rows, dimension = self.hidden.shape
        several = {} if self.cu_target is None else {"targets": self.target.numel()}
        best = {} if self.best is None else {"k": self.best}
        return {"T": rows, "V": self.weight.shape[0], "d": dimension, **several, **best}

    @property
    def size(self) -> int | None:
        return self.hidden.shape[0] if self.weight.shape[0] == WORDS and not self.how else None

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.best is None else MODES[:1]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.hidden, self.weight, self.bias


def case_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, dimension: int = DIMENSION) -> WordCase:
    """ROWSxWORDS, or ROWSxWORDS:HOW. kept, recomputed: whether ours keeps the scores for backward; by its default where it is not
    said. bow: about 17 targets a row (bow16: 16x24000:bow). topK: the K most probable words, forward alone.

    Raises:
        ConfigError: no such size.
    """
    shape = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,6})(?::(\w+))?", NAMED.get(name, name))
    how = shape[3] or "" if shape else ""
    best = re.fullmatch(r"top([1-9]\d{0,3})", how)
    if not shape or not (how in KEEP or best) or best and int(best[1]) > int(shape[2]):
        raise ConfigError(f"size {name!r} is unknown; rows x words of the vocabulary, such as 480x24000, perhaps with :kept, "
                          f":recomputed, :bow or :top5; or one of {', '.join(NAMED)}")
    rows, words = int(shape[1]), int(shape[2])
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    hidden, weight = normal(rows, dimension), normal(words, dimension) * 2 * dimension**-0.5  # scores of deviation 2
    often = 1 / torch.arange(2, words + 2)  # of words by rank, as in a text
    bias = (often / often.sum() * words).log()
    cu_target = None
    if how == "bow":
        counts = torch.randint(0, 2 * BAG + 1, (rows,), generator=generator)
        cu_target = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    targets = rows if cu_target is None else int(cu_target[-1])
    target = torch.multinomial(often, targets, replacement=True, generator=generator)
    word_weight = equations.diversity_weights(1e6 * often).float()
    what = f"{rows:,} rows, {words:,} words"
    if how == "bow":
        what += f", {targets:,} targets"
    elif best:
        what += f", the {int(best[1]):,} most probable"
    elif how:
        what += f", ours with the scores {how}"
    tensors = (x.to(device, dtype) for x in (hidden, weight, bias))
    return WordCase(name, what, *tensors, target.to(device), None if cu_target is None else cu_target.to(device),
                    word_weight.to(device), KEEP.get(how, 0), int(best[1]) if best else None, how)
