"""Checks of case_fast.ops.cross_attention, each of any size: the tests run a share of them, the scorecard all.

A check takes the number of cases and a device, returns how many cases it looked at, and raises AssertionError on a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from attention_checks import close_to_truth, gradcheck, kernels, results
from attention_checks import digests as digests_of
from cross_attention_cases import Case, make_case
from helpers import generator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import deterministic, identical, prefilled
from packed_attention_checks import POISON, others, poisoned, ragged, wrong_entry

from case_fast import ops

FAMILY = "cross_attention"


# ------------------------------------------------------------------------------------------------------------ the checks


def check_opcheck(size: int, device: str) -> int:
    """Row 1: torch.library.opcheck of both registered ops."""
    runs, kernel = ops.backend_name(FAMILY, device), kernels(FAMILY)
    made = [
        make_case([3, 5], [[4, 6]], device=device),
        make_case([1, 1, 1], [[4, 6, 2], [0, 3, 0], [1, 1, 1]], device=device),
        make_case([2, 0, 4], [[1, 5, 0]], dropout_p=0.3, output_dropout_p=0.2, seed=5, device=device),
        make_case([4, 2], [[0, 0], [0, 0]], device=device),
        make_case([], [[]], device=device),
        make_case([1] * 6, [[5, 9], [2, 0, 3]], heads=1, dim=3, long=True, device=device),
        make_case([6, 4], [[3, 3]], dtype=torch.float64, device=device),
        make_case([6, 4], [[3, 3], [2, 5]], layout=1, device=device),
    ]
    for case in made[:size]:
        floats = [x for name, x in case.floats().items() if name != "hidden"]
        tensors = (floats, [s.cu_keys for s in case.sources], [s.key_of for s in case.sources])
        numbers = (case.eps, case.dropout_p, case.output_dropout_p, case.seed)
        for keep in (True, False):
            torch.library.opcheck(kernel._forward_op, (runs, case.hidden, case.cu_hidden, *tensors, *numbers, keep))
        saved = kernel._forward_op(runs, case.hidden, case.cu_hidden, *tensors, *numbers, True)[1]
        torch.library.opcheck(kernel._backward_op, (runs, case.grad_out, case.hidden, case.cu_hidden, *tensors, saved, *numbers))
    return 3 * len(made[:size])


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


def check_gradcheck(size: int, device: str) -> int:
    """Row 2: analytic against numerical gradients in float64, with and without dropout."""
    for place, (rows, keys, width, heads, dim, share) in enumerate(SHAPES[:size]):
        # eps above the variance of rows: of one or two columns they would all be normalised to the same, sharply
        case = make_case(rows, keys, width, heads, dim, place, torch.float64, device, share=share, eps=0.1)
        dropout = {"dropout_p": 0.3, "output_dropout_p": 0.2} if place % 3 == 2 else {}
        gradcheck(replace(case, seed=2**40 + place, **dropout))
    return len(SHAPES[:size])


@st.composite
def recipes(draw: Callable, device: str = "cpu") -> dict:
    """Arguments of `make_case`. Values are kept of order 1, as in graph_attention_checks."""
    kinds = [torch.float32] * 4 + [torch.float64, torch.bfloat16] + [torch.float16] * (device != "cpu")
    length = st.one_of(st.integers(0, 6), st.integers(0, 40))
    rows = draw(st.one_of(st.lists(length, max_size=5), st.lists(st.just(1), max_size=20)))
    share, count = draw(st.booleans()), draw(st.integers(1, 3))
    each = st.lists(length, max_size=5) if share else st.lists(length, min_size=len(rows), max_size=len(rows))
    choices = {
        "width": st.integers(4, 40),
        "heads": st.integers(1, 3),
        "dim": st.one_of(st.integers(1, 20), st.just(150)),
        "number": st.integers(0, 2**31),
        "dtype": st.sampled_from(kinds),
        "magnitude": st.sampled_from([0.1, 0.5, 1.0]),
        "layout": st.integers(0, 3),
        "long": st.booleans(),
        "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
        "output_dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
        "seed": st.integers(0, 2**63 - 1),
    }
    found = {"rows": rows, "keys": [draw(each) for _ in range(count)], "share": share, "device": device}
    return found | {name: draw(choice) for name, choice in choices.items()}


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


def check_bad_indices(size: int, device: str) -> int:
    """Row 4: an entry that cannot be is an IndexError that names the argument, before anything is computed; the next good
    call gives the same bits as ever."""
    g = generator(4)
    for number in range(size):
        rows, keys = ragged(g, 1 + number % 7, 9), [ragged(g, 1 + number % 5, 12) for _ in range(1 + number % 3)]
        case = make_case(rows, keys, 3 + number % 9, 1 + number % 2, 1 + number % 9, number, device=device,
                         long=number % 2 == 0, share=True)
        expected = ops.cross_attention(**case.arguments())
        place = number % len(keys)
        source = case.sources[place]
        name = ("cu_hidden", f"sources[{place}].cu_keys", f"sources[{place}].key_of")[number // 2 % 3]
        arguments = case.arguments() | {"validate": True}
        if name == "cu_hidden":
            index, at, bad = wrong_entry(case.cu_hidden, [sum(rows) + 1] * (len(rows) + 1), g)
            arguments["cu_hidden"] = index
        elif name.endswith("cu_keys"):
            index, at, bad = wrong_entry(source.cu_keys, [sum(keys[place]) + 1] * (len(keys[place]) + 1), g)
            arguments["sources"] = [*case.sources[:place], replace(source, cu_keys=index), *case.sources[place + 1 :]]
        else:
            index, at, bad = wrong_entry(source.key_of, [len(keys[place])] * len(rows), g)
            arguments["sources"] = [*case.sources[:place], replace(source, key_of=index), *case.sources[place + 1 :]]
        if number % 5 == 0:
            arguments["hidden"] = case.hidden.clone().requires_grad_()
        try:
            ops.cross_attention(**arguments)
        except IndexError as error:
            assert str(error).startswith(name), f"{name}[{at}] = {bad} gave: {error}"
        else:
            raise AssertionError(f"{name}[{at}] = {bad} was taken")
        assert identical(ops.cross_attention(**case.arguments()), expected)
    return size


def check_nan_isolation(size: int, device: str) -> int:
    """Row 5: NaN or Inf in one sequence's rows or keys leaves outputs and gradients of the others as they were (but for the
    weights' gradients, to which all add), and shows in its own."""
    for number in range(size):
        g = generator(number)
        sequences = 2 + number % 6
        rows, keys = ragged(g, sequences, 9), [ragged(g, sequences, 12) for _ in range(1 + number % 3)]
        case = make_case(rows, keys, 4 + number % 30, 2, 3 + number % 20, number, device=device, dropout_p=0.2 * (number % 2),
                         output_dropout_p=0.1 * (number % 2), seed=number)
        clean = results(case)
        victim = int(torch.randint(sequences, (), generator=g))
        span = slice(int(case.cu_hidden[victim]), int(case.cu_hidden[victim + 1]))
        spans = [slice(int(s.cu_keys[victim]), int(s.cu_keys[victim + 1])) for s in case.sources]
        kind, place = number % 4, number % len(keys)
        name = ("hidden", f"{place}.key", f"{place}.value", "grad_out")[kind]
        if kind == 3:
            broken = replace(case, grad_out=poisoned(case.grad_out, span, number))
        else:
            broken = case.having({name: poisoned(case.floats()[name], spans[place] if kind else span, number)})
        found = results(broken)
        watched = [("out", span, sum(rows)), ("hidden", span, sum(rows))]
        watched += [(f"{i}.{x}", spans[i], sum(keys[i])) for i in range(len(keys)) for x in ("key", "value")]
        for part, rows_, total in watched:
            mask = others(total, rows_, device)
            assert identical(found[part][mask], clean[part][mask]), f"{name} with {POISON[number % 3]} reached others' {part}"
        if kind == 2 and number % 5 and number % 2 == 0 and keys[place][victim] and rows[victim]:
            assert not found["out"][span].isfinite().any(), "NaN or Inf was hidden"
    return size


def varied(device: str) -> list[Case]:
    """Chosen to reach each way through a kernel; the last are the decoder's of the paper's batch, training and decoding."""
    g = generator(16)

    def about(keys: int, sequences: int = 16) -> list[int]:
        return ragged(g, sequences, 2 * keys + 1)

    three = {"width": 300, "dim": 150}
    recipes = [
        {"rows": [3, 7, 0, 1], "keys": [[2, 0, 5, 9]]},
        {"rows": [64, 63], "keys": [[300, 1], [0, 7]], "dim": 150, "width": 33},
        {"rows": [1] * 37, "keys": [[40] * 5, [3, 0, 9]], "share": True, "dim": 16, "heads": 3},
        {"rows": [500], "keys": [[600]], "dim": 7, "heads": 1, "width": 130},
        {"rows": [50, 60], "keys": [[20, 30]] * 2, "dim": 33, "dropout_p": 0.3, "output_dropout_p": 0.2, "seed": 3},
        {"rows": [20, 5], "keys": [[0, 0]]},
        {"rows": [30, 5, 90], "keys": [[4, 9, 80]], "dtype": torch.float64, "long": True},
        {"rows": about(15), "keys": [about(60), about(90), about(40)]} | three,
        {"rows": [1] * 16, "keys": [about(100), about(100), about(100)]} | three,
        {"rows": [5] * 16, "keys": [about(100), about(100), about(100)]} | three,
        {"rows": [1], "keys": [[100], [90], [50]]} | three,
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
