"""cross_attention alone; what all ops have in common is in test_families.py."""

from __future__ import annotations

from dataclasses import replace
from operator import methodcaller

import pytest
import torch
from helpers import close
from op_cases.cross_attention import CrossAttention
from op_checks import counted, identical
from torch.utils._python_dispatch import TorchDispatchMode

from case_fast import equations, ops
from case_fast.ops import Source, cross_attention

FAMILY, make_case, kernels = CrossAttention, CrossAttention.made, methodcaller("kernels")


# ---- one call for training and for decoding


def test_a_row_alone_gives_what_it_gives_among_others(native):
    """One-token steps and whole replies are the same rows; a row depends on its own sequence alone."""
    case = make_case([7, 4, 9], [[30, 0, 12], [5, 60, 8]], width=300, dim=150)
    whole = cross_attention(**case.arguments())
    row = 0
    for sequence, rows in enumerate((7, 4, 9)):
        of = torch.full((rows,), sequence)
        alone = [replace(s, key_of=of) for s in case.sources]
        step = cross_attention(case.hidden[row : row + rows], torch.arange(rows + 1), alone)
        assert close(step, whole[row : row + rows], 1e-5)
        row += rows


def test_beams_share_their_keys_without_a_copy(native):
    case = make_case([5, 5], [[40, 30]], width=20)
    with counted(FAMILY) as calls:
        found = cross_attention(**case.arguments())
    (s,) = case.sources
    key, value = (torch.cat([x[:40]] * 5 + [x[40:]] * 5) for x in (s.key, s.value))
    copied = [replace(s, key=key, value=value, cu_keys=torch.tensor([0, *[40] * 5, *[30] * 5]).cumsum(0))]
    assert calls["cross_attention_forward"] == 1
    assert close(found, cross_attention(case.hidden, torch.arange(11), copied), 1e-6)


def test_sources_of_different_heads_run_on_the_reference(native):
    case = make_case([3, 2], [[4, 6]], heads=2, dim=3)
    other = make_case([3, 2], [[5, 1]], heads=3, dim=2, number=1)
    with counted(FAMILY) as calls:
        found = cross_attention(case.hidden, case.cu_hidden, [*case.sources, *other.sources])
    assert not calls
    assert close(found, equations.cross_attention(case.hidden, case.cu_hidden, [*case.sources, *other.sources]), 1e-6)


def test_what_is_kept_is_as_large_as_the_kernel_says(native):
    for rows, width, heads, dim, sources in ((7, 5, 2, 3, 1), (0, 4, 1, 2, 3), (13, 300, 2, 150, 3)):
        case = make_case([rows], [[4]] * sources, width=width, heads=heads, dim=dim)
        floats, *_ = case.lists()
        size = kernels(FAMILY)._outputs(case.hidden, floats, True)[1].numel()
        assert size == native.cross_attention_saved(1, rows, sources, width, heads, dim)
        assert kernels(FAMILY)._outputs(case.hidden, floats, False)[1].numel() == 0


# ---- dtypes, torch.compile


def test_compiled_code_takes_a_tensor_in_several_places(native):
    torch._dynamo.reset()
    compiled = torch.compile(cross_attention, fullgraph=True)
    case = make_case([3, 4], [[2, 9], [0, 3]])
    first = case.sources[0]
    shared = [replace(s, cu_keys=first.cu_keys, key=first.key, value=first.key) for s in case.sources]
    arguments = case.arguments() | {"sources": shared, "hidden": case.hidden.clone().requires_grad_()}
    with counted(FAMILY) as calls:
        out = compiled(**arguments)
    assert calls["cross_attention_forward"] == 1 and torch.equal(out, cross_attention(**arguments))
    with pytest.raises(IndexError, match="^cu_hidden falls from 9 to 7 at place 2"):
        compiled(**(arguments | {"cu_hidden": torch.tensor([0, 9, 7])}))


# ---- steps with sources that earlier calls know


@pytest.fixture(params=[{}, {"share": True, "long": True, "dtype": torch.float64}], ids=["", "shared"])
def steps(native, monkeypatch, request):
    """A case whose sources are known, and the results of the calls that may go the short way."""
    case, short, step = make_case([1, 2, 1], [[5, 0, 3], [2, 9, 1]], **request.param), [], kernels(FAMILY)._step

    def counted_step(*arguments):
        short.append(step(*arguments))
        return short[-1]

    monkeypatch.setattr(kernels(FAMILY), "_step", counted_step)
    with torch.no_grad():
        for _ in range(3):
            cross_attention(**case.arguments())
        assert [x is None for x in short] == [True, True, False]
        short.clear()
        yield case, short


def test_a_step_with_known_sources_gives_what_they_hold_now(steps):
    case, short = steps
    for change in (lambda x: x.mul_(1.5), lambda x: setattr(x, "data", x * 2), lambda x: x.set_(x * 0.5)):
        for x in case.floats().values():
            change(x)
            expected = cross_attention(**replace(case, sources=[replace(s) for s in case.sources]).arguments())
            short.clear()
            assert torch.equal(cross_attention(**case.arguments()), expected)
            assert torch.equal(cross_attention(**case.arguments()), expected)
            assert short[1] is not None  # the first may have found tensors that lie elsewhere now


def test_a_step_may_have_other_rows_and_other_sources(steps):
    case, short = steps
    other = make_case([2, 2, 3], [[1, 2, 3]], number=1, long=case.cu_hidden.dtype == torch.int64, dtype=case.hidden.dtype)
    for sources in (case.sources, case.sources[:1], [*case.sources, *other.sources], case.sources[::-1]):
        changed = replace(case, hidden=other.hidden, cu_hidden=other.cu_hidden, sources=sources)
        expected = cross_attention(**replace(changed, sources=[replace(s) for s in sources]).arguments())
        assert torch.equal(cross_attention(**changed.arguments()), expected)
    assert sum(x is not None for x in short) == 3


@pytest.mark.parametrize("change, error", [
    (lambda a: {"hidden": a["hidden"].int()}, TypeError), (lambda a: {"hidden": a["hidden"][0]}, ValueError),
    (lambda a: {"hidden": a["hidden"][:, :-1].contiguous()}, ValueError), (lambda a: {"sources": []}, ValueError),
    (lambda a: {"cu_hidden": a["cu_hidden"][:-1]}, ValueError), (lambda a: {"cu_hidden": a["cu_hidden"] * 2}, IndexError),
    (lambda a: {"eps": -1.0}, ValueError), (lambda a: {"eps": float("nan")}, ValueError),
    (lambda a: {"sources": [*a["sources"], 3]}, TypeError), (lambda a: {"output_dropout_p": 1.0}, ValueError),
    (lambda a: {"seed": -1}, ValueError), (lambda a: {"seed": "x"}, TypeError), (lambda a: {"dropout_p": None}, TypeError),
])
def test_a_step_refuses_what_a_first_call_refuses(steps, change, error):
    case, short = steps
    changed = case.arguments() | change(case.arguments())
    with pytest.raises(error):
        cross_attention(**changed)
    assert short in ([], [None])


def test_a_step_reads_the_offsets_anew(steps):
    case, short = steps
    source = case.sources[1]
    wrong = source.cu_keys if source.key_of is None else source.key_of
    wrong[1] = 99
    with pytest.raises(IndexError, match=r"^sources\[1\]\."):
        cross_attention(**case.arguments())
    assert short == [None]


def test_a_known_source_keeps_its_memory(steps):
    case, short = steps
    source = case.sources[0]
    address = source.key.data_ptr()
    source.key.data = source.key.clone()
    assert all(torch.empty_like(source.key).data_ptr() != address for _ in range(20))  # else the address would prove nothing


def test_memory_that_was_given_back_is_not_read(steps):
    case, short = steps
    case.sources[0].key.untyped_storage().resize_(0)  # as sharding of weights does
    with pytest.raises((ValueError, RuntimeError)):
        cross_attention(**case.arguments())
    assert short == [None]


def test_what_the_kernel_would_copy_is_never_known(native):
    strided = make_case([1, 1], [[2, 3]], layout=3)
    mixed = make_case([1, 1], [[2, 3]])
    mixed = replace(mixed, cu_hidden=mixed.cu_hidden.long())
    for case in (strided, mixed):
        with torch.no_grad():
            results = [cross_attention(**case.arguments()) for _ in range(3)]
        assert all(torch.equal(x, results[0]) for x in results) and not case.sources[0]._known.tensors


def test_a_step_that_is_watched_or_runs_elsewhere_goes_the_whole_way(steps, monkeypatch):
    case, short = steps
    arguments, expected = case.arguments(), cross_attention(**case.arguments())
    short.clear()
    with torch.autocast("cpu", torch.bfloat16):
        cross_attention(**arguments)
    cross_attention(**(arguments | {"dropout_p": 0.5}))
    with torch.enable_grad():
        cross_attention(**(arguments | {"hidden": case.hidden.clone().requires_grad_()}))
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    with Watching():
        cross_attention(**arguments)
    assert kernels(FAMILY)._forward_op in seen
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")
    with counted(FAMILY) as calls:
        assert close(cross_attention(**arguments), expected, 1e-5)
    assert not calls and short == [None] * 3


def test_many_rows_and_other_backends_leave_sources_unknown(native, monkeypatch):
    many = make_case([200, 100], [[2, 3]])
    half = make_case([1, 1], [[2, 3]], dtype=torch.bfloat16)
    plain = make_case([1, 1], [[2, 3]])
    with torch.no_grad():
        for case in (many, half):
            cross_attention(**case.arguments())
        monkeypatch.setenv("CASE_FAST_BACKEND", "reference")
        cross_attention(**plain.arguments())
    assert all(case.sources[0]._known is None for case in (many, half, plain))


def test_export_takes_any_number_of_rows(native):
    case = make_case([3, 4], [[2, 9]])

    class Step(torch.nn.Module):
        def forward(self, hidden, cu_hidden):
            return cross_attention(hidden, cu_hidden, case.sources)

    rows = torch.export.Dim("T", max=9999)
    with torch.no_grad():
        program = torch.export.export(Step(), (case.hidden, case.cu_hidden), dynamic_shapes=({0: rows}, None))
    assert torch.equal(program.module()(case.hidden, case.cu_hidden), cross_attention(**case.arguments()))


def test_a_source_says_what_it_holds():
    assert {"key", "value", "cu_keys", "norm_weight", "norm_bias", "query_weight", "output_weight", "key_of"} <= set(
        Source.__dataclass_fields__
    )
    assert ops.Source is Source


# ---- what a GPU does with many rows, on the CPU: our attention between torch's layer norm and products


@pytest.mark.parametrize("rows, keys, share", [([7, 0, 3], [[30, 2, 0], [5, 1, 8]], False), ([1, 4, 2], [[9, 3]], True),
                                               ([], [[]], False), ([3, 2], [[0, 0], [2, 1], [4, 4]], False)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_composed_of_products_it_is_the_equation(native, rows, keys, share, dropout):
    kernel = kernels(FAMILY)
    case = make_case(rows, keys, 12, 2, 5, dtype=torch.float64, share=share, seed=2**40 + 3)
    case = replace(case, dropout_p=dropout, output_dropout_p=dropout)
    expected = case.results(case.plain)
    floats, *lists = case.lists()
    arguments = (case.hidden, case.cu_hidden, floats, *lists)
    numbers = (case.eps, case.dropout_p, case.output_dropout_p, case.seed)
    out, saved = kernel._outputs(case.hidden, floats, True)
    kernel._forward_composed(*arguments, *numbers, out, saved)
    assert close(out, expected["out"], 1e-12)
    assert identical(kernel._forward_composed(*arguments, *numbers, torch.empty_like(out), None), out)
    found = kernel._gradients(case.hidden, floats)
    kernel._backward_composed(case.grad_out, *arguments, saved, *numbers, found)
    for (name, right), x in zip(list(expected.items())[1:], found, strict=True):
        assert close(x, right, 1e-11), name
