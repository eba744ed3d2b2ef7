"""Run by test_triton_launches.py: every way in which the Triton kernels are launched, against a simulated H100 (simulated_cuda).

    record     a JSON line for each launch, of tensors on cuda:1 while cuda:0 is the current device
    compile    a JSON line for each of `pairwise`, compiled for sm_90; two processes share them: compile 0, compile 1

Sizes are those of training (d = 300) and such that each tile of a family's TILES is taken. float16 is compiled as bfloat16 is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from types import ModuleType

import torch
import triton
from simulated_cuda import Launch, pretending, recording
from torch import Tensor
from triton_worker import print_lines

from case_fast import ops
from case_fast.ops.reference import SCORES

DEVICE = "cuda:1"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DIM = 300


def made(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def full(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def index(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return made(size, dtype=dtype)


def each_tile(kernels: ModuleType, dtype: torch.dtype, name: str = "TILES") -> Iterator[None]:
    """With each of the choices of tiles as the only one."""
    given = getattr(kernels, name)
    try:
        for choice in given[dtype] if isinstance(given, dict) else given:
            setattr(kernels, name, {dtype: (choice,)} if isinstance(given, dict) else (choice,))
            yield
    finally:
        setattr(kernels, name, given)


def each_precision(dtype: torch.dtype) -> Iterator[None]:
    """With what torch may be told of its products in float32."""
    told, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for told.fp32_precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            yield
    finally:
        told.fp32_precision = before


def bilinear_mim(kernels: ModuleType, dtype: torch.dtype) -> None:
    pairs, rows = 5003, 37
    x, y, weight = (made(size, DIM, dtype=dtype) for size in (pairs, rows, DIM))
    positive = index(pairs)
    grads = made(pairs, dtype=full(dtype)), made(pairs, dtype=full(dtype))

    def call(score: str, negatives: int | None = None, seed_at: Tensor | None = None, deterministic: bool = True,
             sizes: Tensor | None = None) -> None:
        given = (x, y, weight if score == SCORES[0] else None, positive)
        numbers = (negatives, 1, seed_at, score, deterministic, sizes)
        *_, saved = kernels.forward(*given, *numbers)
        kernels.backward(*grads, *given, saved, *numbers)

    for _ in each_tile(kernels, dtype):
        for _ in each_precision(dtype):
            call(SCORES[0])
            call(SCORES[0], sizes=index(2))  # as models call it
            call(SCORES[0], deterministic=False)
            call(SCORES[1])
    for seed_at in (None, made(1, dtype=torch.int64)):
        call(SCORES[0], 64, seed_at)


def linear_cross_entropy(kernels: ModuleType, dtype: torch.dtype) -> None:
    rows, words = 233, 22796
    hidden, weight, bias = made(rows, DIM, dtype=dtype), made(words, DIM, dtype=dtype), made(words, dtype=dtype)
    bag, cu_target = index(17 * rows), index(rows + 1)

    def call(target: Tensor, cu_target: Tensor | None, keep: bool) -> None:
        given = (hidden, weight, bias, target, cu_target)
        nll, _, state, kept = kernels.forward(*given, keep)
        kernels.backward(nll, *given, state, kept, [True] * 3)

    for _ in each_tile(kernels, dtype):
        for _ in each_precision(dtype):
            call(index(rows), None, False)
            call(bag, cu_target, False)
    call(index(rows), None, True)
    call(bag, cu_target, True)
    for _ in each_tile(kernels, dtype, "BEST_TILES"):
        kernels.top_words(hidden, weight, bias, 5)


def graph_attention(kernels: ModuleType, dtype: torch.dtype) -> None:
    for (relations, dropout, integers), degree in product(((10, 0.2, torch.int32), (0, 0.0, torch.int64)), (4, 16)):
        vertices, heads, dim = 757, 2, 150
        x, edges = [made(vertices, heads, dim, dtype=dtype) for _ in range(4)], vertices * degree
        tables = [made(relations, heads, dim, dtype=dtype) if relations else None for _ in range(2)]
        given = (*x[:3], index(vertices + 1, integers), index(edges, integers), index(edges, integers) if relations else None)
        for seed_at in (None, made(1, dtype=torch.int64)) if dropout else (None,):
            out, weights = kernels.forward(*given, *tables, 0.1, dropout, 1, seed_at)
            kernels.backward(x[3], *given, *tables, weights, 0.1, dropout, 1, seed_at)


def segment_sum(kernels: ModuleType, dtype: torch.dtype) -> None:
    for rows, width, size in ((700, 1, 16), (700, DIM, 16), (65536, DIM, 4096)):
        segment = index(rows)
        kernels.backward(kernels.forward(made(rows, width, dtype=dtype), segment, size), segment)


def residual_norm(kernels: ModuleType, dtype: torch.dtype) -> None:
    def call(width: int, dropout: float, seed_at: Tensor | None, adds: bool) -> None:
        x, weight, stats = made(750, width, dtype=dtype), made(width, dtype=dtype), made(2, 750, dtype=full(dtype))
        other = x if adds else None
        kernels.forward(x, other, weight, weight, 1e-5, dropout if adds else 0.0, 1, seed_at, x, x, stats)
        kernels.backward(x, stats, weight, other, x, dropout, 1, seed_at, x, x if dropout else None, weight, weight)
        kernels.drop(x, other, dropout, 1, seed_at, x)

    for seed_at in (None, made(1, dtype=torch.int64)):
        for adds in (True, False):
            call(DIM, 0.1, seed_at, adds)
    for adds in (True, False):
        call(DIM, 0.0, None, adds)
    call(1024, 0.1, None, True)


def pooled_attention(kernels: ModuleType, dtype: torch.dtype) -> None:
    for (sequences, rows, width, dropout, integers) in ((430, 2405, DIM, 0.2, torch.int32), (32, 1381, DIM, 0.0, torch.int64),
                                                        (16, 250, 1024, 0.0, torch.int64)):
        query, shared, cu = made(sequences, 2, width, dtype=dtype), made(rows, width, dtype=dtype), index(sequences + 1, integers)
        for seed_at in (None, made(1, dtype=torch.int64)) if dropout else (None,):
            numbers = (0.1, dropout, 1, seed_at)
            out, lse = kernels.forward(query, shared, cu, *numbers)
            kernels.backward(query, query, shared, cu, out, lse, *numbers)


def modules() -> dict[str, ModuleType]:
    """The modules of Triton kernels by their family."""
    names = sorted(path.stem for path in Path(ops.__file__).parent.glob("*_triton.py"))
    return {name.removesuffix("_triton"): importlib.import_module(f"case_fast.ops.{name}") for name in names}


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Of each family and dtype; a new family needs a function of its name here."""
    for (family, kernels), dtype in product(modules().items(), DTYPES):
        yield family, lambda family=family, kernels=kernels, dtype=dtype: globals()[family](kernels, dtype)


def launches() -> list[Launch]:
    with recording() as found, pretending():
        for _, call in calls():
            call()
    return found


def kernels_of_all() -> list[str]:
    """The kernels of all families: what is not a piece of one."""
    return sorted(f"{family}.{name}" for family, module in modules().items() for name, value in vars(module).items()
                  if isinstance(value, triton.runtime.JITFunction) and value.module == module.__name__ and name[0] != "_")


def recorded() -> Iterator[dict]:
    yield {"kernels": kernels_of_all()}
    for launch in launches():
        yield {"kernel": launch.name, "device": launch.device, "variant": hash(launch.variant), "said": launch.said}


def pairwise(every: list[Launch]) -> list[Launch]:
    """Variants in which each kernel has every two values of two arguments that it has together in any of its variants."""
    pairs = {launch.variant: {(launch.name, *pair) for pair in combinations(launch.said.items(), 2)} for launch in every}
    variants = {launch.variant: launch for launch in every}
    left, chosen = set().union(*pairs.values()), []
    while left:
        most = max(pairs, key=lambda variant: len(pairs[variant] & left))
        chosen.append(variants[most])
        left -= pairs.pop(most)
    return chosen


def compiled(part: int) -> Iterator[dict]:
    """Every second of them."""
    for launch in pairwise(launches())[part::2]:
        found, values = launch.compiled, launch.values
        yield {"kernel": launch.name, "said": launch.said, "registers": found.registers, "spilled": found.spilled,
               "blocks": found.blocks, "wgmma": found.wgmma, "target": found.target, "tile": [
                   value for name, value in values.items() if name in ("BLOCK_P", "BLOCK_Q", "BLOCK_T", "BLOCK_V")]}


if __name__ == "__main__":
    print_lines(recorded() if sys.argv[1] == "record" else compiled(int(sys.argv[2])))
