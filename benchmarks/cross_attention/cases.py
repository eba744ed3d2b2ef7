"""The inputs of the cross_attention benchmarks: decoder states of replies, three sources that they attend to, one word at a time
and in training; and what comes out in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import MODES, Case, Truth
from case_fast import equations
from case_fast.errors import ConfigError
from case_fast.ops import Source

WIDTH, HEADS, SOURCES = 300, 2, 3  # of the paper
SIZES = ["step1", "step16", "step128", "beams16x5", *(f"keys{n}" for n in (0, 16, 64, 256, 512)),
         *(f"rows{4**n}" for n in range(2, 7)), "batch", "ragged"]
QUICK_SIZES = ["step4", "rows16", "rows64"]
AXIS = "words of replies of about 16 words"


@dataclass(frozen=True)
class ReplyCase(Case):
    """hidden, grad_out: (T, d). memory: (Tk, d) of each source, which its keys and values are projections of, by the weights in
    projections: (H D, d) of keys, (H D, d) of values."""

    hidden: Tensor
    cu_hidden: Tensor
    sources: list[Source]
    memory: list[Tensor]
    projections: list[tuple[Tensor, Tensor]]
    grad_out: Tensor
    steps: bool  # one word a reply, or a beam of them: nothing is trained

    @property
    def batch(self) -> int:
        return self.cu_hidden.numel() - 1

    @property
    def shape(self) -> dict[str, int]:
        keys = sum(s.key.shape[0] for s in self.sources)
        return {"B": self.batch, "T": self.hidden.shape[0], "keys": keys, "sources": len(self.sources), "d": WIDTH, "H": HEADS}

    @property
    def size(self) -> int | None:
        return int(self.name.removeprefix("rows")) if self.name.startswith("rows") else None

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[:1] if self.steps else MODES

    @property
    def least(self) -> tuple[tuple[float, float], ...]:
        rows, width = self.hidden.shape
        keys = sum(s.key.shape[0] for s in self.sources)
        pairs = sum(float((self.cu_hidden.diff() * s.cu_keys.diff()).sum()) for s in self.sources)
        weights = 2 * len(self.sources) * width**2
        products, size = 2 * rows * weights + 4 * pairs * width, self.hidden.element_size()
        return ((products, size * (2 * rows * width + 2 * keys * width + weights)),
                (2 * products, size * (3 * rows * width + 4 * keys * width + 2 * weights)))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.hidden, *(x for s in self.sources for x in s.floats())

    def sources_of(self, floats: tuple[Tensor, ...]) -> list[Source]:
        """The sources with these keys, values and weights, end to end."""
        each = len(Source.FLOATS)
        parts = [floats[at : at + each] for at in range(0, len(floats), each)]
        return [Source(key, value, s.cu_keys, *weights) for s, (key, value, *weights) in zip(self.sources, parts, strict=True)]


def make_case(name: str, what: str, rows: list[int], keys: list[list[int]], steps: bool = False, device: str = "cpu",
              dtype: torch.dtype = torch.float32, width: int = WIDTH, heads: int = HEADS) -> ReplyCase:
    """Replies of so many ``rows`` and, for each source, so many ``keys`` for each of them."""
    g = torch.Generator().manual_seed(len(rows))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    def offsets(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device)

    memory = [normal(sum(lengths), width) for lengths in keys]
    projections = [(normal(width, width, scale=width**-0.5), normal(width, width, scale=width**-0.5)) for _ in keys]
    sources = []
    for rows_of_it, (key, value), lengths in zip(memory, projections, keys, strict=True):
        split = [(rows_of_it @ weight.T).unflatten(1, (heads, -1)).contiguous() for weight in (key, value)]
        sources.append(Source(*split, offsets(lengths), 1 + normal(width, scale=0.1), normal(width, scale=0.1),
                              normal(width, width, scale=width**-0.5), normal(width, width, scale=width**-0.5)))
    total = sum(rows)
    return ReplyCase(name, what, normal(total, width), offsets(rows), sources, memory, projections, normal(total, width), steps)


def about(mean: int, count: int, generator: torch.Generator, spread: float = 0.5) -> list[int]:
    """Lengths from mean (1 - spread) to mean (1 + spread)."""
    low, high = round(mean * (1 - spread)), round(mean * (1 + spread))
    return torch.randint(low, high + 1, (count,), generator=generator).tolist()


def skewed(mean: int, count: int, generator: torch.Generator) -> list[int]:
    """Most of them short, a few several times the mean, as lengths of texts are."""
    return (torch.rand(count, generator=generator).log().neg() * mean).round().int().tolist()


def case_of(size: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ReplyCase:
    """stepB: one word for each of B replies, about 100 keys a source. beamsBxK: K hypotheses each. keysN: 16 replies, N keys a
    source. rowsN: training, N words in replies of about 16. batch: training, as a step of the paper's has it. ragged: training,
    lengths skewed.

    Raises:
        ConfigError: no such size.
    """
    g = torch.Generator().manual_seed(5)
    more = {"device": device, "dtype": dtype}

    def keys(count: int) -> list[list[int]]:
        return [about(100, count, g, 0.2) for _ in range(SOURCES)]

    if found := re.fullmatch(r"step(\d+)", size):
        batch = int(found[1])
        return make_case(size, f"one word for each of {batch} replies", [1] * batch, keys(batch), True, **more)
    if found := re.fullmatch(r"beams(\d+)x(\d+)", size):
        batch, beams = int(found[1]), int(found[2])
        what = f"one word for {beams} hypotheses of each of {batch} replies"
        return make_case(size, what, [beams] * batch, keys(batch), True, **more)
    if found := re.fullmatch(r"keys(\d+)", size):
        count = int(found[1])
        what = f"one word for each of 16 replies, {count} keys a source"
        return make_case(size, what, [1] * 16, [[count] * 16] * SOURCES, True, **more)
    if (found := re.fullmatch(r"rows(\d+)", size)) and int(found[1]):
        total = int(found[1])
        rows = about(16, max(1, total // 16), g)
        rows = torch.tensor([0, *rows]).cumsum(0).mul(total).div(sum(rows)).round().long().diff().tolist()
        return make_case(size, f"training, {len(rows)} replies", rows, keys(len(rows)), **more)
    if size == "batch":
        lengths = [about(45, 16, g, 0.2) for _ in range(SOURCES)]
        return make_case(size, "training, 16 replies of 15 words, about 45 keys a source", [15] * 16, lengths, **more)
    if size == "ragged":
        rows = [max(1, n) for n in skewed(16, 64, g)]
        return make_case(size, "training, 64 replies, lengths skewed", rows, [skewed(n, 64, g) for n in (60, 90, 40)], **more)
    raise ConfigError(f"cross_attention has no case {size!r}; step16, beams16x5, keys64, rows1024 or ragged")


def truth(case: ReplyCase) -> Truth:
    """Output and gradients by equations.py in float64; limits by how far the same in the case's dtype is off."""
    names = [f"grad_{name} of source {place}" for place in range(len(case.sources)) for name in Source.FLOATS]
    names = ["out", "grad_hidden", *names]
    return Truth.of(names, _results(case, torch.float64), _results(case, case.hidden.dtype))


def _results(case: ReplyCase, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs]
    out = equations.cross_attention(leaves[0], case.cu_hidden, case.sources_of(tuple(leaves[1:])))
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.to(dtype))]
