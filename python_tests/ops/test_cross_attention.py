"""The public op cross_attention: a share of its scorecard, its arguments and errors, and how it stands in torch."""

from __future__ import annotations

import types
from dataclasses import replace

import cross_attention_checks as checks
import pytest
import torch
from attention_checks import kernels, mean_errors, results
from cross_attention_checks import FAMILY, make_case
from helpers import close
from op_checks import counted, identical
from torch.utils._python_dispatch import TorchDispatchMode

from case_fast import equations, ops
from case_fast.errors import ConfigError
from case_fast.ops import PreparedSources, Source, backend, cross_attention, prepare_sources

SHARE = {1: 4, 2: len(checks.SHAPES), 3: 250, 4: 250, 5: 100, 6: 1, 11: 1}  # cases of each row; all of them: scorecard.py


@pytest.mark.parametrize("row", SHARE)
def test_row_of_the_scorecard(native, row):
    check, full = checks.CHECKS[row]
    assert SHARE[row] <= full
    with counted(FAMILY) as calls:
        assert check(SHARE[row], "cpu") >= SHARE[row]
    assert calls[f"{FAMILY}_forward"] >= SHARE[row], "the native kernel did not run"
    if row != 4:
        assert calls[f"{FAMILY}_backward"] > 0


@pytest.mark.parametrize("row", [2, 3, 4, 5])
def test_row_of_the_scorecard_on_the_reference(monkeypatch, row):
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")
    size = 4 if row == 2 else 25
    if not backend.native_report()["available"]:
        assert checks.CHECKS[row][0](size, "cpu")
        return
    with counted(FAMILY) as calls:
        checks.CHECKS[row][0](size, "cpu")
    assert not calls


@pytest.mark.parametrize("rows", [[1] * 16, [15, 30, 7, 22]])
def test_on_average_no_less_exact_than_plain_torch(rows):
    recipe = {"rows": rows, "keys": [[100, 60, 0, 120] * (len(rows) // 4)] * 3, "width": 300, "dim": 150}
    assert max(mean_errors(lambda number: make_case(number=number, **recipe), 8).values()) < 1.3


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
    assert calls[f"{FAMILY}_forward"] == 1
    assert close(found, cross_attention(case.hidden, torch.arange(11), copied), 1e-6)


def test_sources_of_different_heads_run_on_the_reference(native):
    case = make_case([3, 2], [[4, 6]], heads=2, dim=3)
    other = make_case([3, 2], [[5, 1]], heads=3, dim=2, number=1)
    with counted(FAMILY) as calls:
        found = cross_attention(case.hidden, case.cu_hidden, [*case.sources, *other.sources])
    assert not calls
    assert close(found, equations.cross_attention(case.hidden, case.cu_hidden, [*case.sources, *other.sources]), 1e-6)


# ---- which backend runs


def test_backends_drop_the_same_weights_and_outputs(native, monkeypatch):
    for seed in (0, 2**32 + 5, 2**63 - 1):
        case = make_case([30, 7, 21], [[12, 50, 3], [1, 0, 30]], dtype=torch.float64, seed=seed)
        case = replace(case, dropout_p=0.4, output_dropout_p=0.3)
        found = {}
        for name in ("native", "reference"):
            monkeypatch.setenv("CASE_FAST_BACKEND", name)
            found[name] = results(case)
        assert all(close(x, found["reference"][name], 1e-11) for name, x in found["native"].items())
    assert not torch.equal(results(replace(case, seed=1))["out"], found["reference"]["out"])


def test_the_backend_that_is_named_is_the_one_that_runs(native, monkeypatch):
    case = make_case([9, 3], [[2, 7]])
    for name, expected in (("native", 1), ("reference", 0), ("", 1)):
        monkeypatch.setenv("CASE_FAST_BACKEND", name)
        with counted(FAMILY) as calls:
            results(case)
        assert calls[f"{FAMILY}_forward"] == calls[f"{FAMILY}_backward"] == expected, name
        assert (backend.backend_name(FAMILY) == "native") == bool(expected)


def test_a_backend_that_cannot_serve_is_refused(monkeypatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "triton")
    with pytest.raises(ConfigError, match="CASE_FAST_BACKEND=triton: cross_attention on cpu cannot run there: "):
        cross_attention(**make_case([3], [[2]]).arguments())


@pytest.mark.parametrize("status, error, said", [
    (7, IndexError, "cu_hidden"), (8 + 16, IndexError, r"sources\[1\].cu_keys"), (9, IndexError, r"sources\[0\].key_of"),
    (4, RuntimeError, "cross_attention"), (5, MemoryError, "cross_attention"),
])
def test_a_status_of_the_kernel_is_never_passed_over(native, monkeypatch, status, error, said):
    monkeypatch.setattr(backend, "native", types.SimpleNamespace(cross_attention_forward=lambda *a: status))
    case = make_case([3, 5], [[1, 2], [3, 4]])
    floats = [x for name, x in case.floats().items() if name != "hidden"]
    with pytest.raises(error, match=said):
        kernels(FAMILY)._forward_op("native", case.hidden, case.cu_hidden, floats, [s.cu_keys for s in case.sources],
                                    [None, None], 1e-5, 0.0, 0.0, 0, False)


def test_what_is_kept_is_as_large_as_the_kernel_says(native):
    for rows, width, heads, dim, sources in ((7, 5, 2, 3, 1), (0, 4, 1, 2, 3), (13, 300, 2, 150, 3)):
        case = make_case([rows], [[4]] * sources, width=width, heads=heads, dim=dim)
        floats = [x for name, x in case.floats().items() if name != "hidden"]
        size = kernels(FAMILY)._outputs(case.hidden, floats, True)[1].numel()
        assert size == native.cross_attention_saved((1, rows, sources, width, heads, dim, 0, 64, 0, 0.0, 0.0, 0.0))
        assert kernels(FAMILY)._outputs(case.hidden, floats, False)[1].numel() == 0


# ---- arguments

BASE = make_case([2, 4], [[3, 5], [1, 6]], share=True)


def having(**changes: object) -> dict:
    """Arguments whose second source is changed."""
    return {"sources": [BASE.sources[0], replace(BASE.sources[1], **changes)]}


SECOND = BASE.sources[1]
WRONG = [  # what the message begins with, changed arguments, error
    ("hidden", {"hidden": BASE.hidden[0]}, ValueError),
    ("hidden", {"hidden": BASE.hidden.int()}, TypeError),
    ("hidden", {"hidden": BASE.hidden[:, :0]}, ValueError),
    ("sources must", {"sources": []}, ValueError),
    ("sources[1] must", {"sources": [BASE.sources[0], "source"]}, TypeError),
    ("sources[0].key must", {"hidden": BASE.hidden.double()}, TypeError),
    ("sources[1].key must", having(key=SECOND.key[0]), ValueError),
    ("sources[1].key must", having(key=SECOND.key.to("meta")), ValueError),
    ("sources[1].value must", having(value=SECOND.value[1:]), ValueError),
    ("sources[1].value must", having(value=SECOND.value.half()), TypeError),
    ("sources[1].norm_weight must", having(norm_weight=SECOND.norm_weight[1:]), ValueError),
    ("sources[1].norm_bias must", having(norm_bias=SECOND.norm_bias[None]), ValueError),
    ("sources[1].query_weight must", having(query_weight=SECOND.query_weight.T), ValueError),
    ("sources[1].output_weight must", having(output_weight=SECOND.output_weight.double()), TypeError),
    ("cu_hidden", {"cu_hidden": BASE.cu_hidden.float()}, TypeError),
    ("cu_hidden", {"cu_hidden": BASE.cu_hidden[:0]}, ValueError),
    ("cu_hidden ends", {"cu_hidden": BASE.cu_hidden // 2}, IndexError),
    ("cu_hidden starts", {"cu_hidden": BASE.cu_hidden + 1}, IndexError),
    ("sources[1].cu_keys must", having(cu_keys=SECOND.cu_keys.bool()), TypeError),
    ("sources[1].cu_keys must", having(cu_keys=torch.tensor([0, 3, 5, 7]), key_of=None), ValueError),
    ("sources[1].cu_keys falls", having(cu_keys=torch.tensor([0, 8, 7])), IndexError),
    ("sources[1].key_of must", having(key_of=SECOND.key_of[1:]), ValueError),
    ("sources[1].key_of holds", having(key_of=SECOND.key_of + 2), IndexError),
    ("sources[1].key_of names", having(cu_keys=SECOND.cu_keys[:1]), IndexError),
    ("eps", {"eps": -1e-5}, ValueError),
    ("eps", {"eps": float("nan")}, ValueError),
    ("dropout_p", {"dropout_p": 1.0}, ValueError),
    ("output_dropout_p", {"output_dropout_p": -0.1}, ValueError),
    ("seed", {"seed": 2**63}, ValueError),
]


@pytest.mark.parametrize("name, change, error", WRONG)
def test_a_wrong_argument_is_named_before_any_kernel_runs(runs, name, change, error):
    with pytest.raises(error) as caught:
        cross_attention(**(BASE.arguments() | change))
    assert str(caught.value).startswith(name)


def test_every_input_alone_may_want_a_gradient():
    case = make_case([3, 4], [[5, 2], [1, 0]], dtype=torch.float64)
    all_of_them = results(case)
    for wanted in (None, *case.floats()):
        leaves = {name: x.clone().requires_grad_(name == wanted) for name, x in case.floats().items()}
        out = case.call(leaves)
        assert out.requires_grad == (wanted is not None) and torch.equal(out, all_of_them["out"])
        if wanted is not None:
            out.backward(case.grad_out)
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, all_of_them[name]) if name == wanted else leaf.grad is None


def test_second_derivatives_are_refused_but_on_the_reference(runs):
    case = make_case([2, 2], [[3, 1]], dtype=torch.float64)
    hidden = case.hidden.clone().requires_grad_()
    (first,) = torch.autograd.grad(case.call({"hidden": hidden}).square().sum(), hidden, create_graph=True)
    if runs == "native":
        with pytest.raises(NotImplementedError, match="cross_attention has no second derivative"):
            first.sum().backward()
    else:
        first.sum().backward()
        assert hidden.grad.isfinite().all()


# ---- dtypes, torch.compile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_on_cpu(dtype):
    case = make_case([20, 7], [[5, 9]], dtype=dtype)
    found, exact = results(case), results(case.to(torch.float32))
    for name, x in found.items():
        assert x.dtype == dtype and identical(x, exact[name].to(dtype))


def test_autocast_computes_in_float32_on_cpu(runs):
    case = make_case([20, 7], [[5, 9], [3, 2]])
    expected = cross_attention(**case.arguments())
    mixed = [replace(s, key=s.key.bfloat16(), value=s.value.bfloat16()) for s in case.sources]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cross_attention(**case.arguments()), expected)
        found = cross_attention(**(case.arguments() | {"sources": mixed}))
    assert found.dtype == torch.float32 and close(found, expected, 0.05)


def around(hidden, cu_hidden, sources, **more):
    """The op among others."""
    return cross_attention(hidden * 1.5, cu_hidden, sources, **more).sin()


class Through:
    """A case whose call goes through another function."""

    def __init__(self, case, function):
        self.grad_out, self.floats = case.grad_out, case.floats
        self.call = lambda leaves, plain: function(**case.having(leaves).arguments())


def test_compiles_without_graph_breaks(runs):
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True, dynamic=True, backend="aot_eager")
    for place, (rows, keys) in enumerate([([3, 4], [[5, 6], [1, 0]]), ([9, 1], [[2, 2], [3, 3]])]):
        case = make_case(rows, keys, number=place, dropout_p=0.1, output_dropout_p=0.2, seed=3 + place)
        expected, found = (results(Through(case, f)) for f in (around, compiled))
        assert all(close(x, expected[name], 1e-5) for name, x in found.items())


def test_compiled_code_calls_the_kernel_and_raises_its_errors(native):
    torch._dynamo.reset()
    compiled = torch.compile(cross_attention, fullgraph=True)
    case = make_case([3, 4], [[2, 9], [0, 3]])
    first = case.sources[0]  # a tensor may stand in several places
    shared = [replace(s, cu_keys=first.cu_keys, key=first.key, value=first.key) for s in case.sources]
    arguments = case.arguments() | {"sources": shared, "hidden": case.hidden.clone().requires_grad_()}
    with counted(FAMILY) as calls:
        out = compiled(**arguments)
    assert calls[f"{FAMILY}_forward"] == 1 and torch.equal(out, cross_attention(**arguments))
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
    assert kernels(FAMILY)._forward_op in seen
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")
    with counted(FAMILY) as calls:
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
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_composed_of_products_it_is_the_equation(native, rows, keys, share, dropout):
    kernel = kernels(FAMILY)
    case = make_case(rows, keys, 12, 2, 5, dtype=torch.float64, share=share, seed=2**40 + 3)
    case = replace(case, dropout_p=dropout, output_dropout_p=dropout)
    expected = results(case, plain=True)
    floats = [x for name, x in case.floats().items() if name != "hidden"]
    lists = ([s.cu_keys for s in case.sources], [s.key_of for s in case.sources])
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
