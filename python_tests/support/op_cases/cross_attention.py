"""case_fast.ops.cross_attention: random calls, and what is particular to checking them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from op_case import (
    POISON,
    WRONG_SEEDS,
    Case,
    Damaged,
    Poisoned,
    generator,
    offsets,
    others,
    ragged,
    spoiled,
    strided,
    wrong_entry,
)
from torch import Tensor

from case_fast import equations, ops
from case_fast.ops import RowSource, Source

SHAPES = [  # rows, keys of each source, width, heads, dim, share
    ([1], [[1]], 1, 1, 1, False), ([1], [[7]], 3, 2, 2, False), ([2, 1], [[3, 2]], 4, 1, 3, False),
    ([1, 1], [[3, 2], [1, 4]], 3, 2, 1, False), ([3, 0, 2], [[2, 3, 0]], 2, 1, 2, False), ([2], [[0]], 3, 1, 2, False),
    ([], [[]], 3, 1, 2, False), ([0, 0], [[1, 2]], 3, 2, 2, False), ([1, 1, 1], [[4]], 5, 1, 3, True),
    ([1, 2, 1], [[3, 5], [2, 2]], 4, 1, 2, True), ([5], [[11]], 2, 1, 5, False),
    ([2, 3], [[1, 1], [2, 2], [3, 3]], 3, 1, 2, False),
    ([1], [[2], [3], [0], [1]], 4, 2, 1, False), ([7], [[3]], 5, 1, 1, False), ([1, 1], [[0, 5]], 7, 1, 2, False),
    ([2, 2], [[4, 0], [0, 4]], 3, 2, 2, False), ([3], [[6]], 1, 2, 3, False), ([4], [[2]], 11, 1, 2, False),
    ([1, 1, 1, 1], [[1, 2, 3, 4]], 2, 3, 1, False), ([2], [[3]], 17, 1, 3, False), ([1], [[5]], 3, 1, 17, False),
]
NAMES = ("rows", "keys", "width", "heads", "dim", "share")
DROPOUT = {"dropout_p": 0.3, "output_dropout_p": 0.2}
CALLS = [
    {"rows": rows, "keys": keys, "dropout_p": 0.1, "output_dropout_p": 0.2, "seed": seed}
    for rows, keys, seed in [([3, 4], [[5, 6], [4, 0]], 3), ([9, 1], [[2, 2], [3, 3]], 4)]
]


def varied() -> list[dict]:
    """The last are the decoder's of the paper's batch, training and decoding."""
    g = generator(16)

    def about(keys: int, sequences: int = 16) -> list[int]:
        return ragged(g, sequences, 2 * keys + 1)

    three = {"width": 300, "dim": 150}
    return [
        {"rows": [3, 7, 0, 1], "keys": [[2, 0, 5, 9]]},
        {"rows": [64, 63], "keys": [[300, 1], [0, 7]], "dim": 150, "width": 33},
        {"rows": [1] * 37, "keys": [[40] * 5, [3, 0, 9]], "share": True, "dim": 16, "heads": 3},
        {"rows": [500], "keys": [[600]], "dim": 7, "heads": 1, "width": 130},
        {"rows": [50, 60], "keys": [[20, 30]] * 2, "dim": 33, "seed": 3} | DROPOUT,
        {"rows": [20, 5], "keys": [[0, 0]]},
        {"rows": [30, 5, 90], "keys": [[4, 9, 80]], "dtype": torch.float64, "long": True},
        {"rows": about(15), "keys": [about(60), about(90), about(40)]} | three,
        {"rows": [1] * 16, "keys": [about(100), about(100), about(100)]} | three,
        {"rows": [5] * 16, "keys": [about(100), about(100), about(100)]} | three,
        {"rows": [1], "keys": [[100], [90], [50]]} | three,
        {"rows": about(15), "keys": [about(60), about(90), about(40)], "over_rows": True} | three,
        {"rows": [64, 0, 63], "keys": [[300, 1, 2], [0, 7, 9]], "width": 33, "over_rows": True} | DROPOUT,
        {"rows": [5, 0, 2, 9], "keys": [[40] * 5, [3, 0, 9]], "share": True, "heads": 3, "over_rows": True, "long": True},
        {"rows": [20, 5], "keys": [[0, 0]], "over_rows": True},
        {"rows": [1], "keys": [[100], [90]], "width": 300, "dim": 150, "over_rows": True},
    ]


@dataclass(frozen=True)
class CrossAttention(Case):
    """The floats of a source are named by its place: "0.key"."""

    hidden: Tensor
    cu_hidden: Tensor
    sources: list[Source] | list[RowSource]
    grad_out: Tensor
    eps: float = 1e-5
    dropout_p: float = 0.0
    output_dropout_p: float = 0.0
    seed: int | Tensor = 0

    family = "cross_attention"
    op = staticmethod(ops.cross_attention)
    plain = staticmethod(equations.cross_attention)

    SMALL = [{"rows": [20, 7], "keys": [[5, 9], [3, 2]]}, {"rows": [3, 4], "keys": [[5, 2], [1, 0]], "share": True},
             {"rows": [3, 4], "keys": [[5, 2], [1, 0]], "over_rows": True}]
    OPCHECK = [
        {"rows": [3, 5], "keys": [[4, 6]]},
        {"rows": [1, 1, 1], "keys": [[4, 6, 2], [0, 3, 0], [1, 1, 1]]},
        {"rows": [2, 0, 4], "keys": [[1, 5, 0]], "seed": 5} | DROPOUT,
        {"rows": [4, 2], "keys": [[0, 0], [0, 0]]},
        {"rows": [], "keys": [[]]},
        {"rows": [1] * 6, "keys": [[5, 9], [2, 0, 3]], "heads": 1, "dim": 3, "long": True},
        {"rows": [6, 4], "keys": [[3, 3]], "dtype": torch.float64},
        {"rows": [6, 4], "keys": [[3, 3], [2, 5]], "layout": 1},
        {"rows": [2, 0, 4], "keys": [[1, 5, 0], [2, 2, 2]], "seed": 5, "over_rows": True} | DROPOUT,
        {"rows": [6, 4], "keys": [[3, 3], [2, 5]], "layout": 1, "over_rows": True},
        {"rows": [], "keys": [[]], "over_rows": True},
    ]
    GRADCHECK = [  # eps above the variance of rows: of one or two columns they would all be normalised to the same, sharply
        dict(zip(NAMES, shape, strict=True)) | {"number": place, "eps": 0.1, "seed": 2**40 + place}
        | (DROPOUT if place % 3 == 2 else {}) | more
        for place, shape in enumerate(SHAPES) for more in ({}, {"over_rows": True})
    ]
    VARIED = varied()
    AVERAGE = [
        ({"rows": rows, "keys": [[100, 60, 0, 120] * (len(rows) // 4)] * 3, "width": 300, "dim": 150}, 8, 1.3, 1.3)
        for rows in ([1] * 16, [15, 30, 7, 22])
    ]
    AVERAGE += [(AVERAGE[1][0] | {"over_rows": True}, *AVERAGE[1][1:])]
    DRAWN = [{"rows": [30, 7, 21], "keys": [[12, 50, 3], [1, 0, 30]], "dropout_p": 0.4, "output_dropout_p": 0.3} | more
             for more in ({}, {"over_rows": True})]
    STATUSES = [(7, "cu_hidden"), (8 + 16, "sources[1].cu_keys"), (9, "sources[0].key_of")]
    COMPILED = [(runs, "aot_eager", True, [call | more for call in CALLS])
                for runs in ("native", "reference") for more in ({}, {"over_rows": True})]

    ON_GPU = {
        "the paper's step": {"rows": [1] * 16, "keys": [[100, 80, 0, 120] * 4] * 3, "width": 300, "dim": 150},
        "beams": {"rows": [5] * 4, "keys": [[100, 80, 0, 120]] * 3, "width": 300, "dim": 150},
        "the paper's training": {"rows": [16, 9, 23, 12] * 4, "keys": [[90, 80, 0, 120] * 4] * 3, "width": 300, "dim": 150},
        "primes": {"rows": [1, 13, 0, 7], "keys": [[11, 3, 5, 67], [0, 0, 0, 1]], "width": 31, "heads": 3, "dim": 13},
        "largest head": {"rows": [3, 2], "keys": [[34, 50]], "width": 700, "heads": 1, "dim": 256},
        "shared keys": {"rows": [1, 2, 1], "keys": [[9, 3], [2, 0]], "width": 14, "share": True},
        "any strides": {"rows": [3, 2], "keys": [[9, 40]], "layout": 2, "width": 12, "dim": 10},
        "no rows": {"rows": [0, 0], "keys": [[3, 2]]},
        "no keys": {"rows": [3, 2], "keys": [[0, 0]]},
        "no sequences": {"rows": [], "keys": [[]]},
        # eps above the variance of rows of one column, which would all be normalised to the same, sharply
        "one of all": {"rows": [1], "keys": [[1]], "width": 1, "heads": 1, "dim": 1, "eps": 0.1},
    }
    VARIANTS = [{}, {"dropout_p": 0.2, "output_dropout_p": 0.1, "seed": 2**40 + 3}]

    @classmethod
    def made(cls, rows: list[int], keys: list[list[int]], width: int = 6, heads: int = 2, dim: int = 5, number: int = 0,
             dtype: torch.dtype = torch.float32, device: str = "cpu", magnitude: float = 1.0, layout: int = 0,
             long: bool = False, share: bool = False, over_rows: bool = False, **more: object) -> CrossAttention:
        """Sequences of so many ``rows`` and, for each source, of so many ``keys``. share: sequences attend to random ones of
        ``keys``. over_rows: the sources are rows, with what makes keys and values of them."""
        g = generator(number)

        def normal(*shape: int, scale: float = 1.0, by: int = 0) -> Tensor:
            x = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)
            return strided(x, layout and layout + by).to(device)

        sources = []
        for lengths in keys:
            of = None
            if share or len(lengths) != len(rows):
                rows = rows if lengths else []
                of = torch.randint(max(len(lengths), 1), (len(rows),), generator=g)
                of = (of if long else of.int()).to(device)
            inner, norm = heads * dim, normal(2, width, scale=0.2)
            if over_rows:
                by = width**-0.5
                first = (normal(sum(lengths), width, scale=magnitude), normal(heads, dim, width, scale=by, by=1),
                         normal(heads, dim, width, scale=by, by=2))
            else:
                first = tuple(normal(sum(lengths), heads, dim, scale=magnitude, by=by) for by in (0, 1))
            sources.append((RowSource if over_rows else Source)(
                *first, offsets(lengths, long, layout, device), norm[0] + 1, norm[1],
                normal(inner, width, scale=width**-0.5, by=2), normal(width, inner, scale=inner**-0.5, by=3), of,
            ))
        sources = [replace(s, key_of=s.key_of if s.key_of is None else s.key_of[: len(rows)]) for s in sources]
        cu, total = offsets(rows, long, layout, device), sum(rows)
        # gradients of weights and of shared keys sum over rows: so they stay of order 1
        return cls(normal(total, width), cu, sources, normal(total, width, scale=max(total, 1) ** -0.5, by=1), **more)

    def floats(self) -> dict[str, Tensor]:
        inside = {f"{place}.{name}": getattr(s, name) for place, s in enumerate(self.sources) for name in s.FLOATS}
        return {"hidden": self.hidden} | inside

    def having(self, floats: dict[str, Tensor]) -> CrossAttention:
        sources = [replace(s, **{name: floats[f"{place}.{name}"] for name in s.FLOATS if f"{place}.{name}" in floats})
                   for place, s in enumerate(self.sources)]
        return replace(self, hidden=floats.get("hidden", self.hidden), sources=sources)

    def with_source(self, place: int, **changes: object) -> CrossAttention:
        """With one source changed."""
        return replace(self, sources=[replace(s, **changes) if i == place else s for i, s in enumerate(self.sources)])

    def lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """What the sources hold, as the registered ops take it: floats, cu_keys, key_of."""
        floats = [x for name, x in self.floats().items() if name != "hidden"]
        return floats, [s.cu_keys for s in self.sources], [s.key_of for s in self.sources]

    @classmethod
    def recipe(cls, draw, st) -> dict:
        length = st.one_of(st.integers(0, 6), st.integers(0, 40))
        rows = draw(st.one_of(st.lists(length, max_size=5), st.lists(st.just(1), max_size=20)))
        share, count = draw(st.booleans()), draw(st.integers(1, 3))
        each = st.lists(length, max_size=5) if share else st.lists(length, min_size=len(rows), max_size=len(rows))
        choices = {
            "width": st.integers(4, 40),
            "heads": st.integers(1, 3),
            "dim": st.one_of(st.integers(1, 20), st.just(150)),
            "long": st.booleans(),
            "over_rows": st.booleans(),
            "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
            "output_dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
            "seed": st.integers(0, 2**63 - 1),
        }
        found = {"rows": rows, "keys": [draw(each) for _ in range(count)], "share": share}
        return found | {name: draw(choice) for name, choice in choices.items()}

    @classmethod
    def damaged(cls, number: int, g: torch.Generator, device: str) -> Damaged:
        rows, keys = ragged(g, 1 + number % 7, 9), [ragged(g, 1 + number % 5, 12) for _ in range(1 + number % 3)]
        case = cls.made(rows, keys, 3 + number % 9, 1 + number % 2, 1 + number % 9, number, device=device,
                        long=number % 2 == 0, share=True, over_rows=number % 5 == 1)
        place = number % len(keys)
        name = ("cu_hidden", "cu_keys", "key_of")[number // 2 % 3]
        if name == "cu_hidden":
            index, said = wrong_entry(case.cu_hidden, [sum(rows) + 1] * (len(rows) + 1), g)
            return Damaged(case, name, replace(case, cu_hidden=index), said)
        least = {"cu_keys": [sum(keys[place]) + 1] * (len(keys[place]) + 1), "key_of": [len(keys[place])] * len(rows)}
        index, said = wrong_entry(getattr(case.sources[place], name), least[name], g)
        return Damaged(case, f"sources[{place}].{name}", case.with_source(place, **{name: index}), said)

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """One sequence's rows, keys, values or gradient. The gradients of weights are sums over all sequences."""
        sequences = 2 + number % 6
        rows, keys = ragged(g, sequences, 9), [ragged(g, sequences, 12) for _ in range(1 + number % 3)]
        case = cls.made(rows, keys, 4 + number % 30, 2, 3 + number % 20, number, device=device, dropout_p=0.2 * (number % 2),
                        output_dropout_p=0.1 * (number % 2), seed=number, over_rows=number % 8 > 3)
        victim = int(torch.randint(sequences, (), generator=g))
        span = slice(int(case.cu_hidden[victim]), int(case.cu_hidden[victim + 1]))
        spans = [slice(int(s.cu_keys[victim]), int(s.cu_keys[victim + 1])) for s in case.sources]
        kind, place = number % 4, number % len(keys)
        of_keys = [x for x in case.sources[0].FLOATS if x in ("key", "value", "rows")]  # one row a key
        name = ("hidden", f"{place}.{of_keys[0]}", f"{place}.{of_keys[-1]}", "grad_out")[kind]
        if kind == 3:
            broken = replace(case, grad_out=spoiled(case.grad_out, span, number))
        else:
            broken = case.having({name: spoiled(case.floats()[name], spans[place] if kind else span, number)})
        mask = others(sum(rows), span, device)
        kept = {"out": mask, "grad_hidden": mask}
        kept |= {f"grad_{i}.{x}": others(sum(keys[i]), spans[i], device) for i in range(len(keys)) for x in of_keys}
        shown = {}
        if kind == 2 and number % 5 and "value" in of_keys and number % 2 == 0 and keys[place][victim] and rows[victim]:
            shown = {"out": ~mask}
        return Poisoned(case, broken, POISON[number % 3], f"sequence {victim} of {name}", kept, shown)

    def registered(self, runs: str):
        """Forward with and without what backward needs, and backward."""
        tensors, numbers = self.lists(), (self.eps, self.dropout_p, self.output_dropout_p, *self.seeds())
        kernels = self.kernels()
        for keep in (True, False):
            yield kernels._forward_op, (runs, self.hidden, self.cu_hidden, *tensors, *numbers, keep)
        saved = kernels._forward_op(runs, self.hidden, self.cu_hidden, *tensors, *numbers, True)[1]
        yield kernels._backward_op, (runs, self.grad_out, self.hidden, self.cu_hidden, *tensors, saved, *numbers)


BASE = CrossAttention.BASE = CrossAttention.made([2, 4], [[3, 5], [1, 6]], share=True)


def second(**changes: object) -> dict:
    """Arguments whose second source is changed."""
    return {"sources": BASE.with_source(1, **changes).sources}


SECOND = BASE.sources[1]
OVER = CrossAttention.made([2, 4], [[3, 5], [1, 6]], share=True, over_rows=True)


def second_over(**changes: object) -> dict:
    return {"sources": OVER.with_source(1, **changes).sources}


CrossAttention.WRONG = [
    ("hidden", {"hidden": BASE.hidden[0]}, ValueError),
    ("hidden", {"hidden": BASE.hidden.int()}, TypeError),
    ("hidden", {"hidden": BASE.hidden[:, :0]}, ValueError),
    ("sources must", {"sources": []}, ValueError),
    ("sources[1] must", {"sources": [BASE.sources[0], "source"]}, TypeError),
    ("sources[0].key must", {"hidden": BASE.hidden.double()}, TypeError),
    ("sources[1].key must", second(key=SECOND.key[0]), ValueError),
    ("sources[1].key must", second(key=SECOND.key.to("meta")), ValueError),
    ("sources[1].value must", second(value=SECOND.value[1:]), ValueError),
    ("sources[1].value must", second(value=SECOND.value.half()), TypeError),
    ("sources[1].norm_weight must", second(norm_weight=SECOND.norm_weight[1:]), ValueError),
    ("sources[1].norm_bias must", second(norm_bias=SECOND.norm_bias[None]), ValueError),
    ("sources[1].query_weight must", second(query_weight=SECOND.query_weight.T), ValueError),
    ("sources[1].output_weight must", second(output_weight=SECOND.output_weight.double()), TypeError),
    ("sources[1] must", {"sources": [OVER.sources[0], SECOND]}, TypeError),
    ("sources[1] must", {"sources": [SECOND, OVER.sources[0]]}, TypeError),
    ("sources[1].rows must", second_over(rows=OVER.sources[1].rows[:, 1:]), ValueError),
    ("sources[1].rows must", second_over(rows=OVER.sources[1].rows.double()), TypeError),
    ("sources[1].key_weight must", second_over(key_weight=OVER.sources[1].key_weight.flatten(0, 1)), ValueError),
    ("sources[1].key_weight must", second_over(key_weight=OVER.sources[1].key_weight[..., 1:]), ValueError),
    ("sources[1].value_weight must", second_over(value_weight=OVER.sources[1].value_weight[1:]), ValueError),
    ("cu_hidden", {"cu_hidden": BASE.cu_hidden.float()}, TypeError),
    ("cu_hidden", {"cu_hidden": BASE.cu_hidden[:0]}, ValueError),
    ("cu_hidden ends", {"cu_hidden": BASE.cu_hidden // 2}, IndexError),
    ("cu_hidden starts", {"cu_hidden": BASE.cu_hidden + 1}, IndexError),
    ("sources[1].cu_keys must", second(cu_keys=SECOND.cu_keys.bool()), TypeError),
    ("sources[1].cu_keys must", second(cu_keys=torch.tensor([0, 3, 5, 7]), key_of=None), ValueError),
    ("sources[1].cu_keys falls", second(cu_keys=torch.tensor([0, 8, 7])), IndexError),
    ("sources[1].key_of must", second(key_of=SECOND.key_of[1:]), ValueError),
    ("sources[1].key_of holds", second(key_of=SECOND.key_of + 2), IndexError),
    ("sources[1].key_of names", second(cu_keys=SECOND.cu_keys[:1]), IndexError),
    ("eps", {"eps": -1e-5}, ValueError),
    ("eps", {"eps": float("nan")}, ValueError),
    ("dropout_p", {"dropout_p": 1.0}, ValueError),
    ("output_dropout_p", {"output_dropout_p": -0.1}, ValueError),
    *WRONG_SEEDS,
]
