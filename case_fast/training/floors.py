"""The least time that an op could take on a machine: what it must multiply and move, by the rates of products and of memory.

``COSTS`` is the one place that knows what an op costs: from the shapes that the profiler saw, floating-point operations without
any that is made again, and bytes with each input read and each result written once. An op that is not in it has bytes alone, its
inputs read once. Offsets hold numbers that no shape shows: the sequences of an attention count as equally long, which for
attention of sequences to themselves is the least that they can be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from case_fast import ops

_WIDTH = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "bool": 1, "unsigned char": 1}
# These give a view, or room that nothing was written to.
_FREE = frozenset(
    "aten::" + name for name in """alias as_strided chunk detach detach_ empty empty_like empty_strided expand expand_as flatten
    lift_fresh narrow new_empty new_empty_strided permute resize_ reshape result_type select slice split split_with_sizes squeeze
    t transpose unbind unflatten unsqueeze view view_as _reshape_alias _unsafe_view""".split()
)


@dataclass(frozen=True)
class Rates:
    """Of a device: floating-point operations a second in products of float32 matrices, bytes read and written a second."""

    flop: float
    bytes: float

    def seconds(self, flop: float, moved: float) -> float:
        return max(flop / self.flop, moved / self.bytes)


def measure_rates(device: torch.device, seconds: float = 0.5) -> Rates:
    """The best of as many calls as fit: of square products, by torch and by this package; of going over 256 MiB in place, and of
    copying one half to the other, which reads what it will write over besides."""
    x, y = (torch.randn(1024, 1024, device=device) for _ in range(2))
    memory = torch.zeros(1 << 26, device=device)
    half = memory.numel() // 2
    products = [_fastest(lambda product=product: product(x, y), device, seconds / 2) for product in _products()]
    in_place = _fastest(lambda: memory.mul_(1.0), device, seconds / 2)
    copied = _fastest(lambda: memory[:half].copy_(memory[half:]), device, seconds / 2)
    return Rates(2 * 1024**3 / min(products), memory.nbytes * max(2 / in_place, 1 / copied))


def _products() -> list[Callable]:
    own = getattr(ops, "linear", None)
    return [torch.mm] if own is None else [torch.mm, own]


def _fastest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    best, until = math.inf, time.perf_counter() + seconds
    with torch.no_grad():
        while best == math.inf or time.perf_counter() < until:
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
    return best


@dataclass(frozen=True)
class Call:
    """An op as the profiler saw it: for each argument the shape (a list of them for a list of tensors, [] for what is no tensor),
    its dtype's name, its value where it is a number."""

    shapes: Sequence[Any]
    dtypes: Sequence[str]
    values: Sequence[Any]

    def count(self, *places: int) -> int:
        """Elements of these arguments together."""
        return sum(_elements(self.shapes[place]) for place in places if place < len(self.shapes))

    def bytes(self, *places: int) -> int:
        return sum(_elements(self.shapes[place]) * self.width(place) for place in places if place < len(self.shapes))

    def width(self, place: int) -> int:
        """Bytes of an element; a list of tensors counts as float32."""
        return _WIDTH.get(self.dtypes[place], 4)


def _elements(shape: Any) -> int:
    if not shape:
        return 0
    return sum(map(_elements, shape)) if isinstance(shape[0], list | tuple) else math.prod(shape)


Cost = tuple[float, float]


def cost(name: str, call: Call) -> Cost:
    """(operations, bytes) that an op cannot do without."""
    if name in _FREE:
        return 0.0, 0.0
    if name in COSTS:
        return COSTS[name](call)
    return 0.0, sum(call.bytes(place) for place in range(len(call.shapes)))


def _product(a: int, b: int) -> Callable[[Call], Cost]:
    """Of matrices (..., m, k) and (..., k, n), the arguments a and b."""

    def of(call: Call) -> Cost:
        columns = call.shapes[b][-1]
        out = call.count(a) // max(1, call.shapes[a][-1]) * columns
        return 2.0 * call.count(a) * columns, call.bytes(a, b) + out * call.width(a)

    return of


def _moves(*places: int) -> Callable[[Call], Cost]:
    """Bytes of these arguments, as often as each is named: a result counts as the argument whose shape it has."""
    return lambda call: (0.0, sum(call.bytes(place) for place in places))


def _rows(x: int, index: int) -> Callable[[Call], Cost]:
    """Rows of argument x read at an index, and written."""

    def of(call: Call) -> Cost:
        width = call.count(x) / max(1, call.shapes[x][0])
        return 0.0, 2 * call.count(index) * width * call.width(x) + call.bytes(index)

    return of


def _adam(call: Call) -> Cost:
    """Weights, gradients and both moments read, all but the gradients written."""
    return 0.0, 4.0 * (2 * call.count(0, 2, 3) + call.count(1))


def _linear(products: int) -> Callable[[Call], Cost]:
    """x (n, ..., K) and a list of weights (..., N, K); backward has grad_y before them, and two products."""

    def of(call: Call) -> Cost:
        x = 1 if products == 1 else 2
        out = call.count(x) // max(1, call.shapes[x][-1]) * sum(weight[-2] for weight in call.shapes[x + 1])
        flop = 2.0 * products * out * call.shapes[x][-1]
        return flop, products * call.bytes(x, x + 1) + out * call.width(x)

    return of


def _pairs(queries: Sequence[int], keys: Sequence[int], cu: Sequence[int]) -> float:
    """Rows of queries times the keys of their sequence, with sequences of equal length."""
    return queries[0] * keys[0] / max(1, cu[0] - 1)


def _packed_attention(first: int) -> Callable[[Call], Cost]:
    """query, key, value, cu_query from argument ``first`` on; two products forward, four backward."""

    def of(call: Call) -> Cost:
        query, key = call.shapes[first], call.shapes[first + 1]
        flop = 2.0 * (2 if first == 1 else 4) * _pairs(query, key, call.shapes[first + 4]) * math.prod(query[1:])
        return flop, (1 if first == 1 else 2) * call.bytes(first, first + 1, first + 2) + call.bytes(first)

    return of


def _pooled_attention(first: int) -> Callable[[Call], Cost]:
    """query (s, H, d), rows (T, d): all heads over the same rows."""

    def of(call: Call) -> Cost:
        flop = 2.0 * (2 if first == 1 else 4) * call.count(first + 1) * call.shapes[first][1]
        return flop, (1 if first == 1 else 2) * call.bytes(first, first + 1) + call.bytes(first)

    return of


def _graph_attention(first: int) -> Callable[[Call], Cost]:
    """query, key, value, indptr, indices from argument ``first`` on."""

    def of(call: Call) -> Cost:
        edges = call.shapes[first + 4][0]
        flop = 2.0 * (2 if first == 1 else 4) * edges * math.prod(call.shapes[first][1:])
        return flop, (1 if first == 1 else 2) * call.bytes(first, first + 1, first + 2) + call.bytes(first, first + 4)

    return of


def _cross_attention(first: int) -> Callable[[Call], Cost]:
    """hidden (T, d), cu_hidden, and of each source key, value (Tk, H, D), or rows (Tk, d) and what makes these of them (H, D, d)
    each; norm's weight and bias, two projections. And cu_keys."""

    def of(call: Call) -> Cost:
        (rows, width), cu, floats, sources = (call.shapes[first + i] for i in range(4))
        each, flop = len(floats) // len(sources), 0.0
        for key, weight in zip(floats[::each], floats[1::each], strict=True):
            over_rows = len(key) == 2
            heads, dimension = weight[:2] if over_rows else key[1:]
            inner = heads * dimension
            attended = heads * width if over_rows else inner
            flop += (8.0 if over_rows else 4.0) * rows * width * inner + 4.0 * _pairs([rows], key, cu) * attended
        return flop * (1 if first == 1 else 2), 2 * call.bytes(first) + (1 if first == 1 else 2) * call.bytes(first + 2)

    return of


def _bilinear_mim(first: int) -> Callable[[Call], Cost]:
    """x (P, d), y (Q, d), weight (d, d) or none, from argument ``first`` on; every pair is scored."""

    def of(call: Call) -> Cost:
        (p, d), (q, _) = call.shapes[first], call.shapes[first + 1]
        flop = 2.0 * p * q * d + (2.0 * min(p, q) * d * d if call.shapes[first + 2] else 0.0)
        return flop * (1 if first == 1 else 2), (1 if first == 1 else 2) * call.bytes(first, first + 1, first + 2)

    return of


def _linear_cross_entropy(first: int) -> Callable[[Call], Cost]:
    """hidden (T, d), weight (V, d) from argument ``first`` on."""

    def of(call: Call) -> Cost:
        flop = 2.0 * (1 if first == 1 else 2) * call.count(first) * call.shapes[first + 1][0]
        return flop, (1 if first == 1 else 2) * call.bytes(first, first + 1)

    return of


def _segment_sum(call: Call) -> Cost:
    """x (n, ...), segment, size: rows read, sums written."""
    width = call.count(1) / max(1, call.shapes[1][0])
    return 0.0, call.bytes(1, 2) + (call.values[3] or 0) * width * call.width(1)


def _embedding_gradient(call: Call) -> Cost:
    """grad (n, d), indices, how many words: the gradient of the whole table is written."""
    return 0.0, call.bytes(0, 1) + (call.values[2] or 0) * call.shapes[0][-1] * call.width(0)


COSTS: dict[str, Callable[[Call], Cost]] = {
    "aten::mm": _product(0, 1),
    "aten::bmm": _product(0, 1),
    "aten::addmm": _product(1, 2),
    "aten::native_layer_norm": _moves(0, 0),
    "aten::native_layer_norm_backward": _moves(0, 1, 1),
    "aten::add": _moves(0, 1, 0),
    "aten::add_": _moves(0, 1, 0),
    "aten::mul": _moves(0, 1, 0),
    "aten::mul_": _moves(0, 1, 0),
    "aten::relu": _moves(0, 0),
    "aten::gelu": _moves(0, 0),
    "aten::threshold_backward": _moves(0, 1, 0),
    "aten::gelu_backward": _moves(0, 1, 0),
    "aten::copy_": _moves(0, 1),
    "aten::fill_": _moves(0),
    "aten::zero_": _moves(0),
    "aten::bernoulli_": _moves(0),
    "aten::index_select": _rows(0, 2),
    "aten::embedding": _rows(0, 1),
    "aten::embedding_dense_backward": _embedding_gradient,
    "aten::_fused_adam_": _adam,
    "case_fast::linear_forward": _linear(1),
    "case_fast::linear_backward": _linear(2),
    "case_fast::residual_norm_forward": _moves(1, 1, 2, 2),
    "case_fast::residual_norm_backward": _moves(1, 1, 2, 2),
    "case_fast::packed_attention_forward": _packed_attention(1),
    "case_fast::packed_attention_backward": _packed_attention(2),
    "case_fast::pooled_attention_forward": _pooled_attention(1),
    "case_fast::pooled_attention_backward": _pooled_attention(2),
    "case_fast::graph_attention_forward": _graph_attention(1),
    "case_fast::graph_attention_backward": _graph_attention(2),
    "case_fast::cross_attention_forward": _cross_attention(1),
    "case_fast::cross_attention_backward": _cross_attention(2),
    "case_fast::bilinear_mim_forward": _bilinear_mim(1),
    "case_fast::bilinear_mim_backward": _bilinear_mim(3),
    "case_fast::linear_cross_entropy_forward": _linear_cross_entropy(1),
    "case_fast::linear_cross_entropy_backward": _linear_cross_entropy(2),
    "case_fast::segment_sum_forward": _segment_sum,
    "case_fast::segment_sum_backward": _rows(1, 2),
}
