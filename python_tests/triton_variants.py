"""How many variants of its kernels Triton would compile on an H100 in the first steps of training; no GPU is needed to tell.

    python -m python_tests.triton_variants --store ED.store --steps 300    a count for each kernel
    python -m python_tests.triton_variants --store ED.store --compile      and what the assembler says of each variant

The model runs on CPU. Each op that Triton would run there, since the native module has no CUDA code for its family, is called a
second time as a GPU would call it, with the same tensors and against a simulated driver (`simulated_cuda`).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))  # what tests share is imported by bare names

import torch
from simulated_cuda import Launch, recording
from torch import Tensor

from case_fast import ops
from case_fast.data.store import Store, open_store
from case_fast.models import CASE, CASEConfig
from case_fast.training.sampler import Sampler, step_seed

ROOT = Path(__file__).resolve().parents[1]
BATCH = 16


def families() -> list[str]:
    """The families of ops that run on Triton where the native module was built with CUDA."""
    found = (path.stem.removesuffix("_triton") for path in Path(ops.__file__).parent.glob("*_triton.py"))
    return sorted(name for name in found if not (ROOT / "csrc" / name / "cuda.cu").exists())


@contextmanager
def called_twice() -> Iterator[None]:
    """A step in which each of those ops is called on Triton too, whose results go to its own backward and nowhere else."""
    with ExitStack() as stack:
        for family in families():
            module = importlib.import_module(f"case_fast.ops.{family}")
            for name, function in _both_ways(module).items():
                stack.enter_context(patch.object(module, name, function))
        yield


def _both_ways(module: ModuleType) -> dict[str, Callable]:
    forward, backward = module._forward, module._backward
    made: dict[int, tuple[Tensor, Tensor]] = {}  # by address: what the op kept, and what Triton would have kept

    def forward_twice(runs: str, *given):
        found, other = forward(runs, *given), forward("triton", *given)
        pairs = zip(found, other, strict=True) if isinstance(found, tuple) else [(found, other)]
        made.update((x.data_ptr(), (x, y)) for x, y in pairs)
        return found

    def backward_twice(runs: str, *given):
        backward("triton", *(made[x.data_ptr()][1] if isinstance(x, Tensor) and x.data_ptr() in made else x for x in given))
        return backward(runs, *given)

    ways = {"_forward": forward_twice, "_backward": backward_twice}
    if hasattr(module, "_is_plain"):  # on CPU alone, small calls go to plain torch
        ways["_is_plain"] = lambda *_: False
    return ways


def launches_of_training(store: Store, steps: int, config: CASEConfig | None = None, batch_size: int = BATCH
                         ) -> dict[str, list[Launch]]:
    """The launches of the first steps of each phase, by its name."""
    torch.manual_seed(0)
    model = CASE(replace(config or CASEConfig(), vocab_size=len(store.featurizer.vocabulary))).train()
    sampler, found = Sampler(store.size("train"), batch_size, 0), {}
    for phase in model.phases:
        model.set_phase(phase)
        with recording() as launches:
            for step in range(steps):
                batch = store.batch("train", sampler.indices(step), model.needs, step_seed(0, step))
                with called_twice():
                    model(batch._map(torch.clone)).loss.backward()  # each tensor in memory of its own, as on a GPU
                model.zero_grad(set_to_none=True)
        found[phase] = launches
    return found


def variants(launches: list[Launch]) -> list[Launch]:
    """The first launch of each."""
    return list({launch.variant: launch for launch in reversed(launches)}.values())[::-1]


def differing(launches: list[Launch]) -> dict[str, list[str]]:
    """Of one kernel's variants, the arguments that are not the same in all."""
    said = [launch.said for launch in launches]
    names = dict.fromkeys(itertools.chain.from_iterable(said))
    return {name: [of.get(name, "") for of in said] for name in names if len({of.get(name) for of in said}) > 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--steps", type=int, default=300, help="of each phase")
    parser.add_argument("--compile", action="store_true", help="and compile each variant")
    parser.add_argument("--json", action="store_true", help="the counts alone, a JSON line for each phase and for both")
    given = parser.parse_args()
    found = launches_of_training(open_store(given.store), given.steps)
    found["both"] = [launch for launches in found.values() for launch in launches]
    for phase, launches in found.items():
        counts = {"phase": phase, "launches": len(launches), "variants": len(variants(launches))}
        print(json.dumps(counts) if given.json else "phase {phase}: {launches} launches, {variants} variants".format(**counts))
    if not given.json:
        print_kernels(variants(found["both"]), given.compile)


def print_kernels(every: list[Launch], with_resources: bool) -> None:
    """Of each kernel its variants and what tells them apart."""
    for name, count in Counter(launch.name for launch in every).items():
        own = [launch for launch in every if launch.name == name]
        print(f"  {name:<42} {count:>3}")
        for argument, values in differing(own).items():
            print(f"      {argument:<16} {' | '.join(values)}")
        for launch in own if with_resources else ():
            c = launch.compiled
            print(f"      {c.registers} registers, {c.spilled} bytes spilled, {c.shared} bytes shared, {c.warps} warps, "
                  f"{c.blocks} blocks an SM; global memory by 16 bytes: {c.wide('ld')} loads, {c.wide('st')} stores")


if __name__ == "__main__":
    main()
