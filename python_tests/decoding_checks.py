"""Do the ways to decode agree, word for word, on real contexts with trained weights?

    python -m python_tests.decoding_checks RUN STORE --contexts 1000

RUN is a run folder or one that save_pretrained wrote, STORE a prepared store. Greedy and beam search each run four times:
with and without the key-value cache, by the kernels (fused) and by equations.py (plain). Two replies may differ only where
the scores that decided between them lie within 1e-4 of each other, in float64; such near ties are counted, and must be fewer
than 0.5 %. The exit status is 1 if the rule is broken.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))  # what tests share is imported by bare names

from helpers import as_double

import case_fast
from case_fast import equations as eq
from case_fast.batch import Batch
from case_fast.data.vocabulary import BOS, EOS
from case_fast.generation import Generated, GenerationConfig, _forbid, generate
from case_fast.models import DialogueModel, load
from case_fast.models.base import evaluating
from case_fast.models.layers import Memory

GAP, SHARE = 1e-4, 0.005
STRATEGIES = {"greedy": GenerationConfig(), "beam 5": GenerationConfig("beam", beams=5)}
WAYS = {"fused, cached": ("", True), "fused, uncached": ("", False), "plain, cached": ("reference", True),
        "plain, uncached": ("reference", False)}
PAIRS = [("fused, cached", "fused, uncached"), ("plain, cached", "plain, uncached"), ("fused, cached", "plain, cached")]

Words = tuple[int, ...]
Trace = list[dict[int, set[Words]]]  # for each dialogue: the hypotheses that lived at each length


class Uncached:
    """A decoder's state without a cache: the inputs of all words so far, read again at each step; memories are copied."""

    def __init__(self, decoder: torch.nn.Module, memories: Sequence[Memory], beams: int, words: int,
                 start: Tensor | None = None, added: Tensor | None = None, fixed: bool = False):
        self.decoder, self.memories, self.beams, self.start = decoder, memories, beams, start
        self.added = None if added is None else added.repeat_interleave(beams, 0)
        self.dialogues, self.position = memories[0].cu.numel() - 1, torch.tensor(0)
        self.dialogue = torch.arange(self.dialogues).repeat_interleave(beams)  # of each hypothesis
        self.inputs = memories[0].rows.new_empty(len(self.dialogue), 0, memories[0].rows.shape[1])

    def next_place(self) -> Tensor:
        return self.places[self.position]

    def of_hypotheses(self, rows: Tensor) -> Tensor:
        return rows[self.dialogue]

    def reorder(self, origin: Tensor) -> None:
        self.inputs, self.dialogue = self.inputs[origin], self.dialogue[origin]
        self.added = None if self.added is None else self.added[origin]

    def keep(self, kept: Tensor, dialogues: int) -> None:
        assert len(kept) == dialogues
        self.dialogues = dialogues
        self.reorder((kept[:, None] * self.beams + torch.arange(self.beams)).flatten())

    def step(self, x: Tensor) -> Tensor:
        self.position += 1
        self.inputs = torch.cat([self.inputs, x.unsqueeze(1)], dim=1)
        count, length = self.inputs.shape[:2]
        cu = torch.arange(count + 1) * length
        copies = []
        for memory in self.memories:
            size = (memory.cu[1:] - memory.cu[:-1])[self.dialogue]
            offsets = torch.cat([size.new_zeros(1), size.cumsum(0)])
            row = eq.segment_positions(offsets, int(offsets[-1])) + memory.cu[self.dialogue].repeat_interleave(size)
            copies.append(Memory(eq.take(memory.rows, row), offsets))
        return eq.take(self.decoder(self.inputs.flatten(0, 1), cu, copies, added=self.added), cu[1:] - 1)


@contextmanager
def without_cache(decoder: torch.nn.Module) -> Iterator[None]:
    decoder.start = lambda *given, **named: Uncached(decoder, *given, **named)
    decoder.step = lambda x, state: state.step(x)
    try:
        yield
    finally:
        del decoder.start, decoder.step


@contextmanager
def traced(model: DialogueModel, trace: Trace) -> Iterator[None]:
    """Notes in ``trace`` which hypotheses of each dialogue live at each length."""
    start, decode = model.start_decoding, model._decode_step

    def start_decoding(reading: object, beams: int, *more: object) -> object:
        state = start(reading, beams, *more)
        count = reading.memories[0].cu.numel() - 1
        state.said, state.number = [()] * (count * beams), list(range(count))
        first = len(trace)
        trace.extend({} for _ in range(count))
        reorder, keep = state.reorder, state.keep

        def reordered(origin: Tensor) -> None:
            state.said = [state.said[place] for place in origin.tolist()]
            reorder(origin)

        def kept(which: Tensor, dialogues: int) -> None:
            keep(which, dialogues)  # reorders
            state.number = [state.number[place] for place in which.tolist()]

        state.reorder, state.keep, state.first = reordered, kept, first
        return state

    def decoded(words: Tensor, state: object) -> Tensor:
        beams, position = len(state.said) // len(state.number), int(state.position)
        state.said = [(*said, word) for said, word in zip(state.said, words.tolist(), strict=True)]
        for place, number in enumerate(state.number):
            trace[state.first + number][position] = set(state.said[place * beams : (place + 1) * beams])
        return decode(words, state)

    model.start_decoding, model._decode_step = start_decoding, decoded
    try:
        yield
    finally:
        del model.start_decoding, model._decode_step


@contextmanager
def backend(name: str) -> Iterator[None]:
    before = os.environ.pop("CASE_FAST_BACKEND", None)
    if name:
        os.environ["CASE_FAST_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("CASE_FAST_BACKEND", None)
        if before is not None:
            os.environ["CASE_FAST_BACKEND"] = before


def decode(model: DialogueModel, batch: Batch, config: GenerationConfig, way: str) -> tuple[list[Generated], Trace]:
    """The replies of one batch by one of WAYS, and how they were found."""
    name, cached = WAYS[way]
    trace: Trace = []
    with backend(name), traced(model, trace), nullcontext() if cached else without_cache(model.decoder):
        return generate(model, batch, config), trace


def score(model: DialogueModel, batch: Batch, dialogue: int, words: Words, config: GenerationConfig) -> float:
    """log P of words (EOS included where they end with it) after BOS; exact enough to judge: in float64 by equations.py."""
    with backend("reference"), evaluating(model):
        alone = model.read(batch).repeat(dialogue, 1)
        logits = model.reply_logits(torch.tensor([BOS, *words[:-1]]), torch.tensor([0, len(words)]), alone)
        for step in range(len(words)):
            _forbid(logits[step : step + 1], config, step)
        return float(logits.log_softmax(1)[torch.arange(len(words)), torch.tensor(words)].sum())


def deciding_gap(exact: Callable[[Words], float], found: tuple[Generated, Generated],
                 traces: tuple[dict[int, set[Words]], dict[int, set[Words]]], config: GenerationConfig) -> float:
    """How far apart in score those lie between which the two searches decided differently, at the first such decision."""
    for length in range(1, min(map(len, traces))):
        one, other = ({said[1:] for said in trace[length]} for trace in traces)  # without BOS
        if one != other:
            scores = [[exact(words) for words in side] for side in (one - other, other - one)]
            return max(abs(a - b) for a in scores[0] for b in scores[1])
    ranks = []  # the same hypotheses to the end: the choice among the ended ones
    for reply in found:
        words = (*reply.words, EOS) if reply.ended_by == "eos" else reply.words
        ranks.append(exact(words) / len(words) ** (config.length_penalty if config.strategy == "beam" else 0))
    return abs(ranks[0] - ranks[1])


@dataclass
class Tally:
    contexts: int = 0
    different: int = 0
    gaps: list[float] = field(default_factory=list)  # of the different ones
    distinct: set[Words] = field(default_factory=set)  # replies

    @property
    def holds(self) -> bool:
        return all(gap < GAP for gap in self.gaps) and self.different <= SHARE * self.contexts


def compare(model: DialogueModel, batches: Sequence[Batch], config: GenerationConfig,
            tell: Callable[[int], None] = lambda done: None) -> dict[tuple[str, str], Tally]:
    """For each pair of ways, how many replies differ and by what gap."""
    tallies = {pair: Tally() for pair in PAIRS}
    double = copy.deepcopy(model).double()
    for done, batch in enumerate(batches):
        found = {way: decode(model, batch, config, way) for way in WAYS}
        for (one, other), tally in tallies.items():
            (replies, traces), (other_replies, other_traces) = found[one], found[other]
            tally.contexts += len(replies)
            tally.distinct.update(reply.words for reply in replies)
            for place, pair in enumerate(zip(replies, other_replies, strict=True)):
                if pair[0].words == pair[1].words and pair[0].ended_by == pair[1].ended_by:
                    continue
                exactly = as_double(copy.deepcopy(batch))

                def exact(words: Words, batch: Batch = exactly, place: int = place) -> float:
                    return score(double, batch, place, words, config)

                tally.different += 1
                tally.gaps.append(deciding_gap(exact, pair, (traces[place], other_traces[place]), config))
        tell(done + 1)
    return tallies


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--contexts", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of contexts")
    options = parser.parse_args(arguments)
    weights = options.run / "best"
    model = load(weights if weights.is_dir() else options.run)
    store = case_fast.open_store(options.store)
    order = torch.randperm(store.size(options.split), generator=torch.Generator().manual_seed(options.seed))
    chosen, size = order[: options.contexts].tolist(), options.batch_size
    batches = [store.batch(options.split, chosen[at : at + size], model.needs, 0) for at in range(0, len(chosen), size)]
    print(f"{len(chosen)} contexts of {options.split}, batches of {size}; replies may differ only where the deciding scores lie "
          f"within {GAP:g}, and in at most {SHARE:.1%}\n")
    print("| strategy | ways | contexts | distinct | equal | near ties | violations | largest gap | |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    held = True
    for name, config in STRATEGIES.items():
        started = time.monotonic()

        def tell(done: int, name: str = name, started: float = started) -> None:
            print(f"{name}: batch {done} of {len(batches)}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

        for (one, other), tally in compare(model, batches, config, tell).items():
            held &= tally.holds
            wrong = sum(not gap < GAP for gap in tally.gaps)
            cells = (name, f"{one} = {other}", tally.contexts, len(tally.distinct), tally.contexts - tally.different,
                     tally.different - wrong, wrong, f"{max(tally.gaps, default=0):.2g}",
                     "holds" if tally.holds else "BROKEN")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
