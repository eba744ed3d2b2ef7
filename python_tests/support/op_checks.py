"""The scorecard's rows, said once for every family of ops: the tests run a share of each, `python -m python_tests.scorecard` all.

A check takes a family, the number of cases and a device, returns how many cases it looked at, and raises AssertionError on a
failure.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from op_case import Case, generator
from torch import Tensor

from case_fast import ops
from case_fast.ops import backend

Family = type[Case]


def check_opcheck(family: Family, size: int, device: str) -> int:
    """Row 1: torch.library.opcheck of the registered ops, with a number for a seed, and where one is given with a tensor."""
    runs, seen = ops.backend_name(family.family, device), 0
    assert runs != "reference", "the registered ops call kernels, and there is none here"
    for recipe in family.OPCHECK[:size]:
        case = family.made(device=device, **recipe)
        for given in [case, case.seeded_by_tensor()] if "seed" in recipe else [case]:
            for op, arguments in given.registered(runs):
                torch.library.opcheck(op, arguments)
                seen += 1
    return seen


def check_gradcheck(family: Family, size: int, device: str) -> int:
    """Row 2: analytic against numerical gradients in float64."""
    recipes = family.GRADCHECK[:size]
    for recipe in recipes:
        family.made(dtype=torch.float64, device=device, **recipe).gradcheck()
    return len(recipes)


def check_fuzz(family: Family, size: int, device: str) -> int:
    """Row 3: results and all gradients against float64, on whatever hypothesis thinks of. Values are kept of order 1: with
    scores in the tens, one rounding of one score is above the rule's 1e-5, and which of two equally good sums it hits is luck;
    `mean_errors` compares those on average."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    kinds = [torch.float32] * 4 + [torch.float64, torch.bfloat16] + [torch.float16] * (device != "cpu")
    seen = 0

    @st.composite
    def recipes(draw: Callable) -> dict:
        alike = {"number": st.integers(0, 2**31), "dtype": st.sampled_from(kinds), "layout": st.integers(0, 5),
                 "magnitude": st.sampled_from([0.1, 0.5, 1.0])}
        return family.recipe(draw, st) | {name: draw(choice) for name, choice in alike.items()}

    @settings(max_examples=size, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(recipes())
    def compare(recipe: dict) -> None:
        nonlocal seen
        seen += 1
        family.made(device=device, **recipe).close_to_truth()

    compare()
    return seen


def check_bad_indices(family: Family, size: int, device: str) -> int:
    """Row 4: an entry that names nothing is an IndexError that names its argument, before anything is computed; the next good
    call gives the same bits as ever."""
    g = generator(4)
    for number in range(size):
        case, name, broken, said = family.damaged(number, g, device)
        expected = case.call()
        if number % 5 == 0:
            broken = broken.having({leaf: x.clone().requires_grad_() for leaf, x in broken.floats().items()})
        try:
            family.public(**broken.arguments(), validate=True)
        except IndexError as error:
            assert str(error).startswith(f"{name} "), f"{name}{said} gave: {error}"
        else:
            raise AssertionError(f"{name}{said} was taken")
        assert all(identical(x, expected[key]) for key, x in case.call().items())
    return size


def check_nan_isolation(family: Family, size: int, device: str) -> int:
    """Row 5: NaN or infinities in some rows leave the bits of results and gradients of the others, and show in their own."""
    for number in range(size):
        clean, broken, poison, said, kept, shown, equal = family.poisoned(number, generator(number), device)
        said = f"number {number}: {poison} in {said}"
        before, found = clean.results(), broken.results()
        for name, mask in kept.items():
            assert identical(found[name][mask], before[name][mask]), f"{said} reached others' {name}"
        for name, mask in shown.items():
            x = found[name][mask]
            assert (x.isnan() if poison != poison else ~x.isfinite()).all(), f"{said} was hidden from {name}"
        for name, value in equal.items():
            assert (found[name] == value).all(), f"{said} was hidden from {name}"
    return size


def check_prefilled(family: Family, size: int, device: str) -> int:
    """Row 6: outputs full of NaN, and on CPU the kernels' own memory full of 0xFE bytes (glibc's MALLOC_PERTURB_): the same
    bits."""
    clean = digests(family, device)
    with nan_filled() as asked:
        for _ in range(size):
            assert digests(family, device) == clean
    assert asked["empty"] + asked["new_empty"] >= size  # what forward gives or keeps
    assert sum(asked.values()) >= min(2, len(family.native_calls())) * size * len(clean)  # and gradients of our kernels
    if device == "cpu" and sys.platform == "linux":
        assert digests_in_used_memory()[family.family] == clean, "a workspace is read before it is written"
    return (size + 1) * len(clean)


@cache
def digests_in_used_memory() -> dict[str, list[str]]:
    """Of all families on CPU, in a process of their own in which malloc hands out memory full of 0xFE bytes."""
    here = Path(__file__).resolve().parent
    code = ("import json, op_cases, op_checks, torch; torch.set_num_threads(1); "
            "print(json.dumps({name: op_checks.digests(family, 'cpu') for name, family in op_cases.FAMILIES.items()}))")
    environment = os.environ | {"MALLOC_PERTURB_": "1", "MALLOC_MMAP_MAX_": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def by_threads(call: Callable[[], Any], counts: Sequence[int] = (1, 2, 3, 7)) -> list[Any]:
    """What ``call`` gives with so many threads of torch, each number in turn; the caller's own number after."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    return found


def check_determinism(family: Family, size: int, device: str) -> int:
    """Row 11: `size` runs, each by 1, 2 and 3 threads on CPU, give one sha256 a case."""
    counts = (1, 2, 3) if device == "cpu" else (torch.get_num_threads(),)
    expected, seen = digests(family, device), 0
    for _ in range(size):
        for count, found in zip(counts, by_threads(lambda: digests(family, device), counts), strict=True):
            assert found == expected, f"{count} threads"
            seen += len(expected)
    return seen


ROWS = {1: check_opcheck, 2: check_gradcheck, 3: check_fuzz, 4: check_bad_indices, 5: check_nan_isolation, 6: check_prefilled,
        11: check_determinism}


def full_size(family: Family, row: int) -> int:
    """The cases of a row of the scorecard; of row 4 none where an op has no index."""
    indexed = 1_000 if family.STATUSES else 0
    return {1: len(family.OPCHECK), 2: len(family.GRADCHECK), 3: 10_000, 4: indexed, 5: 500, 6: 3, 11: 10}[row]


# ---- what checks and tests look with


def identical(a: Tensor, b: Tensor) -> bool:
    """The same bits, NaN's included."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = kinds[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def digest(found: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for x in found.values():
        sha.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def digests(family: Family, device: str) -> list[str]:
    return [digest(run()) for run in family.runs(device)]


def mean_errors(made: Callable[[int], Case], number: int) -> dict[str, float]:
    """Root mean square error over `number` cases, of results and gradients, over plain torch's."""
    ours, theirs = Counter(), Counter()
    for place in range(number):
        case = made(place)
        found, plain = case.results(), case.results(case.plain)
        for name, true in case.to(torch.float64).results(case.plain).items():
            if true.is_floating_point():
                ours[name] += (found[name].double() - true).square().mean().item()
                theirs[name] += (plain[name].double() - true).square().mean().item()
    return {name: (ours[name] / theirs[name]) ** 0.5 for name in ours if ours[name]}


@contextmanager
def counted(family: Family) -> Iterator[Counter]:
    """How often each native function of a family is called within; nothing where there is no native module."""
    calls: Counter = Counter()
    native, own = getattr(backend, "native", None), (f"{family.family}_", *family.NATIVE)
    originals = {name: getattr(native, name) for name in dir(native) if name.startswith(own)}

    def counting(name: str) -> Callable:
        def call(*arguments: object) -> object:
            calls[name] += 1
            return originals[name](*arguments)

        return call

    try:
        for name in originals:
            setattr(native, name, counting(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(native, name, original)


@contextmanager
def nan_filled() -> Iterator[Counter]:
    """Memory that torch.empty and its like hand out is full of NaN, of integers full of -7, of bytes full of 0xFE: outputs,
    gradients, what is kept and workspaces. Gives how often each was asked."""
    asked: Counter = Counter()

    def filled(name: str, make: Callable) -> Callable:
        def made(*arguments: object, **named: object) -> Tensor:
            asked[name] += 1
            x = make(*arguments, **named)
            return x.fill_(torch.nan if x.is_floating_point() else 0xFE if x.dtype == torch.uint8 else -7)

        return made

    with ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patches.enter_context(mock.patch.object(owner, name, filled(name, getattr(owner, name))))
        yield asked
