"""case_fast.ops.linear_cross_entropy and top_words: random calls, and what is particular to checking them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from op_case import POISON, Case, Damaged, Poisoned, chooser, full, generator, strided, wrong_entry
from torch import Tensor
from torch.nn import functional as F

from case_fast import equations, ops

KEEP, RECOMPUTE = 1 << 40, 0  # keep_bytes
SHAPES = [  # rows, words, dim, the rest
    (1, 1, 1, {}), (1, 7, 3, {}), (2, 2, 1, {}), (3, 5, 2, {}), (5, 3, 4, {}), (7, 11, 3, {}), (11, 7, 1, {}), (13, 17, 2, {}),
    (3, 193, 2, {}), (2, 9, 17, {}), (1, 5, 33, {}), (0, 4, 2, {}), (26, 5, 2, {}), (29, 3, 3, {}), (25, 13, 1, {}),
    (4, 6, 2, {"most": 3}), (6, 1, 2, {"most": 2}), (5, 9, 3, {"most": 1}), (3, 2, 2, {"most": 6}), (0, 3, 2, {"most": 2}),
    (3, 4, 2, {"most": 0}), (9, 8, 2, {"most": 2, "still": 0.5}), (7, 12, 2, {"still": 0.5}), (5, 20, 3, {"forbidden": 0.5}),
    (31, 6, 2, {"most": 2, "still": 0.4}), (28, 7, 2, {"most": 2, "forbidden": 0.3}),
]
CALLS = [{"rows": 9, "words": 50}, {"rows": 12, "words": 20, "keep_bytes": RECOMPUTE}, {"rows": 30, "words": 70}]
BAGS = [call | {"most": 3} for call in CALLS]


def contiguous(arguments: dict) -> dict:
    """torch 2.13's product in bfloat16 reads what lies between the rows of a strided (n, 1), and NaN there makes it NaN."""
    return {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def of_equations(keep_bytes: int = 0, **arguments: object) -> tuple[Tensor, Tensor]:
    """equations.linear_cross_entropy, which always keeps the scores."""
    return equations.linear_cross_entropy(**contiguous(arguments))


@torch.no_grad()
def best_of_equations(**arguments: object) -> tuple[Tensor, Tensor]:
    return equations.top_words(**contiguous(arguments))


@dataclass(frozen=True)
class LinearCrossEntropy(Case):
    """With k, results hold the k most probable words of every row as well."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    cu_target: Tensor | None
    grad_nll: Tensor
    keep_bytes: int = KEEP
    k: int | None = None

    family = "linear_cross_entropy"
    op = staticmethod(ops.linear_cross_entropy)
    plain = staticmethod(of_equations)
    FLOATS = ("hidden", "weight", "bias")
    OUTPUTS = ("nll", "prediction")
    GRADIENTS = {"nll": "grad_nll"}
    SUMS = True
    NATIVE = ("top_words",)

    SMALL = [{"rows": 30, "words": 40, "k": 3}, {"rows": 30, "words": 20, "keep_bytes": RECOMPUTE, "k": 3},
             {"rows": 9, "words": 20, "most": 3, "k": 3}]
    OPCHECK = [
        {"rows": 7, "words": 11},
        {"rows": 7, "words": 11, "most": 3},
        {"rows": 9, "words": 5, "most": 2, "long": 0, "still": 0.5, "keep_bytes": RECOMPUTE},
        {"rows": 30, "words": 200, "dim": 33, "forbidden": 0.3},
        {"rows": 30, "words": 200, "dim": 33, "keep_bytes": RECOMPUTE},
        {"rows": 6, "words": 13, "dim": 3, "dtype": torch.float64},
        {"rows": 0, "words": 4},
        {"rows": 3, "words": 1, "most": 0},
        *({"rows": 30, "words": 13, "layout": layout, "most": 2} for layout in (1, 2, 3)),
    ]
    GRADCHECK = [
        {"rows": rows, "words": words, "dim": dim, "number": place, "magnitude": 1.5, "keep_bytes": keep_bytes, **more}
        for place, (rows, words, dim, more) in enumerate(SHAPES) for keep_bytes in (KEEP, RECOMPUTE)
    ]
    VARIED = [  # one row; few rows and many, at once and not; kept and not; rows without part; both index widths
        {"rows": 1, "words": 24000, "dim": 300},
        {"rows": 24, "words": 577, "dim": 33},
        {"rows": 25, "words": 577, "dim": 33, "keep_bytes": RECOMPUTE},
        {"rows": 24, "words": 1, "dim": 1, "long": 0},
        {"rows": 480, "words": 5003, "dim": 300},
        {"rows": 480, "words": 5003, "dim": 300, "keep_bytes": RECOMPUTE},
        {"rows": 1021, "words": 389, "dim": 150, "dtype": torch.float64, "still": 0.3},
        {"rows": 1021, "words": 389, "dim": 150, "still": 0.3, "keep_bytes": RECOMPUTE},
        {"rows": 700, "words": 200, "dim": 40, "still": 0.99, "most": 3, "keep_bytes": RECOMPUTE},
        {"rows": 4099, "words": 211, "dim": 7, "long": 0},
        {"rows": 16, "words": 24000, "dim": 300, "most": 34},
        {"rows": 60, "words": 400, "dim": 33, "most": 3, "forbidden": 0.5, "layout": 1},
        {"rows": 0, "words": 4, "dim": 3},
    ]
    AVERAGE = [
        ({"rows": 60, "words": 700, "dim": 150, "magnitude": 3.0}, 20, 1.5, 1.5),
        ({"rows": 20, "words": 700, "dim": 150, "magnitude": 3.0, "keep_bytes": RECOMPUTE}, 20, 1.5, 1.5),
        ({"rows": 600, "words": 40, "dim": 16, "most": 3, "keep_bytes": RECOMPUTE}, 20, 1.5, 1.5),
    ]
    DRAWN = []
    STATUSES = [(11, "target")]
    COMPILED = [(runs, compiler, True, calls) for runs, compiler in (("native", "aot_eager"), ("reference", "eager"))
                for calls in (CALLS, BAGS)]

    ON_GPU = {name: {"magnitude": 2.0, "k": 1} | recipe for name, recipe in {
        "training": {"rows": 480, "words": 24007, "dim": 300, "k": 5},
        "bags of words": {"rows": 16, "words": 24007, "dim": 300, "most": 40, "k": 5},
        "prime sizes, several": {"rows": 101, "words": 757, "dim": 13, "most": 5, "k": 32},
        "prime sizes": {"rows": 101, "words": 757, "dim": 13, "k": 32},
        "more rows than a block": {"rows": 5003, "words": 1009, "dim": 300},
        "one row": {"rows": 1, "words": 757, "dim": 64},
        "one word": {"rows": 5, "words": 1, "dim": 4, "most": 3},
        "no rows": {"rows": 0, "words": 7, "dim": 4},
    }.items()}
    VARIANTS = [{"keep_bytes": KEEP}, {"keep_bytes": RECOMPUTE}]

    @classmethod
    def made(cls, rows: int, words: int, dim: int = 5, number: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu",
             magnitude: float = 1.0, layout: int = 0, long: int = 3, most: int | None = None, still: float = 0.0,
             forbidden: float = 0.0, **more: object) -> LinearCrossEntropy:
        """Scores have about the size of ``magnitude``. long: bits that say whether target and cu_target are int64. most: rows
        have from 0 to so many targets; None: one each. still: a share of rows whose gradient is 0. forbidden: a share of words
        with a bias of -inf, never a target."""
        g = generator(number)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        def chosen(share: float, count: int) -> Tensor:
            return torch.rand(count, generator=g, dtype=torch.float64) < share

        hidden, weight, bias = normal(rows, dim), normal(words, dim, scale=magnitude * dim**-0.5), normal(words, scale=magnitude)
        cu_target, row_of = None, torch.arange(rows)
        if most is not None:
            cu_target = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(most + 1, (rows,), generator=g).cumsum(0)])
            row_of = equations.segment_ids(cu_target, int(cu_target[-1]))
        target = torch.randint(words, (row_of.numel(),), generator=g)
        barred = chosen(forbidden, words)
        barred[0] = False
        barred[target] = False
        bias[barred] = -torch.inf
        # gradients of weight and bias sum over rows: so they stay of the order that they have of 64
        grad_nll = normal(target.numel(), scale=min(1.0, 8 * max(target.numel(), 1) ** -0.5))
        grad_nll[chosen(still, rows)[row_of]] = 0
        floats = [strided(x.to(dtype), layout and layout + place).to(device) for place, x in enumerate((hidden, weight, bias))]
        grad_nll = strided(grad_nll.to(full(dtype)), layout).to(device)
        target = strided(target if long & 1 else target.int(), layout).to(device)
        if cu_target is not None:
            cu_target = strided(cu_target if long & 2 else cu_target.int(), layout).to(device)
        return cls(*floats, target, cu_target, grad_nll, **more)

    @classmethod
    def runs(cls, device: str) -> list[Callable[[], dict[str, Tensor]]]:
        """And the 1, 5 and 97 most probable words of each."""
        runs = super().runs(device)
        cases = [run.__self__ for run in runs]
        return runs + [partial(case.best, k) for k in (1, 5, 97) for case in cases if len(case.weight) >= k]

    def arguments(self) -> dict:
        return {name: value for name, value in super().arguments().items() if name != "k"}

    def kind(self, name: str) -> torch.dtype:
        return torch.int64 if name in ("prediction", "word") else super().kind(name)

    def call(self, function: Callable | None = None) -> dict[str, Tensor]:
        found = super().call(function)
        if self.k is not None:
            found |= self.best(self.k, best_of_equations if function is self.plain else ops.top_words)
        return found

    def best(self, k: int, function: Callable = ops.top_words) -> dict[str, Tensor]:
        return dict(zip(("log_probability", "word"), function(**self.floats(), k=k), strict=True))

    def differentiable(self, floats: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """0 where a row is to take no part; a bias of -inf has a gradient of 0, and no finite step shows it."""
        bias = floats["bias"].masked_fill(self.bias == -torch.inf, -torch.inf)
        return tuple((self.grad_nll != 0).to(x.dtype) * x for x in super().differentiable(floats | {"bias": bias}))

    def compared(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The exact score of a predicted word, which none is above but by rounding; of the most probable words, k others in
        order, the exact probability."""
        score = F.linear(*(x.double() for x in self.floats().values()))
        found = dict(found)
        assert found["prediction"].shape == score.shape[:1]
        found["prediction"] = score.gather(1, found["prediction"].unsqueeze(1)).squeeze(1)
        if self.k is not None:
            value, word = found["log_probability"], found["word"]
            assert (value[:, 1:] <= value[:, :-1]).all() and (word.sort(1).values.diff(dim=1) > 0).all()
            found["word"] = score.log_softmax(1).gather(1, word)
        return found

    @classmethod
    def recipe(cls, draw, st) -> dict:
        """Few rows and many, and more than the kernels take at once (480 backward, 960 of top_words, 4080 forward); words below,
        at and above their blocks of 192."""
        rows = draw(st.one_of(st.integers(0, 24), st.integers(0, 64), st.integers(0, 64), st.sampled_from([97, 241, 521])))
        words = draw(st.one_of(st.integers(1, 60), st.integers(1, 400), st.sampled_from([191, 192, 193, 383, 577, 1009])))
        dim = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 150, 300])))
        if draw(st.integers(0, 49)) == 0:
            rows, words, dim = draw(st.sampled_from([1009, 4099])), 1 + words % 40, 1 + dim % 8
        choices = {
            "long": st.integers(0, 3),
            "most": st.one_of(st.none(), st.integers(0, 5)),
            "still": st.sampled_from([0.0, 0.0, 0.3, 0.9]),
            "forbidden": st.sampled_from([0.0, 0.0, 0.2, 0.9]),
            "keep_bytes": st.sampled_from([KEEP, RECOMPUTE]),
            "k": st.integers(1, min(words, 40)),
        }
        return {"rows": rows, "words": words, "dim": dim} | {name: draw(choice) for name, choice in choices.items()}

    @classmethod
    def damaged(cls, number: int, g: torch.Generator, device: str) -> Damaged:
        words = 1 + number % 40
        case = cls.made(1 + number % 50, words, 1 + number % 9, number, device=device, long=number % 3 and 3,
                        most=(None, 3, 2)[number % 3], keep_bytes=(KEEP, RECOMPUTE)[number % 2])
        name = "cu_target" if case.cu_target is not None and (number % 2 or not case.target.numel()) else "target"
        index = getattr(case, name)
        limit = words if name == "target" else case.target.numel() + 1
        index, said = wrong_entry(index, [limit] * index.numel(), g)
        return Damaged(case, name, replace(case, **{name: index}), said)

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """One row of hidden, or the gradient of one row's losses: nll, prediction, words and grad_hidden of the other rows stay.
        grad_weight and grad_bias are sums over the rows: they are not finite then, anywhere; but where the losses of that row
        have gradient 0, or are none, it takes no part in the kernels, and the bits of both stay (plain torch makes them NaN).
        NaN in a word's weight or bias makes every row's losses NaN, and that word the prediction."""
        pick = chooser(g)
        rows, words, dim = pick(1, 2, 7, 24, 25, 40, 300), pick(1, 2, 40, 191, 400), 1 + number % 33
        case = cls.made(rows, words, dim, number, device=device, most=pick(None, None, 2), still=pick(0.0, 0.3),
                        keep_bytes=pick(KEEP, RECOMPUTE), k=min(3, words))
        row, poison = int(torch.randint(rows, (), generator=g)), pick(*POISON)
        row_of = torch.arange(rows) if case.cu_target is None else equations.segment_ids(case.cu_target, case.target.numel())
        row_of = row_of.to(device)
        own = row_of == row
        name = pick("hidden", "hidden", "hidden", "grad_nll", "weight", "bias")
        said, poisoned, clean = f"row {row} of {name}", getattr(case, name).clone(), case
        if name in ("weight", "bias"):
            poisoned[row % words] = torch.nan
            broken = replace(case, **{name: poisoned})
            return Poisoned(case, broken, torch.nan, said, {}, {"nll": torch.ones_like(own)}, {"prediction": row % words})
        takes_part = bool((case.grad_nll[own] != 0).any())
        if name == "hidden":
            poisoned[row, pick(slice(None), *range(dim))] = poison
        elif own.any():
            poisoned[own.nonzero()[pick(0, -1)]] = poison
            if not takes_part:  # that row now takes part, and another order of sums with it
                clean = replace(case, grad_nll=case.grad_nll.masked_fill(own, 1.0))
            takes_part = True
        others = torch.arange(rows, device=device) != row
        kept = {"nll": ~own} | dict.fromkeys(("prediction", "grad_hidden", "log_probability", "word"), others)
        shown = {"nll": own, "log_probability": ~others} if name == "hidden" else {}
        sums = {"grad_weight": torch.ones(words, dtype=torch.bool, device=device)}
        sums["grad_bias"] = sums["grad_weight"]
        if takes_part:
            shown |= sums
        elif ops.backend_name(cls.family, device) != "reference":
            kept |= sums
        return Poisoned(clean, replace(case, **{name: poisoned}), poison, said, kept, shown)

    def registered(self, runs: str):
        """Forward; backward of all gradients and of some; the most probable words."""
        tensors, kernels = (*self.floats().values(), self.target, self.cu_target), self.kernels()
        keep = self.keep_bytes == KEEP
        yield kernels._forward_op, (runs, *tensors, keep)
        _, _, state, kept = kernels._forward_op(runs, *tensors, keep)
        for wanted in ([True, True, True], [True, False, False], [False, True, True]):
            yield kernels._backward_op, (runs, self.grad_nll, *tensors, state, kept, wanted)
        yield kernels._top_op, (runs, *self.floats().values(), min(3, len(self.weight)))


BASE = LinearCrossEntropy.BASE = LinearCrossEntropy.made(6, 20)
OF_BOTH = [  # of linear_cross_entropy and of top_words
    ("hidden must be float32", {"hidden": BASE.hidden.long()}, TypeError),
    ("hidden must be (T, d)", {"hidden": BASE.hidden[0]}, ValueError),
    ("hidden must be (T, d) with d above 0", {"hidden": BASE.hidden[:, :0]}, ValueError),
    ("hidden ", {"hidden": BASE.hidden.to(torch.float8_e4m3fn)}, TypeError),
    ("weight must be torch.float32 as hidden", {"weight": BASE.weight.double()}, TypeError),
    ("weight must be (V, 5) as hidden", {"weight": BASE.weight[:, 1:]}, ValueError),
    ("weight must have from 1", {"weight": BASE.weight[:0]}, ValueError),
    ("weight ", {"weight": BASE.weight[:0], "bias": BASE.bias[:0]}, ValueError),
    ("weight ", {"weight": BASE.weight[0]}, ValueError),
    ("weight ", {"weight": BASE.weight.to("meta")}, ValueError),
    ("bias must be (V,) = (20,)", {"bias": BASE.bias[1:]}, ValueError),
    ("bias must be on cpu", {"bias": BASE.bias.to("meta")}, ValueError),
    ("bias ", {"bias": BASE.bias[:, None]}, ValueError),
    ("bias ", {"bias": BASE.bias.half()}, TypeError),
]
LinearCrossEntropy.WRONG = OF_BOTH + [
    ("target must be int32 or int64", {"target": BASE.target.float()}, TypeError),
    ("target must be (T,) = (6,)", {"target": BASE.target[1:]}, ValueError),
    ("target holds 20 at place 2; it must be in [0, 20)", {"target": torch.tensor([0, 1, 20, 0, 1, 2])}, IndexError),
    ("target holds -1 at place 1", {"target": torch.tensor([0, -1, 20, 0, 1, 2])}, IndexError),
    ("target ", {"target": BASE.target[:, None]}, ValueError),
    ("target ", {"target": BASE.target.short()}, TypeError),
    ("target ", {"target": BASE.target.to("meta")}, ValueError),
    ("target ", {"target": (BASE.target - 20).int()}, IndexError),
    ("cu_target must be (T + 1,) = (7,)", {"cu_target": torch.tensor([0, 1, 6])}, ValueError),
    ("cu_target starts at 1", {"cu_target": torch.tensor([1, 1, 2, 3, 4, 5, 6])}, IndexError),
    ("cu_target falls from 2 to 1 at place 2", {"cu_target": torch.tensor([0, 2, 1, 3, 4, 5, 6])}, IndexError),
    ("cu_target ends at 3", {"cu_target": torch.tensor([0, 1, 2, 3, 3, 3, 3])}, IndexError),
    ("cu_target ", {"cu_target": torch.arange(7)[:, None]}, ValueError),
    ("cu_target ", {"cu_target": torch.arange(7.0)}, TypeError),
    ("cu_target ", {"cu_target": torch.arange(7, device="meta")}, ValueError),
    ("keep_bytes must be at least 0", {"keep_bytes": -1}, ValueError),
    ("keep_bytes must be a whole number", {"keep_bytes": 1.5}, TypeError),
    ("keep_bytes ", {"keep_bytes": True}, TypeError),
]
