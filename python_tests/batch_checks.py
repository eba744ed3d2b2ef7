"""Does a dialogue depend on the batch that it comes in? On real dialogues, for trained weights of any model.

    python -m python_tests.batch_checks STORE RUN [RUN ...] --dialogues 200

Each dialogue alone, in batches of 16, and in batches of 7 in another order: hidden rows, -log P of each word and the emotion's
logits in float64 must be the same to 1e-10, and so must the gradients of all weights, summed over the dialogues, of
-log P. The largest differences in float32 are shown beside them. The exit status is 1 if the rule is broken.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))  # what tests share is imported by bare names

from helpers import as_double, model_outputs

import case_fast
from case_fast.batch import Batch
from case_fast.data import Store
from case_fast.models import DialogueModel, load, title_of

TOLERANCE = 1e-10
Outputs = list[dict[str, Tensor]]


def passed(model: DialogueModel, store: Store, split: str, order: Sequence[int], size: int, to: Callable[[Batch], Batch],
           gradients: bool) -> tuple[dict[int, dict[str, Tensor]], list[Tensor]]:
    """Each dialogue's outputs by its number, and the gradients of the sum of -log P over all of them."""
    found: dict[int, dict[str, Tensor]] = {}
    wanted = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in wanted] if gradients else []
    for at in range(0, len(order), size):
        some = list(order[at : at + size])
        batch = to(store.batch(split, some, model.needs, 0))
        with torch.set_grad_enabled(gradients):
            outputs: Outputs = model_outputs(model, batch)
        found |= {number: {name: rows.detach() for name, rows in own.items()} for number, own in zip(some, outputs, strict=True)}
        if gradients:
            loss = sum(own["nll"].sum() for own in outputs)
            for kept, own in zip(total, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
                if own is not None:
                    kept += own
    return found, total


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the larger of 1 and the other's largest value."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1)) if other.numel() else 0.0


def furthest(found: dict[int, dict[str, Tensor]], other: dict[int, dict[str, Tensor]]) -> float:
    return max(distance(found[number][name], rows) for number, own in other.items() for name, rows in own.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--split", default="test")
    parser.add_argument("--dialogues", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of dialogues")
    options = parser.parse_args(arguments)
    store = case_fast.open_store(options.store)
    draws = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(store.size(options.split), generator=draws)[: options.dialogues].tolist()
    other = [chosen[place] for place in torch.randperm(len(chosen), generator=draws).tolist()]
    print(f"{len(chosen)} dialogues of {options.split}; in float64 they may differ by {TOLERANCE:g}\n")
    print("| model | batches of 16 | of 7, other order | gradients | float32, batches of 16 | |")
    print("|---|---:|---:|---:|---:|---|")
    held = True
    for run in options.runs:
        weights = run / "best"
        single = load(weights if weights.is_dir() else run).eval()
        model = copy.deepcopy(single).double()
        alone, one_by_one = passed(model, store, options.split, chosen, 1, as_double, True)
        together, at_once = passed(model, store, options.split, chosen, 16, as_double, True)
        shuffled, _ = passed(model, store, options.split, other, 7, as_double, False)
        outputs, mixed = furthest(together, alone), furthest(shuffled, alone)
        gradients = max(distance(a, b) for a, b in zip(at_once, one_by_one, strict=True))
        apart, _ = passed(single, store, options.split, chosen, 1, lambda batch: batch, False)
        near, _ = passed(single, store, options.split, chosen, 16, lambda batch: batch, False)
        holds = max(outputs, mixed, gradients) <= TOLERANCE
        held &= holds
        cells = [title_of(model.config.kind), *(f"{x:.1g}" for x in (outputs, mixed, gradients, furthest(near, apart)))]
        print(f"| {' | '.join(cells)} | {'holds' if holds else 'BROKEN'} |", flush=True)
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
