"""One call of an op: its arguments, its results and gradients, its plain form, and the rule that joins them. Needs only torch.

The families of ops, each a subclass of `Case`, are in op_cases/; what is checked of all of them alike is in op_checks.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from case_fast import ops
from case_fast.ops.common import seed_pair

HALF = (torch.float16, torch.bfloat16)
POISON = (torch.nan, torch.inf, -torch.inf)


class Damaged(NamedTuple):
    """A call that is right, and the same with one entry of an index that names nothing."""

    case: Case
    argument: str
    broken: Case
    said: str


class Poisoned(NamedTuple):
    """A call, and the same with NaN or infinities in some of its rows: where in its results they must not and must show."""

    clean: Case
    broken: Case
    poison: float
    said: str
    kept: dict[str, Tensor]  # of a result, a mask of the rows whose bits stay
    shown: dict[str, Tensor]  # of a result, a mask of the rows that are not finite; for NaN, all NaN
    equal: dict[str, int] = {}  # what a result is, everywhere


class Case:
    """One call's arguments by name, and the gradients of its results. Each family is a frozen dataclass of these, with the
    recipes, arguments of its `made`, that the checks take."""

    family: ClassVar[str]
    op: ClassVar[Callable]  # takes `arguments()`; a Tensor, or one for each of OUTPUTS
    public: ClassVar[Callable]  # the op by the family's name, where that is another function; takes the same
    plain: ClassVar[Callable]  # the equation, called as the op
    FLOATS: ClassVar[tuple[str, ...]]
    OUTPUTS: ClassVar[tuple[str, ...]] = ("out",)
    GRADIENTS: ClassVar[dict[str, str]] = {"out": "grad_out"}  # of each result that has one, the field that holds it
    SUMS: ClassVar[bool] = False  # whether results are float32, or float64 of float64, whatever the inputs
    LINEAR: ClassVar[bool] = False  # whether gradients need no input, and have derivatives of their own on every backend
    NATIVE: ClassVar[tuple[str, ...]] = ()  # native functions besides the family's own

    SMALL: ClassVar[list[dict]]
    OPCHECK: ClassVar[list[dict]]  # row 1
    GRADCHECK: ClassVar[list[dict]]  # row 2
    VARIED: ClassVar[list[dict]]  # rows 6 and 11: chosen to reach each way through a kernel
    AVERAGE: ClassVar[list[tuple[dict, int, float, float]]]  # recipe, cases, most error of results and gradients over plain's
    DRAWN: ClassVar[list[dict]]  # with dropout or negatives, whose draws a seed decides
    STATUSES: ClassVar[list[tuple[int, str]]]  # of the kernel for a wrong index, and what is said; none where there is no index
    COMPILED: ClassVar[list[tuple[str, str, bool | None, list[dict]]]]  # backend, compiler, dynamic, calls of one function
    ON_GPU: ClassVar[dict[str, dict]]  # by name; the first three are replayed from CUDA graphs
    VARIANTS: ClassVar[list[dict]] = [{}]  # what each of those is run with
    WRONG: ClassVar[list[tuple[str, dict, type[Exception]]]]  # what a message begins with, changes of BASE, error
    BASE: ClassVar[Case]

    def __init_subclass__(cls) -> None:
        cls.public = vars(cls).get("public", vars(cls)["op"])

    @classmethod
    def made(cls, *, number: int, dtype: torch.dtype, device: str, magnitude: float, layout: int) -> Self:
        """Random arguments, the ``number``-th. layout: strides, as `strided` has them. A family says the rest."""
        raise NotImplementedError

    @classmethod
    def recipe(cls, draw: Callable, st: ModuleType) -> dict:
        """What `made` takes besides, drawn from ``st``, hypothesis.strategies. Row 3."""
        raise NotImplementedError

    @classmethod
    def damaged(cls, number: int, g: torch.Generator, device: str) -> Damaged:
        """Row 4, of an op with an index."""
        raise NotImplementedError

    @classmethod
    def poisoned(cls, number: int, g: torch.Generator, device: str) -> Poisoned:
        """Row 5."""
        raise NotImplementedError

    def registered(self, runs: str) -> Iterator[tuple[Callable, tuple]]:
        """The registered ops that a backend runs, with arguments for each."""
        raise NotImplementedError

    @classmethod
    def kernels(cls) -> ModuleType:
        """The module of the op; `ops.graph_attention` is the function."""
        return importlib.import_module(f"case_fast.ops.{cls.family}")

    @classmethod
    def native_calls(cls) -> tuple[str, ...]:
        """The native functions that `results` calls, each once: forward, backward where there is one, and others."""
        return f"{cls.family}_forward", f"{cls.family}_backward", *cls.NATIVE

    @classmethod
    def runs(cls, device: str) -> list[Callable[[], dict[str, Tensor]]]:
        """What rows 6 and 11 run. Off the CPU, Triton would compile for seconds for each float64."""
        slow = device != "cpu" and ops.backend_name(cls.family, device) == "triton"
        recipes = [recipe for recipe in cls.VARIED if not (slow and recipe.get("dtype") == torch.float64)]
        return [cls.made(number=place, device=device, **recipe).results for place, recipe in enumerate(recipes)]

    def arguments(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in self.GRADIENTS.values()}

    def floats(self) -> dict[str, Tensor]:
        """What has a gradient, by name."""
        return {name: getattr(self, name) for name in self.FLOATS if getattr(self, name) is not None}

    def gradients(self) -> dict[str, Tensor]:
        return {name: getattr(self, field) for name, field in self.GRADIENTS.items()}

    def having(self, floats: dict[str, Tensor]) -> Self:
        """With these floats in place of its own."""
        return replace(self, **floats)

    def to(self, dtype: torch.dtype) -> Self:
        changed = self.having({name: x.to(dtype) for name, x in self.floats().items()})
        kind = full(dtype) if self.SUMS else dtype
        return replace(changed, **{self.GRADIENTS[name]: x.to(kind) for name, x in self.gradients().items()})

    def seeds(self) -> tuple[int, Tensor | None]:
        """As the registered ops take the seed."""
        return seed_pair(self.seed, next(iter(self.floats().values())).device)

    def seeded_by_tensor(self, seed: int | None = None, shape: tuple[int, ...] = ()) -> Self:
        """The same call with its seed, or another, in a tensor."""
        number = self.seed if seed is None else seed
        return replace(self, seed=torch.full(shape, number, device=next(iter(self.floats().values())).device))

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.floats().values())).dtype

    def kind(self, name: str) -> torch.dtype:
        """The dtype that a result must have."""
        return full(self.dtype) if self.SUMS and not name.startswith("grad_") else self.dtype

    def call(self, function: Callable | None = None) -> dict[str, Tensor]:
        """The results of the op, or of another function that is called as it, by name."""
        found = (function or self.op)(**self.arguments())
        return dict(zip(self.OUTPUTS, found if isinstance(found, tuple) else (found,), strict=True))

    def results(self, function: Callable | None = None, autocast: bool = False) -> dict[str, Tensor]:
        """As `call`, and the gradient of every float; forward under autocast, or not."""
        leaves = {name: x.detach().requires_grad_() for name, x in self.floats().items()}
        with torch.autocast(next(iter(leaves.values())).device.type, torch.bfloat16, enabled=autocast):
            outputs = self.having(leaves).call(function)
        gradients = self.gradients()
        assert not any(x.requires_grad for name, x in outputs.items() if name not in gradients)
        found = derivatives([outputs[name] for name in gradients], list(leaves.values()), list(gradients.values()))
        outputs = {name: x.detach() for name, x in outputs.items()}
        return outputs | {f"grad_{name}": x for name, x in zip(leaves, found, strict=True)}

    def differentiable(self, floats: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The results that have a gradient, as a function of these floats."""
        found = self.having(floats).call()
        return tuple(found[name] for name in self.GRADIENTS)

    def has_gradient(self) -> bool:
        """False where every gradient is exactly 0."""
        return any(x.numel() for x in self.gradients().values())

    def compared(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results as the rule takes them, that of other dtypes as numbers whose error can be told."""
        return found

    def close_to_truth(self) -> float:
        """The house's rule for results and gradients; returns the largest share of the allowed error."""
        found, plain = self.results(), self.results(self.plain)
        for name, x in found.items():
            assert x.dtype == self.kind(name), f"{name} is {x.dtype}"
        truth = self.to(torch.float64).results(self.plain)
        found, plain, truth = (self.compared(x) for x in (found, plain, truth))
        return max(within(name, found[name], plain[name], true, self.dtype) for name, true in truth.items())

    def gradcheck(self) -> None:
        """Analytic against numerical gradients, in float64; plain torch's own along one random direction alone."""
        # room that is not read may be NaN; a numerical gradient would move it as well
        leaves = {name: x.detach().masked_fill(x.isnan(), 0).requires_grad_() for name, x in self.floats().items()}

        def call(*leaves_: Tensor) -> tuple[Tensor, ...]:
            return self.differentiable(dict(zip(leaves, leaves_, strict=True)))

        if any(x.numel() for x in self.gradients().values()):
            on_reference = ops.backend_name(self.family, next(iter(leaves.values())).device) == "reference"
            assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=on_reference)
        outputs = call(*leaves.values())
        found = derivatives(outputs, list(leaves.values()), [torch.ones_like(x) for x in outputs])
        assert all(x.shape == leaf.shape and x.isfinite().all() for x, leaf in zip(found, leaves.values(), strict=True))
        assert self.has_gradient() or not any(x.any() for x in found)


def derivatives(outputs: Sequence[Tensor], leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """As torch.autograd.grad; also of outputs that depend on nothing, as those of an equation without terms."""
    joined = [(x, gradient) for x, gradient in zip(outputs, gradients, strict=True) if x.requires_grad]
    if not joined:
        return [torch.zeros_like(x) for x in leaves]
    outputs, gradients = zip(*joined, strict=True)
    return torch.autograd.grad(outputs, leaves, gradients, allow_unused=True, materialize_grads=True)


def full(dtype: torch.dtype) -> torch.dtype:
    """What sums over this dtype are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def within(name: str, ours: Tensor, plain: Tensor, true: Tensor, dtype: torch.dtype) -> float:
    """The house's rule: at most twice plain torch's own error and 1e-5, in float64 1e-11 of the largest number; returns the
    share of the allowed error."""
    assert ours.shape == true.shape, name
    if not true.numel():
        return 0.0
    floor = 1e-11 if dtype == torch.float64 else 1e-5
    # an infinity less itself is NaN
    error, theirs = ((x.double() - true).masked_fill(x == true, 0).abs().max().item() for x in (ours, plain))
    if dtype == torch.float64:
        theirs = floor * true.masked_fill(true.isinf(), 0).abs().max().item()
    assert error <= 2 * theirs + floor, f"{name}: error {error:.3g}, plain torch's {theirs:.3g}"
    return error / (2 * theirs + floor)


WRONG_SEEDS = [
    ("seed must be in [0, 2^63)", {"seed": -1}, ValueError),
    ("seed must be in [0, 2^63)", {"seed": 2**63}, ValueError),
    ("seed must be a whole number or an int64 tensor", {"seed": 0.5}, TypeError),
    ("seed must be a whole number or an int64 tensor", {"seed": torch.tensor(1.5)}, TypeError),
    ("seed must be a whole number or an int64 tensor", {"seed": torch.tensor(1, dtype=torch.int32)}, TypeError),
    ("seed must be one number", {"seed": torch.tensor([1, 2])}, ValueError),
    ("seed must be one number", {"seed": torch.tensor([[1]])}, ValueError),
    ("seed must be one number", {"seed": torch.zeros(0, dtype=torch.int64)}, ValueError),
    ("seed must be on cpu", {"seed": torch.tensor(1, device="meta")}, ValueError),
]


# ---- random arguments


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged(g: torch.Generator, sequences: int, most: int) -> list[int]:
    """So many lengths below ``most``."""
    return torch.randint(most, (sequences,), generator=g).tolist()


def chooser(g: torch.Generator) -> Callable:
    """A function that returns one of its arguments."""
    return partial(_chosen, g)


def _chosen(g: torch.Generator, *choices: object) -> object:
    return choices[int(torch.randint(len(choices), (), generator=g))]


def strided(x: Tensor, layout: int) -> Tensor:
    """The same values in memory laid out otherwise, between NaN or -7. Layout 0 leaves them as they are; then, and so on in
    turn: rows apart, dimensions the other way round, columns apart, the first two dimensions exchanged, all elements apart."""
    if layout == 0 or x.dim() == 1 and layout % 2 == 0:
        return x
    hole = torch.full_like(x, torch.nan if x.is_floating_point() else -7)
    if x.dim() == 1 or layout % 5 == 0:
        return torch.stack([x, hole], dim=-1)[..., 0]
    if layout % 5 == 1:
        return torch.stack([hole, x, hole], dim=1)[:, 1]
    if layout % 5 == 3:
        return torch.cat([hole, x], dim=-1)[..., x.shape[-1] :]
    other = -1 if layout % 5 == 2 else 1
    return x.transpose(0, other).contiguous().transpose(0, other)


def offsets(lengths: Sequence[int], long: bool, layout: int, device: str) -> Tensor:
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return strided(cu if long else cu.int(), layout).to(device)


# ---- damage


def wrong_entry(index: Tensor, least: Sequence[int], g: torch.Generator) -> tuple[Tensor, str]:
    """A copy with one entry that cannot be, and what it is. least: of each place, the smallest above 0 that is too large."""
    index = index.clone()
    place = int(torch.randint(index.numel(), (), generator=g))
    good, limit = int(index[place]), least[place]
    bad = [-(2**31), -1, -limit, limit, limit + 1, 2**31 - 1]
    if index.dtype == torch.int64:  # 2^32 + i would be i in 32 bits
        bad += [-(2**63), -(2**32), 2**31, 2**32, 2**40, 2**63 - 1, 2**32 + good, good - 2**32]
    chosen = int(_chosen(g, *bad))
    index[place] = chosen
    return index, f"[{place}] = {chosen}"


def spoiled(x: Tensor, rows: slice, number: int) -> Tensor:
    """A copy whose ``rows``, or every fifth time one entry of them, are NaN or infinite."""
    x = x.clone()
    if number % 5:
        x[rows] = POISON[number % 3]
    elif rows.stop > rows.start:
        x[rows.start].view(-1)[0] = POISON[number % 3]
    return x


def others(total: int, rows: slice, device: str) -> Tensor:
    mask = torch.ones(total, dtype=torch.bool, device=device)
    mask[rows] = False
    return mask
