"""case_fast.ops.packed_attention: random calls, and what is particular to checking them."""

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

INDEX = ("cu_query", "cu_key", "key_of", "key_length")
SHAPES = [  # rows, keys, heads, dim, the rest
    ([1], [1], 1, 1, {}), ([1], [7], 2, 3, {}), ([3], [3], 1, 2, {"causal": True}), ([2, 3], [2, 3], 2, 2, {"causal": True}),
    ([2, 4], [5, 1], 1, 3, {}), ([4, 2], [2, 5], 2, 2, {"causal": True}), ([3, 0, 2], [0, 4, 3], 1, 3, {}),
    ([0], [0], 2, 3, {}), ([], [], 1, 2, {}), ([5], [0], 1, 2, {}), ([1, 1, 1], [4], 2, 2, {"share": True}),
    ([1, 2, 1], [3, 5], 1, 3, {"share": True, "room": True}), ([1, 1], [6, 4, 3], 2, 2, {"room": True, "causal": True}),
    ([7, 1, 3], [7, 1, 3], 1, 2, {}), ([11], [13], 1, 1, {}), ([2, 2, 2, 2], [1, 2, 3, 4], 3, 1, {}),
    ([4], [6], 1, 17, {}), ([2], [3], 1, 33, {"causal": True}), ([5, 5], [9, 1], 2, 2, {"scale": 0.0}),
    ([3, 4], [4, 3], 2, 3, {"scale": 1.5}), ([1, 9], [9, 1], 1, 3, {"causal": True}), ([0, 0, 3], [2, 2, 2], 1, 2, {}),
]
CALLS = [
    {"rows": rows, "keys": keys, "dropout_p": 0.1, "seed": seed}
    for rows, keys, seed in [([3, 4], [5, 6], 3), ([9, 1], [2, 2], 4), ([30, 20, 11], [1, 0, 40], 5)]
]


def varied() -> list[dict]:
    """The last are the encoders' and the decoder's of the paper's batch."""
    g = generator(16)
    contexts, replies, texts = ragged(g, 16, 120), ragged(g, 16, 30), ragged(g, 500, 8)
    return [
        {"rows": [3, 7, 0, 1]},
        {"rows": [64, 63], "keys": [300, 1], "dim": 150},
        {"rows": [40, 2], "keys": [30, 50], "causal": True, "dim": 16, "heads": 3},
        {"rows": [1] * 37, "keys": [40] * 5, "share": True, "room": True, "dim": 150},
        {"rows": [200], "keys": [1200], "dim": 7, "heads": 1},
        {"rows": [50, 60], "dim": 33, "dropout_p": 0.3, "seed": 3},
        {"rows": [20, 5], "keys": [0, 0]},
        {"rows": [30, 5, 90], "dtype": torch.float64, "long": 15, "causal": True},
        {"rows": contexts, "dim": 150},
        {"rows": replies, "dim": 150, "causal": True},
        {"rows": [1] * 500, "keys": texts, "dim": 150},
    ]


@dataclass(frozen=True)
class PackedAttention(Case):
    query: Tensor
    key: Tensor
    value: Tensor
    cu_query: Tensor
    cu_key: Tensor
    key_of: Tensor | None
    key_length: Tensor | None
    grad_out: Tensor
    causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    seed: int | Tensor = 0

    family = "packed_attention"
    op = staticmethod(ops.packed_attention)
    plain = staticmethod(equations.packed_attention)
    FLOATS = ("query", "key", "value")

    SMALL = [{"rows": [20, 7]}, {"rows": [3, 4], "keys": [5, 2], "causal": True}]
    OPCHECK = [
        {"rows": [3, 5]},
        {"rows": [3, 1], "keys": [4, 6], "causal": True},
        {"rows": [2, 0, 4], "keys": [1, 5, 0], "dropout_p": 0.3, "seed": 5},
        {"rows": [4, 2], "keys": [0, 0]},
        {"rows": [], "keys": []},
        {"rows": [1] * 6, "keys": [5, 9], "share": True, "room": True, "heads": 1, "dim": 3, "long": 15},
        {"rows": [6, 4], "dtype": torch.float64},
        {"rows": [6, 4], "layout": 1},
    ]
    GRADCHECK = [
        {"rows": rows, "keys": keys, "heads": heads, "dim": dim, "number": place, "dropout_p": 0.3 * (place % 3 == 2),
         "seed": 2**40 + place, **more} for place, (rows, keys, heads, dim, more) in enumerate(SHAPES)
    ]
    VARIED = varied()
    AVERAGE = [  # weights recomputed from one rounded number a row cost up to twice where scores are in the tens
        ({"rows": [80, 30, 55], "dim": 150, "magnitude": 2.0}, 20, 1.3, 1.3),
        ({"rows": [30, 17], "dim": 16, "causal": True, "magnitude": 3.0}, 20, 1.3, 2.0),
        ({"rows": [1] * 16, "keys": [100] * 16, "dim": 150}, 20, 1.3, 1.3),
    ]
    DRAWN = [{"rows": [30, 7, 41], "keys": [12, 50, 3], "dropout_p": 0.4}]
    STATUSES = [(7, "cu_query")]
    COMPILED = [("native", "aot_eager", True, CALLS), ("reference", "aot_eager", True, CALLS)]

    ON_GPU = {
        "the paper's encoder": {"rows": [70, 31, 84, 55] * 4, "dim": 150},
        "the paper's decoder": {"rows": [16, 9, 23, 12] * 4, "dim": 150, "causal": True},
        "one row a sequence": {"rows": [1] * 16, "keys": [100, 80, 0, 120] * 4, "dim": 150},
        "primes": {"rows": [1, 13, 7, 0, 19], "keys": [11, 3, 0, 5, 67], "heads": 3, "dim": 13},
        "causal, more keys and fewer": {"rows": [4, 37, 6], "keys": [50, 20, 0], "heads": 1, "dim": 7, "causal": True},
        "largest head": {"rows": [40, 3], "keys": [34, 90], "heads": 1, "dim": 256},
        "largest head of pairs": {"rows": [40, 3], "keys": [34, 90], "heads": 1, "dim": 192},
        "shared keys": {"rows": [2, 1, 0, 5, 35, 1], "keys": [33, 6, 4], "share": True, "dim": 6},
        "room in the cache": {"rows": [1, 4, 1, 40], "keys": [9, 64, 5, 70], "room": True, "dim": 8},
        "rows apart": {"rows": [3, 21], "keys": [9, 40], "layout": 1, "dim": 10},
        "any strides": {"rows": [3, 21], "keys": [9, 40], "layout": 2, "dim": 10},
        "no rows": {"rows": [0, 0], "keys": [3, 2]},
        "no keys": {"rows": [3, 2], "keys": [0, 0]},
        "no sequences": {"rows": [], "keys": []},
        "one key": {"rows": [1, 18], "keys": [1, 1], "heads": 1, "dim": 1},
        "many sequences": {"rows": [1, 2, 0, 5] * 500, "keys": [3, 0, 17, 6] * 500, "dim": 32, "long": 15},
    }
    VARIANTS = [{}, {"dropout_p": 0.2, "seed": 2**40 + 3}]

    @classmethod
    def made(cls, rows: list[int], keys: list[int] | None = None, heads: int = 2, dim: int = 5, number: int = 0,
             dtype: torch.dtype = torch.float32, device: str = "cpu", magnitude: float = 1.0, layout: int = 0, long: int = 0,
             share: bool = False, room: bool = False, **more: object) -> PackedAttention:
        """Sequences of so many ``rows`` of queries and ``keys`` (default: as many). long: bits that say which of INDEX are
        int64. share: sequences attend to random ones of ``keys``. room: of each sequence of keys only the first few are
        keys, the others are NaN."""
        g = generator(number)
        keys = rows if keys is None else keys

        def normal(total: int) -> Tensor:
            return (torch.randn(total, heads, dim, generator=g, dtype=torch.float64) * magnitude).to(dtype)

        query, key, value, grad_out = normal(sum(rows)), normal(sum(keys)), normal(sum(keys)), normal(sum(rows))
        key_of = key_length = None
        if share or len(keys) != len(rows):
            rows = rows if keys else []  # no one has any keys to name
            query, grad_out = query[: sum(rows)], grad_out[: sum(rows)]
            key_of = torch.randint(max(len(keys), 1), (len(rows),), generator=g)
        if room:
            key_length = (torch.rand(len(keys), generator=g, dtype=torch.float64) * (torch.tensor(keys) + 1)).long()
            place = equations.segment_positions(offsets(keys, True, 0, "cpu"), sum(keys))
            unused = place >= key_length[equations.segment_ids(offsets(keys, True, 0, "cpu"), sum(keys))]
            key[unused], value[unused] = torch.nan, torch.nan
        floats = (query, key, value, grad_out)
        floats = [strided(x, layout and layout + place).to(device) for place, x in enumerate(floats)]
        numbers = [x if x is None else strided(x if long >> place & 1 else x.int(), layout).to(device)
                   for place, x in enumerate((key_of, key_length), 2)]
        cu = [offsets(lengths, bool(long >> place & 1), layout, device) for place, lengths in enumerate((rows, keys))]
        return cls(*floats[:3], *cu, *numbers, floats[3], **more)

    @classmethod
    def recipe(cls, draw, st) -> dict:
        length = st.one_of(st.integers(0, 6), st.integers(0, 40))
        rows = draw(st.lists(length, max_size=6))
        same = draw(st.booleans())
        keys = None if same else draw(st.lists(length, min_size=len(rows), max_size=len(rows)))
        share = not same and draw(st.booleans())
        if share:
            keys = draw(st.lists(length, max_size=5))
        choices = {
            "heads": st.integers(1, 3),
            "dim": st.one_of(st.integers(1, 40), st.just(150)),
            "long": st.integers(0, 15),
            "room": st.booleans(),
            "causal": st.booleans(),
            "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
            "seed": st.integers(0, 2**63 - 1),
        }
        found = {"rows": rows, "keys": keys, "share": share} | {name: draw(choice) for name, choice in choices.items()}
        size = found["dim"] ** -0.5
        return found | {"scale": draw(st.sampled_from([None, 0.0, 0.5 * size, 1.5 * size]))}

    @classmethod
    def damaged(cls, number: int, g: torch.Generator, device: str) -> Damaged:
        rows, keys = ragged(g, 1 + number % 7, 9), ragged(g, 1 + number % 5, 12)
        case = cls.made(rows, keys, 1 + number % 2, 1 + number % 9, number, device=device, long=15 * (number % 2), share=True,
                        room=True, causal=number % 3 == 0)
        name = INDEX[number % 4]
        limits = {"cu_query": [sum(rows) + 1] * (len(rows) + 1), "cu_key": [sum(keys) + 1] * (len(keys) + 1),
                  "key_of": [len(keys)] * len(rows), "key_length": [m + 1 for m in keys]}
        index, said = wrong_entry(getattr(case, name), limits[name], g)
        return Damaged(case, name, replace(case, **{name: index}), said)

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """One sequence's queries, keys, values or gradient."""
        rows, keys = ragged(g, 2 + number % 6, 9), ragged(g, 2 + number % 6, 12)
        causal = number % 4 == 3
        case = cls.made(rows, keys, 2, 3 + number % 20, number, device=device, causal=causal, dropout_p=0.2 * (number % 2),
                        seed=number)
        victim = int(torch.randint(len(rows), (), generator=g))
        own, keys_of_it = (slice(int(cu[victim]), int(cu[victim + 1])) for cu in (case.cu_query, case.cu_key))
        name = ("query", "key", "value", "grad_out")[number % 4]
        broken = spoiled(getattr(case, name), keys_of_it if name in ("key", "value") else own, number)
        mask, mask_of_keys = others(sum(rows), own, device), others(sum(keys), keys_of_it, device)
        kept = {"out": mask, "grad_query": mask, "grad_key": mask_of_keys, "grad_value": mask_of_keys}
        shown = {}
        if name == "value" and number % 5 and number % 2 == 0 and keys[victim] and rows[victim] and not causal:
            shown = {"out": ~mask}
        return Poisoned(case, replace(case, **{name: broken}), POISON[number % 3], f"sequence {victim} of {name}", kept, shown)

    def registered(self, runs: str):
        tensors = [getattr(self, name) for name in (*self.FLOATS, *INDEX)]
        numbers, kernels = (self.causal, 0.4, self.dropout_p, *self.seeds()), self.kernels()
        yield kernels._forward_op, (runs, *tensors, *numbers)
        out, lse = kernels._forward_op(runs, *tensors, *numbers)
        yield kernels._backward_op, (runs, self.grad_out, *tensors, out, lse, *numbers)


BASE = PackedAttention.BASE = PackedAttention.made([2, 4], [3, 5, 1], share=True, room=True)
PackedAttention.WRONG = [
    ("query", {"query": BASE.query[0]}, ValueError),
    ("query", {"query": BASE.query.int()}, TypeError),
    ("query", {name: x[:, :, :0] for name, x in BASE.floats().items()}, ValueError),
    ("key", {"key": BASE.key[:, :1]}, ValueError),
    ("key", {"key": BASE.key.double()}, TypeError),
    ("key", {"key": BASE.key.to("meta")}, ValueError),
    ("value", {"value": BASE.value[1:]}, ValueError),
    ("value", {"value": BASE.value.half()}, TypeError),
    ("cu_query", {"cu_query": BASE.cu_query.float()}, TypeError),
    ("cu_query", {"cu_query": BASE.cu_query[:0]}, ValueError),
    ("cu_query", {"cu_query": BASE.cu_query[:, None]}, ValueError),
    ("cu_query", {"cu_query": BASE.cu_query.to("meta")}, ValueError),
    ("cu_query starts", {"cu_query": BASE.cu_query + 1}, IndexError),
    ("cu_query falls", {"cu_query": torch.tensor([0, 7, 6])}, IndexError),
    ("cu_query ends", {"query": BASE.query[1:]}, IndexError),
    ("cu_key must", {"cu_key": BASE.cu_key.bool()}, TypeError),
    ("cu_key must", {"key_of": None, "key_length": None}, ValueError),
    ("cu_key ends", {"cu_key": torch.tensor([0, 3, 8, 8])}, IndexError),
    ("cu_key falls", {"cu_key": torch.tensor([0, 3, 1, 9])}, IndexError),
    ("key_of", {"key_of": BASE.key_of[1:]}, ValueError),
    ("key_of", {"key_of": BASE.key_of.short()}, TypeError),
    ("key_of holds", {"key_of": BASE.key_of + 3}, IndexError),
    ("key_of names", {"cu_key": BASE.cu_key[:1], "key_length": None}, IndexError),
    ("key_length", {"key_length": BASE.key_length[1:]}, ValueError),
    ("key_length holds", {"key_length": BASE.key_length + 6}, IndexError),
    ("key_length holds", {"key_length": BASE.key_length - 6}, IndexError),
    ("scale", {"scale": -0.1}, ValueError),
    ("scale", {"scale": float("nan")}, ValueError),
    ("dropout_p", {"dropout_p": 1.0}, ValueError),
    ("dropout_p", {"dropout_p": float("nan")}, ValueError),
    *WRONG_SEEDS,
]
