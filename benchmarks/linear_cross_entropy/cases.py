"""The inputs of the linear_cross_entropy benchmarks: decoder states and target words, in the shapes of training and of decoding;
both losses of the decoder over the vocabulary, and its most probable words, in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.measure import MODES, Case, Truth
from case_fast import equations
from case_fast.errors import ConfigError

DIMENSION, GENERATION, DIVERSITY = 300, 1.0, 1.5  # of the paper: d, g3, g4
WORDS, BAG = 24_000, 17  # words of the vocabulary; mean number of target words of a row of a bag of words
NAMED = {"bow16": f"16x{WORDS}:bow"}
SIZES = ["480x24000", "480x24000:recomputed", *(f"480x{v}" for v in (8000, 16000, 32000, 64000, 128000)),
         *(f"{t}x24000" for t in (16, 64, 256, 1024, 4096)), "bow16",
         *(f"{t}x24000:top{k}" for k in (1, 5) for t in (1, 16, 80))]
QUICK_SIZES = ["16x24000", "64x24000", "30x2000:recomputed", "16x2000:bow", "16x2000:top5"]
AXIS = "rows, 24,000 words"
_AT_ONCE = {"cpu": 12 << 20, "cuda": 256 << 20}  # scores; some five arrays of so many float64: the truth in little memory
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
    def least(self) -> tuple[tuple[float, float], ...]:
        (rows, width), words = self.hidden.shape, self.weight.shape[0]
        products, moved = 2 * rows * words * width, self.hidden.element_size() * width * (rows + words)
        return (products, moved), (2 * products, 2 * moved)

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


def truth(case: WordCase) -> Truth:
    """Loss and gradients, or log-probabilities and words, by equations.py in float64; limits by how far the same in the case's
    dtype is off."""
    if case.best is not None:
        names = ("log-probability", "word")
        return Truth.of(names, _best(case, torch.float64), _best(case, case.hidden.dtype))
    names = ("loss", "grad_hidden", "grad_weight", "grad_bias")
    found = Truth.of(names, _by_parts(case, torch.float64), _by_parts(case, case.hidden.dtype))
    rounding = torch.finfo(case.hidden.dtype).eps * float(found.values[0].abs())  # torch's own loss has the inputs' dtype
    return replace(found, limits=(found.limits[0] + rounding, *found.limits[1:]))


def _parts(case: WordCase) -> tuple[Tensor, ...]:
    rows = torch.arange(case.hidden.shape[0], device=case.hidden.device)
    return rows.split(max(1, _AT_ONCE[case.hidden.device.type] // case.weight.shape[0]))


def _by_parts(case: WordCase, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs]
    hidden, weight, bias = leaves
    full = equations.full_precision(hidden).dtype
    share = (GENERATION + DIVERSITY * case.word_weight.to(full)) / case.target.numel()
    total = torch.zeros((), dtype=full, device=hidden.device)
    for part in _parts(case):
        cu, span = None, slice(int(part[0]), int(part[-1]) + 1)
        if case.cu_target is not None:
            cu = case.cu_target[span.start : span.stop + 1]
            span = slice(int(cu[0]), int(cu[-1]))
            cu = cu - cu[0]
        target = case.target[span]
        nll, _ = equations.linear_cross_entropy(hidden[part], weight, bias, target, cu)
        loss = (share[target] * nll).sum()
        loss.backward(case.grad_out.to(full))
        total += loss.detach()
    return [total, *(x.grad for x in leaves)]


def _best(case: WordCase, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, bias = (x.to(dtype) for x in case.inputs)
    found = [equations.top_words(hidden[part], weight, bias, case.best) for part in _parts(case)]
    values, words = (torch.cat(parts) for parts in zip(*found, strict=True))
    return [values, words.double()]  # a wrong word is off by 1 at least, far above its limit
