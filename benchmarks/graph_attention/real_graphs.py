"""Real graphs for the benchmarks, from a store: python -m benchmarks.real_graphs STORE"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.graph_attention.cases import FIELDS, REAL_GRAPHS, REAL_KINDS
from case_fast.batch import Batch, Graphs
from case_fast.data import open_store

DIALOGUES = 16  # a batch, as in the paper's recipe
MOST_BYTES = 32 << 20


def graphs_of(batch: Batch) -> dict[str, Graphs]:
    """Its graphs by their names in `REAL_KINDS`."""
    assert batch.case is not None and batch.concept is not None
    return dict(zip(REAL_KINDS, (batch.case.cognition, batch.concept.graph), strict=True))


def write_real_graphs(store_path: str, out: Path, batches: int = 64, split: str = "test", seed: int = 0) -> int:
    """Write both kinds of graphs of ``batches`` random batches, no words; the size of the file in bytes."""
    store = open_store(store_path)
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for place in range(batches):
        chosen = torch.randperm(store.size(split), generator=generator)[:DIALOGUES]
        for kind, graphs in graphs_of(store.batch(split, chosen.tolist(), seed=0)).items():
            stored |= {f"{kind}.{place}.{field}": getattr(graphs, field).contiguous() for field in FIELDS}
    size = sum(tensor.nbytes for tensor in stored.values())
    if size > MOST_BYTES:
        raise SystemExit(f"{size:,} bytes are more than {MOST_BYTES:,}; take fewer with --batches")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, out, metadata={"split": split, "seed": str(seed), "dialogues": str(DIALOGUES)})
    return out.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graph_attention.real_graphs", description=__doc__)
    parser.add_argument("store", help="folder that case-fast prepare made")
    parser.add_argument("--out", type=Path, default=REAL_GRAPHS)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--split", default="test")
    given = parser.parse_args()
    size = write_real_graphs(given.store, given.out, given.batches, given.split)
    print(f"{given.out}: {given.batches} batches of {DIALOGUES} dialogues, both kinds of graphs, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
