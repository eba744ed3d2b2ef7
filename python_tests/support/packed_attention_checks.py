"""Checks of case_fast.ops.packed_attention, each of any size: the tests run a share of them, the scorecard all.

A check takes the number of cases and a device, returns how many cases it looked at, and raises AssertionError on a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from attention_checks import close_to_truth, gradcheck, kernels, results
from attention_checks import digests as digests_of
from helpers import generator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import deterministic, identical, prefilled
from packed_attention_cases import FLOATS, INDEX, Case, make_case
from torch import Tensor

from case_fast import ops

FAMILY = "packed_attention"


# ------------------------------------------------------------------------------------------------------------ the checks


def check_opcheck(size: int, device: str) -> int:
    """Row 1: torch.library.opcheck of both registered ops."""
    runs, kernel = ops.backend_name(FAMILY, device), kernels(FAMILY)
    made = [
        make_case([3, 5], device=device),
        make_case([3, 1], [4, 6], causal=True, device=device),
        make_case([2, 0, 4], [1, 5, 0], dropout_p=0.3, seed=5, device=device),
        make_case([4, 2], [0, 0], device=device),
        make_case([], [], device=device),
        make_case([1] * 6, [5, 9], share=True, room=True, heads=1, dim=3, long=15, device=device),
        make_case([6, 4], dtype=torch.float64, device=device),
        make_case([6, 4], layout=1, device=device),
    ]
    for case in made[:size]:
        tensors = [getattr(case, name) for name in (*FLOATS, *INDEX)]
        numbers = (case.causal, 0.4, case.dropout_p, case.seed)
        torch.library.opcheck(kernel._forward_op, (runs, *tensors, *numbers))
        out, lse = kernel._forward_op(runs, *tensors, *numbers)
        torch.library.opcheck(kernel._backward_op, (runs, case.grad_out, *tensors, out, lse, *numbers))
    return 2 * len(made[:size])


SHAPES = [  # rows, keys, heads, dim, the rest
    ([1], [1], 1, 1, {}), ([1], [7], 2, 3, {}), ([3], [3], 1, 2, {"causal": True}), ([2, 3], [2, 3], 2, 2, {"causal": True}),
    ([2, 4], [5, 1], 1, 3, {}), ([4, 2], [2, 5], 2, 2, {"causal": True}), ([3, 0, 2], [0, 4, 3], 1, 3, {}),
    ([0], [0], 2, 3, {}), ([], [], 1, 2, {}), ([5], [0], 1, 2, {}), ([1, 1, 1], [4], 2, 2, {"share": True}),
    ([1, 2, 1], [3, 5], 1, 3, {"share": True, "room": True}), ([1, 1], [6, 4, 3], 2, 2, {"room": True, "causal": True}),
    ([7, 1, 3], [7, 1, 3], 1, 2, {}), ([11], [13], 1, 1, {}), ([2, 2, 2, 2], [1, 2, 3, 4], 3, 1, {}),
    ([4], [6], 1, 17, {}), ([2], [3], 1, 33, {"causal": True}), ([5, 5], [9, 1], 2, 2, {"scale": 0.0}),
    ([3, 4], [4, 3], 2, 3, {"scale": 1.5}), ([1, 9], [9, 1], 1, 3, {"causal": True}), ([0, 0, 3], [2, 2, 2], 1, 2, {}),
]


def check_gradcheck(size: int, device: str) -> int:
    """Row 2: analytic against numerical gradients in float64, with and without dropout."""
    for place, (rows, keys, heads, dim, more) in enumerate(SHAPES[:size]):
        case = make_case(rows, keys, heads, dim, place, torch.float64, device, **more)
        if case.key_length is not None:  # numerical gradients move the room as well
            case = replace(case, key=case.key.nan_to_num(), value=case.value.nan_to_num())
        gradcheck(replace(case, dropout_p=0.3 * (place % 3 == 2), seed=2**40 + place))
    return len(SHAPES[:size])


@st.composite
def recipes(draw: Callable, device: str = "cpu") -> dict:
    """Arguments of `make_case`. Values are kept of order 1, as in graph_attention_checks."""
    kinds = [torch.float32] * 4 + [torch.float64, torch.bfloat16] + [torch.float16] * (device != "cpu")
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
        "number": st.integers(0, 2**31),
        "dtype": st.sampled_from(kinds),
        "magnitude": st.sampled_from([0.1, 0.5, 1.0]),
        "layout": st.integers(0, 3),
        "long": st.integers(0, 15),
        "room": st.booleans(),
        "causal": st.booleans(),
        "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
        "seed": st.integers(0, 2**63 - 1),
    }
    found = {"rows": rows, "keys": keys, "share": share, "device": device}
    found |= {name: draw(choice) for name, choice in choices.items()}
    found["scale"] = draw(st.sampled_from([None, 0.0, 0.5 * found["dim"] ** -0.5, 1.5 * found["dim"] ** -0.5]))
    return found


def check_fuzz(size: int, device: str) -> int:
    """Row 3: output and all gradients against float64, on whatever hypothesis thinks of."""
    seen = 0

    @settings(max_examples=size, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(recipes(device))
    def compare(recipe: dict) -> None:
        nonlocal seen
        seen += 1
        close_to_truth(make_case(**recipe))

    compare()
    return seen


def wrong_entry(index: Tensor, least: list[int], g: torch.Generator) -> tuple[Tensor, int, int]:
    """A copy with one entry that cannot be, its place and what it is now. least: of each place, the smallest too large."""
    index = index.clone()
    place = int(torch.randint(index.numel(), (), generator=g))
    if index.dtype == torch.int64:
        good = int(index[place])  # 2^32 + i would be i in 32 bits
        bad = [-(2**63), -(2**32), -1, 2**31, 2**32, 2**40, 2**63 - 1, 2**32 + good, good - 2**32, least[place]]
    else:
        bad = [-(2**31), -1, 2**31 - 1, least[place]]
    chosen = bad[int(torch.randint(len(bad), (), generator=g))]
    index[place] = chosen
    return index, place, chosen


def ragged(g: torch.Generator, sequences: int, most: int) -> list[int]:
    return torch.randint(most, (sequences,), generator=g).tolist()


def check_bad_indices(size: int, device: str) -> int:
    """Row 4: an entry that cannot be is an IndexError that names the argument, before anything is computed; the next good
    call gives the same bits as ever."""
    g = generator(4)
    for number in range(size):
        rows, keys = ragged(g, 1 + number % 7, 9), ragged(g, 1 + number % 5, 12)
        case = make_case(rows, keys, 1 + number % 2, 1 + number % 9, number, device=device, long=15 * (number % 2), share=True,
                         room=True, causal=number % 3 == 0)
        expected = ops.packed_attention(**case.arguments())
        name = INDEX[number % 4]
        limit = {"cu_query": [sum(rows) + 1] * (len(rows) + 1), "cu_key": [sum(keys) + 1] * (len(keys) + 1),
                 "key_of": [len(keys)] * len(rows), "key_length": [m + 1 for m in keys]}
        index, place, bad = wrong_entry(getattr(case, name), limit[name], g)
        broken = case.arguments() | {name: index, "validate": True}
        if number % 5 == 0:
            broken |= {leaf: x.clone().requires_grad_() for leaf, x in case.floats().items()}
        try:
            ops.packed_attention(**broken)
        except IndexError as error:
            assert str(error).startswith(name), f"{name}[{place}] = {bad} gave: {error}"
        else:
            raise AssertionError(f"{name}[{place}] = {bad} was taken")
        assert identical(ops.packed_attention(**case.arguments()), expected)
    return size


POISON = (torch.nan, torch.inf, -torch.inf)


def poisoned(x: Tensor, rows: slice, number: int) -> Tensor:
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


def check_nan_isolation(size: int, device: str) -> int:
    """Row 5: NaN or Inf in one sequence leaves outputs and gradients of the others as they were, and shows in its own."""
    for number in range(size):
        g = generator(number)
        rows, keys = ragged(g, 2 + number % 6, 9), ragged(g, 2 + number % 6, 12)
        causal = number % 4 == 3
        case = make_case(rows, keys, 2, 3 + number % 20, number, device=device, causal=causal, dropout_p=0.2 * (number % 2),
                         seed=number)
        clean = results(case)
        victim = int(torch.randint(len(rows), (), generator=g))
        spans = {name: slice(int(cu[victim]), int(cu[victim + 1])) for name, cu in (("q", case.cu_query), ("k", case.cu_key))}
        name = ("query", "key", "value", "grad_out")[number % 4]
        span = spans["k" if name in ("key", "value") else "q"]
        found = results(replace(case, **{name: poisoned(getattr(case, name), span, number)}))
        for field, kind, total in (("out", "q", sum(rows)), ("query", "q", sum(rows)), ("key", "k", sum(keys)),
                                   ("value", "k", sum(keys))):
            mask = others(total, spans[kind], device)
            assert identical(found[field][mask], clean[field][mask]), f"{name} with {POISON[number % 3]} reached others' {field}"
        if name == "value" and number % 5 and number % 2 == 0 and keys[victim] and rows[victim] and not causal:
            assert not found["out"][spans["q"]].isfinite().any(), "NaN or Inf was hidden"
    return size


def varied(device: str) -> list[Case]:
    """Chosen to reach each way through a kernel; the last are the encoders' and the decoder's of the paper's batch."""
    g = generator(16)
    contexts, replies, texts = ragged(g, 16, 120), ragged(g, 16, 30), ragged(g, 500, 8)
    recipes = [
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
    return [make_case(number=place, device=device, **recipe) for place, recipe in enumerate(recipes)]


def digests(device: str) -> list[str]:
    return digests_of(varied(device))


def check_prefilled(size: int, device: str) -> int:
    return prefilled(__name__, kernels(FAMILY), size, device)


def check_determinism(size: int, device: str) -> int:
    return deterministic(digests, size, device)


CHECKS: dict[int, tuple[Callable[[int, str], int], int]] = {  # row of the scorecard: check, full size
    1: (check_opcheck, 8),
    2: (check_gradcheck, len(SHAPES)),
    3: (check_fuzz, 10_000),
    4: (check_bad_indices, 1_000),
    5: (check_nan_isolation, 500),
    6: (check_prefilled, 3),
    11: (check_determinism, 10),
}
