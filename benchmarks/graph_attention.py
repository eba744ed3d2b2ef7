"""`case-fast bench graph_attention`: the op against its peers, forward and with gradients, time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.graph_attention_peers import PEERS, QUICK
from benchmarks.graphs import REAL_GRAPHS, REAL_KINDS, Case, case_of
from benchmarks.measure import MODES, OURS, Timing, Truth, Unfit, Work, WrongResult, seconds, take_turns, thread_counts, tune
from case_fast import equations

SIZES = ("paper", *REAL_KINDS, "1190x84", "1e3", "1e4", "1e5")
QUICK_SIZES = ("100",)
_CHUNK = 4096  # rows at once: the truth of a large graph in little memory


def truth(case: Case) -> Truth:
    """Output and gradients by equations.py in float64; limits by how far the same in the case's dtype is off."""
    names = ("out", "grad_query", "grad_key", "grad_value", "grad_relation_query", "grad_relation_key")
    return Truth.of(names[: 1 + len(case.inputs)], _by_rows(case, torch.float64), _by_rows(case, case.query.dtype))


def _by_rows(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Rows do not need each other: a few at a time."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in case.inputs]
    query, *others = leaves
    outs = []
    for start in range(0, case.vertices, _CHUNK):
        rows = slice(start, min(start + _CHUNK, case.vertices))
        indptr = case.graphs.indptr[rows.start : rows.stop + 1]
        edges = slice(int(indptr[0]), int(indptr[-1]))
        relation = None if case.relation is None else case.relation[edges]
        out = equations.graph_attention(query[rows], *others[:2], indptr - indptr[0], case.graphs.indices[edges], relation,
                                        *others[2:])  # fmt: skip
        out.backward(case.grad_out[rows].to(dtype))
        outs.append(out.detach())
    return [torch.cat(outs), *(x.grad for x in leaves)]


def run(sizes: Sequence[str] = (), quick: bool = False, real: Path = REAL_GRAPHS, rounds: int = 30, budget: float = 30.0,
        peers: dict[str, Callable[[Case], Work]] | None = None, tell: Callable[[str, int, int], None] = lambda *_: None,
        ) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Measure each size and yield {"name", "what", "vertices", ..., "rows": a dict for each peer and mode}.

    Args:
        sizes: names of `graphs.case_of`; default SIZES, of which the real graphs are left out where ``real`` is missing.
        quick: three rounds of what needs no compilation, on one thread: whether all works, not how fast it is.
        rounds, budget: samples of each, and seconds for all samples of a size and mode.
        peers: default `graph_attention_peers.PEERS`; ours must be among them.
        tell: called with what is being done, steps done, steps in all.
    """
    chosen = peers if peers is not None else {name: PEERS[name] for name in (QUICK if quick else PEERS)}
    rounds, counts = (3, [1]) if quick else (rounds, thread_counts())
    if not sizes:
        sizes = QUICK_SIZES if quick else [size for size in SIZES if real.is_file() or size not in REAL_KINDS]
    cases = {size: case_of(size, real) for size in sizes}
    threads = torch.get_num_threads()
    try:
        for case in cases.values():
            yield _measure(case, real, chosen, counts, rounds, budget, tell)
    finally:
        torch.set_num_threads(threads)


def _measure(case: Case, real: Path, peers: dict[str, Callable[[Case], Work]], counts: list[int], rounds: int, budget: float,
             tell: Callable[[str, int, int], None]) -> dict[str, Any]:  # fmt: skip
    tell(f"{case.name}: float64", 0, 1)
    torch.set_num_threads(counts[-1])
    expected = truth(case)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    timings: dict[tuple[str, str], Timing] = {}
    others: dict[str, float | None] = {}
    for mode in MODES:
        torch.compiler.reset()  # each compiled peer is compiled anew for each case, and never falls back to eager for its number
        ready: dict[str, tuple[Work, Timing, float]] = {}
        for place, (name, prepare) in enumerate(peers.items()):
            tell(f"{case.name}, {mode}: checking {name}", place, len(peers))
            rows[name, mode] = row = {"peer": name, "mode": mode}
            try:
                work = prepare(case)
                if mode == MODES[1] and not work.trains:
                    raise Unfit(work.note)
                ready[name] = (work, *tune(work, mode, expected, counts))
                if work.note:
                    row["note"] = work.note
                if work.part is not None:
                    with torch.no_grad():
                        work.part()  # compiled, perhaps
                        row["part"] = {"name": work.part_name, "ms": 1e3 * min(seconds(work.part) for _ in range(5))}
            except Unfit as why:
                row["left_out"] = str(why)
            except WrongResult as why:
                row["refused"] = str(why)
                if name == OURS:
                    raise WrongResult(f"{case.name}, {mode}: {name}: {why}") from why
        others[mode] = take_turns(ready, mode, rounds, budget,
                                  lambda done, total, mode=mode: tell(f"{case.name}, {mode}", done, total))  # fmt: skip
        timings |= {(name, mode): timing for name, (_, timing, _) in ready.items()}
    del ready, work
    tell(f"{case.name}: memory", 0, 1)
    extra = memory.measure("graph_attention", case.name, real, [(*key, timing.threads) for key, timing in timings.items()
                                                                if key[0] in PEERS])  # fmt: skip
    for key, taken in zip([key for key in timings if key[0] in PEERS], extra, strict=True):
        rows[key]["extra_bytes"] = taken
    for key, timing in timings.items():
        low, high = timing.quartiles
        rows[key] |= {"threads": timing.threads, "median_ms": 1e3 * timing.median, "quartiles_ms": [1e3 * low, 1e3 * high],
                      "fastest_ms": 1e3 * min(timing.samples), "rounds": len(timing.samples),
                      "error_over_limit": timing.error}  # fmt: skip
    heads, dimension = case.query.shape[1:]
    relations = 0 if case.relation_query is None else case.relation_query.shape[0]
    return {"name": case.name, "what": case.what, "vertices": case.vertices, "edges": case.edges, "heads": heads,
            "dimension": dimension, "relations": relations, "cores_busy_with_others": others,
            "rows": list(rows.values())}  # fmt: skip
