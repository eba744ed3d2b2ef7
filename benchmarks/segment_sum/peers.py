"""Every way to sum rows by segment that we measure ourselves against. A peer's index is ready in the shape that it needs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.measure import OURS, Work
from benchmarks.segment_sum.cases import SegmentCase
from case_fast import ops


def ours(case: SegmentCase) -> Work:
    return Work(lambda x: ops.segment_sum(x, case.segment, case.segments), case.inputs, case.grad_out)


def kernel(case: SegmentCase) -> Work:
    """Ours by its kernel, however few the elements."""
    return Work(lambda x: ops.segment_sum(x, case.segment, case.segments, few=0), case.inputs, case.grad_out)


def index_add(case: SegmentCase) -> Work:
    def add(x: Tensor) -> Tensor:
        return x.new_zeros(case.grad_out.shape).index_add_(0, case.segment, x)

    return Work(add, case.inputs, case.grad_out)


def scatter_reduce(case: SegmentCase) -> Work:
    index = _of_elements(case)

    def add(x: Tensor) -> Tensor:
        return x.new_zeros(case.grad_out.shape).scatter_reduce_(0, index, x, "sum")

    return Work(add, case.inputs, case.grad_out)


def scatter_add(case: SegmentCase) -> Work:
    """Its gradient is a gather of torch's own, faster than the index_select that index_add's is."""
    index = _of_elements(case)

    def add(x: Tensor) -> Tensor:
        return x.new_zeros(case.grad_out.shape).scatter_add_(0, index, x)

    return Work(add, case.inputs, case.grad_out)


def _of_elements(case: SegmentCase) -> Tensor:
    return case.segment.view(-1, *[1] * (case.x.dim() - 1)).expand_as(case.x)


PEERS: dict[str, Callable[[SegmentCase], Work]] = {
    OURS: ours,
    f"{OURS}, by its kernel": kernel,
    "index_add, eager": index_add,
    "scatter_add, eager": scatter_add,
    "scatter_reduce, eager": scatter_reduce,
}
