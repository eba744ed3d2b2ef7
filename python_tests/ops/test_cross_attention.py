"""cross_attention alone; what all ops have in common is in test_families.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import close
from op_cases.cross_attention import CrossAttention
from op_checks import counted, identical
from torch.utils._python_dispatch import TorchDispatchMode

from case_fast import equations, ops
from case_fast.ops import PreparedSources, Source, cross_attention, prepare_sources
from case_fast.ops import cross_attention_composed as composed

KERNELS, make_case = CrossAttention.kernels(), CrossAttention.made


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
    with counted(CrossAttention) as calls:
        found = cross_attention(**case.arguments())
    (s,) = case.sources
    key, value = (torch.cat([x[:40]] * 5 + [x[40:]] * 5) for x in (s.key, s.value))
    copied = [replace(s, key=key, value=value, cu_keys=torch.tensor([0, *[40] * 5, *[30] * 5]).cumsum(0))]
    assert calls["cross_attention_forward"] == 1
    assert close(found, cross_attention(case.hidden, torch.arange(11), copied), 1e-6)


def test_sources_of_different_heads_run_on_the_reference(native):
    case = make_case([3, 2], [[4, 6]], heads=2, dim=3)
    other = make_case([3, 2], [[5, 1]], heads=3, dim=2, number=1)
    with counted(CrossAttention) as calls:
        found = cross_attention(case.hidden, case.cu_hidden, [*case.sources, *other.sources])
    assert not calls
    assert close(found, equations.cross_attention(case.hidden, case.cu_hidden, [*case.sources, *other.sources]), 1e-6)


@pytest.mark.parametrize("over_rows", [False, True])
def test_what_is_kept_is_as_large_as_the_kernel_says(native, over_rows):
    for rows, width, heads, dim, sources in ((7, 5, 2, 3, 1), (0, 4, 1, 2, 3), (13, 300, 2, 150, 3)):
        case = make_case([rows], [[4]] * sources, width=width, heads=heads, dim=dim, over_rows=over_rows)
        floats, *_ = case.lists()
        size = KERNELS._outputs(case.hidden, floats, sources, True)[1].numel()
        source = (0,) * 15 + ((1, 1) if over_rows else (0, 0))
        call = (1, rows, sources, width, heads, dim, 0, 64, 0, 0.0, 0.0, 0.0, 0)
        assert size == native.cross_attention_saved(call, [source] * sources)
        assert KERNELS._outputs(case.hidden, floats, sources, False)[1].numel() == 0


# ---- sources by the rows that keys and values are made of


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_give_what_the_keys_and_values_made_of_them_give(native, share, dropout):
    keys = [[5, 0, 9], [30, 2, 1]]
    case = make_case([40, 3, 25], keys, 12, 3, 5, dtype=torch.float64, share=share, over_rows=True, seed=3, dropout_p=dropout,
                     output_dropout_p=dropout)
    expected = case.results(lambda sources, **rest: cross_attention(sources=[s.projected() for s in sources], **rest))
    for name, x in case.results(case.op).items():
        assert close(x, expected[name], 1e-12), name


def test_of_rows_neither_keys_nor_values_are_made(native, monkeypatch):
    case = make_case([3, 4], [[5, 2], [1, 0]], over_rows=True)
    monkeypatch.setattr(KERNELS, "linear", lambda *given, **more: pytest.fail("keys and values were made"))
    case.results(case.op)


def test_prepared_rows_are_keys_and_values(native):
    case = make_case([1, 1], [[5, 2], [1, 0]], over_rows=True)
    prepared = prepare_sources(case.sources)
    assert all(isinstance(source, Source) for source in prepared.sources)
    with counted(CrossAttention) as calls:
        assert close(cross_attention(case.hidden, case.cu_hidden, prepared), cross_attention(**case.arguments()), 1e-6)
    assert calls["cross_attention_forward"] == 2


# ---- dtypes, torch.compile


def test_compiled_code_takes_a_tensor_in_several_places(native):
    torch._dynamo.reset()
    compiled = torch.compile(cross_attention, fullgraph=True)
    case = make_case([3, 4], [[2, 9], [0, 3]])
    first = case.sources[0]
    shared = [replace(s, cu_keys=first.cu_keys, key=first.key, value=first.key) for s in case.sources]
    arguments = case.arguments() | {"sources": shared, "hidden": case.hidden.clone().requires_grad_()}
    with counted(CrossAttention) as calls:
        out = compiled(**arguments)
    assert calls["cross_attention_forward"] == 1 and torch.equal(out, cross_attention(**arguments))
    with pytest.raises(IndexError, match="^cu_hidden falls from 9 to 7 at place 2"):
        compiled(**(arguments | {"cu_hidden": torch.tensor([0, 9, 7])}))


# ---- steps with prepared sources


@pytest.fixture(params=[{}, {"share": True, "long": True, "dtype": torch.float64}], ids=["", "shared"])
def steps(native, monkeypatch, request):
    """A case, its sources prepared, and the results of the calls that may go the short way."""
    case, short, step = make_case([1, 2, 1], [[5, 0, 3], [2, 9, 1]], **request.param), [], PreparedSources.step

    def counted_step(*arguments):
        short.append(None)
        short[-1] = step(*arguments)
        return short[-1]

    monkeypatch.setattr(PreparedSources, "step", counted_step)
    with torch.no_grad():
        yield case, prepare_sources(case.sources), short


def of(case, prepared):
    return case.arguments() | {"sources": prepared}


def test_a_step_gives_what_the_sources_hold_now(steps):
    case, prepared, short = steps
    for factor in (1.0, 1.5, -0.5):
        for x in case.floats().values():
            x.mul_(factor)
        assert torch.equal(cross_attention(**of(case, prepared)), cross_attention(**case.arguments()))
    assert len(short) == 3 and all(x is not None for x in short)


def test_a_step_may_have_other_rows(steps):
    case, prepared, short = steps
    other = make_case([2, 2, 3], [[1]], number=1, long=case.cu_hidden.dtype == torch.int64, dtype=case.hidden.dtype)
    changed = replace(case, hidden=other.hidden, cu_hidden=other.cu_hidden)
    assert torch.equal(cross_attention(**of(changed, prepared)), cross_attention(**changed.arguments()))
    assert short[0] is not None


@pytest.mark.parametrize("change, error", [
    (lambda a: {"hidden": a["hidden"].int()}, TypeError), (lambda a: {"hidden": a["hidden"][0]}, ValueError),
    (lambda a: {"hidden": a["hidden"][:, :-1].contiguous()}, ValueError), (lambda a: {"sources": [a["sources"]]}, TypeError),
    (lambda a: {"cu_hidden": a["cu_hidden"][:-1]}, ValueError), (lambda a: {"cu_hidden": a["cu_hidden"] * 2}, IndexError),
    (lambda a: {"eps": -1.0}, ValueError), (lambda a: {"eps": float("nan")}, ValueError),
    (lambda a: {"output_dropout_p": 1.0}, ValueError),
    (lambda a: {"seed": -1}, ValueError), (lambda a: {"seed": "x"}, TypeError), (lambda a: {"dropout_p": None}, TypeError),
])
def test_a_step_refuses_what_a_call_refuses(steps, change, error):
    case, prepared, short = steps
    arguments = of(case, prepared)
    with pytest.raises(error):
        cross_attention(**(arguments | change(arguments)))
    assert short in ([], [None])


def test_what_is_wrong_with_sources_is_said_when_they_are_prepared(native):
    case = make_case([1, 2, 1], [[5, 0, 3], [2, 9, 1]])
    first, second = case.sources
    for wrong, error, said in (
        ([], ValueError, "sources must hold at least one source"),
        ([3], TypeError, r"sources\[0\] must be a case_fast.ops.Source"),
        ([first, 3], TypeError, r"sources\[1\] must be a case_fast.ops.Source"),
        ([replace(first, key=first.key.int())], TypeError, r"sources\[0\]"),
        ([first, replace(second, value=second.value.double())], TypeError, r"sources\[1\].value must be torch.float32 as"),
        ([first, replace(second, output_weight=second.output_weight[1:])], ValueError, r"sources\[1\].output_weight must be"),
        ([first, replace(second, cu_keys=second.cu_keys.float())], TypeError, r"sources\[1\].cu_keys must be int32 or int64"),
        ([first, replace(second, cu_keys=second.cu_keys[:0])], ValueError, r"sources\[1\].cu_keys must hold"),
        ([first, replace(second, cu_keys=second.cu_keys[:-1])], ValueError, r"sources\[1\] must be for 3 sequences of hidden"),
    ):
        with pytest.raises(error, match=f"^{said}"):
            prepare_sources(wrong)


def test_a_step_reads_the_offsets_anew(steps):
    case, prepared, short = steps
    source = case.sources[1]
    wrong = source.cu_keys if source.key_of is None else source.key_of
    wrong[1] = 99
    with pytest.raises(IndexError, match=r"^sources\[1\]\."):
        cross_attention(**of(case, prepared))
    assert short == [None]


def test_what_preparing_copies_keeps_its_gradient(native):
    """A weight that does not lie as the kernels read it, prepared where nothing was recorded."""
    case = make_case([2, 1], [[5, 3]])
    (source,) = case.sources
    weight = source.query_weight.t().clone().requires_grad_()
    sources = [replace(source, query_weight=weight.t())]
    with torch.no_grad():
        prepared = prepare_sources(sources)
    outs = [cross_attention(case.hidden, case.cu_hidden, given).sum() for given in (sources, prepared)]
    grads = [torch.autograd.grad(out, weight)[0] for out in outs]
    assert torch.equal(*grads) and grads[0].any()


def test_prepared_sources_keep_their_memory(steps):
    case, prepared, short = steps
    source = case.sources[0]
    address = source.key.data_ptr()
    source.key.data = source.key.clone()
    assert all(torch.empty_like(source.key).data_ptr() != address for _ in range(20))  # else the address would prove nothing


@pytest.mark.parametrize("move", [
    lambda x: setattr(x, "data", x * 2), lambda x: x.set_(x * 0.5),
    lambda x: x.untyped_storage().resize_(0),  # as sharding of weights does
])
@pytest.mark.parametrize("name", ["key", "query_weight"])
def test_memory_that_has_moved_is_not_read(steps, move, name):
    case, prepared, short = steps
    move(getattr(case.sources[1], name))
    with pytest.raises(RuntimeError, match="has moved since; call prepare_sources again"):
        cross_attention(**of(case, prepared))
    assert short == [None]


def test_what_the_kernel_would_copy_is_copied_once(native):
    strided = make_case([1, 1], [[2, 3]], layout=3)
    mixed = make_case([1, 1], [[2, 3]])
    of_int = torch.tensor([1, 0], dtype=torch.int32)
    mixed = replace(mixed, sources=[replace(s, cu_keys=s.cu_keys.long(), key_of=of_int) for s in mixed.sources])
    for case, name in ((strided, "key"), (mixed, "key_of")):
        prepared = prepare_sources(case.sources)
        with torch.no_grad():
            expected = cross_attention(**case.arguments())
            assert torch.equal(cross_attention(**of(case, prepared)), expected)
            getattr(case.sources[0], name).zero_()
            assert torch.equal(cross_attention(**of(case, prepared)), expected)
            assert not torch.equal(cross_attention(**case.arguments()), expected)
        assert all(x.is_contiguous() for s in prepared.sources for x in (*s.floats()[2:], s.cu_keys))
        assert len({x.dtype for s in prepared.sources for x in (s.cu_keys, s.key_of) if x is not None}) == 1


def test_a_step_that_is_watched_or_runs_elsewhere_goes_the_whole_way(steps, monkeypatch):
    case, prepared, short = steps
    arguments, expected = of(case, prepared), cross_attention(**case.arguments())
    with torch.autocast("cpu", torch.bfloat16):
        cross_attention(**arguments)
    cross_attention(**(arguments | {"dropout_p": 0.5}))
    with torch.enable_grad():
        cross_attention(**(arguments | {"hidden": case.hidden.clone().requires_grad_()})).sum().backward()
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    with Watching():
        cross_attention(**arguments)
    assert KERNELS._forward_op in seen
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")
    with counted(CrossAttention) as calls:
        assert close(cross_attention(**arguments), expected, 1e-5)
    assert not calls and short == [None] * 3


def test_half_precision_and_heads_of_several_sizes_go_the_whole_way(native):
    half = make_case([1, 1], [[2, 3]], dtype=torch.bfloat16)
    one, other = make_case([1, 1], [[2, 3]]), make_case([1, 1], [[2, 3]], heads=1, dim=7)
    unlike = replace(one, sources=[*one.sources, *other.sources])
    with torch.no_grad():
        for case in (half, unlike):
            prepared = prepare_sources(case.sources)
            assert prepared.step(case.hidden, case.cu_hidden, case.eps) is None
            assert torch.equal(cross_attention(**of(case, prepared)), cross_attention(**case.arguments()))


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
@pytest.mark.parametrize("dropout, of_tensor", [(0.0, False), (0.3, False), (0.3, True)])
def test_composed_of_products_it_is_the_equation(native, rows, keys, share, dropout, of_tensor):
    case = make_case(rows, keys, 12, 2, 5, dtype=torch.float64, share=share, seed=2**40 + 3)
    case = replace(case, dropout_p=dropout, output_dropout_p=dropout)
    case = case.seeded_by_tensor() if of_tensor else case
    expected = case.results(case.plain)
    floats, *lists = case.lists()
    arguments = (case.hidden, case.cu_hidden, floats, *lists)
    numbers = (case.eps, case.dropout_p, case.output_dropout_p, *case.seeds())
    out, saved = torch.empty_like(case.hidden), case.hidden.new_empty(composed.kept_size(case.hidden, floats))
    composed.forward(*arguments, *numbers, out, saved)
    assert close(out, expected["out"], 1e-12)
    assert identical(composed.forward(*arguments, *numbers, torch.empty_like(out), None), out)
    found = KERNELS._gradients(case.hidden, floats)
    composed.backward(case.grad_out, *arguments, saved, *numbers, found)
    for (name, right), x in zip(list(expected.items())[1:], found, strict=True):
        assert close(x, right, 1e-11), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 8])
def test_what_is_kept_for_backward_starts_at_whole_16_bytes(rows, dtype):
    """Of rows and a width whose bytes are no such multiple. No two of the views meet."""
    case = make_case([rows], [[4], [2], [3]], 15, 3, 5, dtype=dtype)
    floats, *_ = case.lists()
    saved = torch.empty(composed.kept_size(case.hidden, floats), dtype=dtype)
    kept = [x for source in composed.views(saved, rows, 15, 3, 5, 3) for x in source]
    assert [x.shape for x in kept[:4]] == [(rows, 15), (rows, 3, 5), (rows, 3, 5), (rows, 3)]
    assert {x.dtype for x in kept[3::4]} == {torch.float64 if dtype == torch.float64 else torch.float32}
    for number, x in enumerate(kept):
        assert (x.data_ptr() - saved.data_ptr()) % (16 if number % 4 < 3 else x.element_size()) == 0 and x.is_contiguous()
        x.fill_(number)
    assert all((x == number).all() for number, x in enumerate(kept))
