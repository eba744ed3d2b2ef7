"""The public ops linear_cross_entropy and top_words: a share of their scorecard, arguments and errors, and how they stand in torch."""

from __future__ import annotations

import itertools
import math
import types
from contextlib import contextmanager
from dataclasses import replace

import linear_cross_entropy_checks as checks
import op_checks
import pytest
import torch
from helpers import close
from linear_cross_entropy_checks import FAMILY, FLOATS, KEEP, KERNELS, RECOMPUTE, best, make_case, of_equations, results
from op_checks import identical
from torch.nn import functional as F

from case_fast import equations
from case_fast.errors import ConfigError
from case_fast.ops import backend, linear_cross_entropy, top_words

SHARE = {1: 11, 2: 2 * len(checks.SHAPES), 3: 250, 4: 250, 5: 150, 6: 1, 11: 1}  # cases of each row; all: scorecard.py


@contextmanager
def counted():
    """How often each native function of the family is called within."""
    with op_checks.counted(FAMILY) as calls, op_checks.counted("top") as best_of:
        yield calls
    calls.update(best_of)


@pytest.fixture
def native():
    found = pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")
    assert hasattr(found, f"{FAMILY}_forward") and hasattr(found, "top_words")
    return found


@pytest.fixture
def on_reference(monkeypatch):
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")


@pytest.fixture(params=["native", "reference"])
def runs(request, monkeypatch) -> str:
    if request.param == "native":
        request.getfixturevalue("native")
    monkeypatch.setenv("CASE_FAST_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("row", SHARE)
def test_row_of_the_scorecard(native, row):
    check, full = checks.CHECKS[row]
    assert SHARE[row] <= full
    with counted() as calls:
        assert check(SHARE[row], "cpu") >= SHARE[row]
    assert calls[f"{FAMILY}_forward"] >= SHARE[row], "the native kernel did not run"
    assert row == 4 or calls[f"{FAMILY}_backward"] > 0
    assert row in (2, 4) or calls["top_words"] > 0


@pytest.mark.parametrize("row", [2, 3, 4, 5])
def test_row_of_the_scorecard_on_the_reference(on_reference, row):
    size = 8 if row == 2 else 25
    if not backend.native_report()["available"]:
        assert checks.CHECKS[row][0](size, "cpu")
        return
    with counted() as calls:
        checks.CHECKS[row][0](size, "cpu")
    assert not calls
