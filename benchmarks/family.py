"""What is measured, and against what: a family of kernels, put together from its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from benchmarks.measure import OURS, Case, Truth, Work, Yardstick

Peers = dict[str, Callable[[Any], Work | Yardstick]]  # OURS first
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}


@dataclass(frozen=True)
class Family:
    """`cases.py` and `peers.py` of a folder; on a GPU, our kernels and the peers and sizes that its `gpu.py` names."""

    name: str
    case_of: Callable[..., Case]  # (size, device="cpu", dtype=torch.float32); ConfigError where the size is unknown
    truth: Callable[[Any], Truth]  # of a case
    peers: Peers
    sizes: Sequence[str]
    quick_sizes: Sequence[str]
    axis: str  # what `Case.size` counts: the picture's
    device: str = "cpu"

    @property
    def quick(self) -> Peers:
        """The peers that need no compilation."""
        return {name: prepare for name, prepare in self.peers.items() if "torch.compile" not in name}


def family_of(name: str, device: str = "cpu") -> Family:
    """One of `benchmarks.families()`, as it is measured on "cpu" or "cuda"."""
    cases, others = (import_module(f"benchmarks.{name}.{part}") for part in ("cases", "peers"))
    peers, sizes = others.PEERS, cases.SIZES
    if device == "cuda":
        gpu = import_module(f"benchmarks.{name}.gpu")
        sizes = gpu.SIZES
        peers = {way: _switched(peers[OURS], switch) for way, switch in gpu.WAYS.items()} | {n: peers[n] for n in gpu.PEERS}
    return Family(name, cases.case_of, cases.truth, peers, sizes, cases.QUICK_SIZES, cases.AXIS, device)


def _switched(prepare: Callable[[Any], Work], switch: Callable[[], AbstractContextManager]) -> Callable[[Any], Work]:
    def prepared(case: Case) -> Work:
        with switch():
            work = prepare(case)
        work.switch = switch
        return work

    return prepared
