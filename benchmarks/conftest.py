"""`pytest benchmarks --family graph_attention --sizes paper,1e3`: each peer by itself. `case-fast bench` times them in turns, and
is what we publish."""

from __future__ import annotations

import pytest

from benchmarks import families
from benchmarks.family import family_of
from benchmarks.measure import MODES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family", default=",".join(families()), help="kernels to measure; default all")
    parser.addoption("--sizes", default="", help="names of cases; default a small one of each family")
    parser.addoption("--threads", type=int, help="for every peer; default: its best")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "peer" in metafunc.fixturenames:
        chosen = []
        for name in metafunc.config.getoption("--family").split(","):
            family = family_of(name)
            sizes = [size for size in metafunc.config.getoption("--sizes").split(",") if size] or family.quick_sizes
            chosen += [(name, size, mode, peer) for size in sizes for mode in MODES for peer in family.peers]
        metafunc.parametrize("family, size, mode, peer", chosen)
