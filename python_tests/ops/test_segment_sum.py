"""What segment_sum and take say alone; what they share with the other families is in test_families.py."""

from __future__ import annotations

import pytest
import torch
from op_case import HALF, generator
from op_cases.segment_sum import SegmentSum
from op_checks import counted, identical

from case_fast import ops
from case_fast.ops import reference
from case_fast.ops.segment_sum import FEW, FEWER

MANY = 1 << 30  # elements: more than any call here has, so that plain torch serves
SIZES = [(754, 430, (300,)), (713, 16, (300,)), (233, 16, ()), (40, 7, (3, 5))]
PAIR = {"segment_sum": lambda x, index, few: ops.segment_sum(x, index, 7, few=few),
        "take": lambda x, index, few: ops.take(x, index, few=few)}


@pytest.mark.parametrize("rows, size, dims", SIZES)
@pytest.mark.parametrize("sorted", [True, False])
def test_the_bits_are_those_of_adding_row_after_row(native, rows, size, dims, sorted):
    case = SegmentSum.made(rows, size, dims, sorted=sorted)
    expected = torch.zeros(size, *dims)
    for row, segment in zip(case.x, case.segment.tolist(), strict=True):
        expected[segment] += row
    with counted(SegmentSum) as calls:
        found = [ops.segment_sum(case.x.clone().requires_grad_(), case.segment, size, few=few) for few in (0, MANY)]
    assert calls["segment_sum_forward"] == 1 and all(identical(x.detach(), expected) for x in found)


@pytest.mark.parametrize("wants, few", [(True, FEW), (False, FEWER)])
def test_few_elements_go_to_plain_torch_and_others_to_the_kernel(native, wants, few):
    for rows, expected in ((few // 300, 0), (few // 300 + 1, 1)):
        case = SegmentSum.made(rows, 16, (300,))
        with counted(SegmentSum) as calls:
            ops.segment_sum(case.x.requires_grad_(wants), case.segment, 16)
        assert calls["segment_sum_forward"] == expected
        leaf = torch.randn(16, 300, requires_grad=wants)
        with counted(SegmentSum) as calls:
            taken = ops.take(leaf, case.segment)
            if wants:
                taken.sum().backward()  # the sum is by the kernel; a gather never is
        assert calls["segment_sum_forward"] == (expected if wants else 0)


@pytest.mark.parametrize("few", [0, MANY])
@pytest.mark.parametrize("argument", [
    {"segment": torch.zeros(3)}, {"segment": torch.zeros(2, dtype=torch.int64)}, {"segment": torch.tensor(0)},
    {"x": torch.tensor(1.0)}, {"size": -1}, {"size": 2.0},
], ids=str)
def test_few_elements_are_refused_as_many_are(native, few, argument):
    given = {"x": torch.ones(3, 2), "segment": torch.zeros(3, dtype=torch.int64), "size": 1} | argument
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(argument))} must "):
        ops.segment_sum(**given, few=few)


@pytest.mark.parametrize("few", [0, MANY])
@pytest.mark.parametrize("index", [[3, 0, 3], [], [[1, 2, 0], [4, 4, 3]]], ids=str)
def test_take_is_the_rows_at_an_index(runs, index, few):
    index = torch.tensor(index, dtype=torch.int64)
    for x in (torch.randn(5, 4), torch.randn(5), torch.randn(5, 2, 3).transpose(1, 2), torch.randn(8, 5).T):
        for dtype in (torch.int64, torch.int32):
            assert identical(ops.take(x, index.to(dtype), few=few), x[index])


@pytest.mark.parametrize("few", [0, MANY])
def test_each_is_the_gradient_of_the_other_any_number_of_times(runs, few):
    g = generator(3)
    x, index = torch.randn(9, 4, generator=g, dtype=torch.float64), torch.randint(7, (9,), generator=g)
    rows = torch.randn(7, 4, generator=g, dtype=torch.float64)
    for function, leaf in ((PAIR["segment_sum"], x), (PAIR["take"], rows)):
        leaf.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, function=function: function(x, index, few), leaf)
        assert torch.autograd.gradgradcheck(lambda x, function=function: function(x, index, few).square(), leaf)
        third = function(leaf, index, few).pow(3).sum()
        for _ in range(2):
            (third,) = (x.sum() for x in torch.autograd.grad(third, leaf, create_graph=True))
        assert torch.autograd.grad(third, leaf)[0].isfinite().all()


def test_the_gradient_of_take_is_the_sum(native):
    g = generator(5)
    x, index = torch.randn(40, 30, generator=g).requires_grad_(), torch.randint(40, (200,), generator=g)
    grad_out = torch.randn(200, 30, generator=g)
    found = [torch.autograd.grad(ops.take(x, index, few=few), x, grad_out)[0] for few in (0, MANY)]
    expected = reference.segment_sum(grad_out, index, 40)
    assert all(identical(y, expected) for y in found)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_gradient_of_take_in_half_precision_is_summed_in_float32(native, dtype):
    x, index = torch.zeros(2, 3, dtype=dtype, requires_grad=True), torch.zeros(4000, dtype=torch.int64)
    ops.take(x, index, few=0).sum().backward()
    assert x.grad[0].tolist() == [torch.tensor(4000.0).to(dtype).item()] * 3 and not x.grad[1].any()


@pytest.mark.parametrize("few", [0, MANY])
@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("wrong", [-1, 7, 2**31, -(2**40)])
def test_an_index_that_names_nothing_is_named(runs, name, wrong, few):
    index = torch.tensor([0, 6, 2, wrong, 3])
    argument = {"segment_sum": "segment", "take": "index"}[name]
    for wants in (False, True):
        x = torch.randn(5 if name == "segment_sum" else 7, 3, requires_grad=wants)
        with pytest.raises(IndexError) as caught:
            PAIR[name](x, index, few)
        assert str(caught.value) == f"{argument} holds {wrong} at place 3; it must be in [0, 7)"
    with pytest.raises(IndexError, match=f"^{argument} names what does not exist"):
        ops.take(x[:0], index) if name == "take" else ops.segment_sum(x[:5], index, 0)


def test_rows_that_are_dense_are_not_copied(native, monkeypatch):
    case = SegmentSum.made(50, 6, (20,), layout=1)
    whole = case.x
    expected = ops.segment_sum(whole.contiguous(), case.segment, 6, few=0)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: pytest.fail("copied") if x.is_floating_point() else x.clone())
    assert not whole.is_contiguous() and torch.equal(ops.segment_sum(whole, case.segment, 6, few=0), expected)
    one = whole[:1].expand(50, 20)  # one row that stands for all
    assert torch.allclose(ops.segment_sum(one, torch.zeros(50, dtype=torch.int64), 1, few=0), 50 * whole[:1])


@pytest.mark.parametrize("function", [ops.segment_mean, ops.segment_log_softmax])
def test_means_and_softmaxes_are_those_of_the_reference(native, function):
    case = SegmentSum.made(60, 9, (4,))
    assert identical(function(case.x, case.segment, 9), getattr(reference, function.__name__)(case.x, case.segment, 9))
