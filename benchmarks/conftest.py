"""`pytest benchmarks --sizes paper,1e3`: each peer by itself. `case-fast bench` times them in turns, and is what we publish."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sizes", default="paper,1e3", help="paper, cognition, concept, or numbers of vertices such as 1e4")
    parser.addoption("--threads", type=int, help="for every peer; default: its best")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", metafunc.config.getoption("--sizes").split(","))
