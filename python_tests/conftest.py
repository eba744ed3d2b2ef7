"""What all tests share: one thread, a fixed seed, the prepared sample, and the real data where they are."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from case_fast.data.store import Store

REAL_DATA = Path(os.environ.get("CASE_FAST_REAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays to the end, some million objects: no search for garbage looks through them again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # else Triton's bindings count all of it as leaks


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.set_num_threads(1)  # for each test anew: a benchmark that one of them runs sets its own
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The bundled sample as a store; read only."""
    from helpers import bundled_store

    return bundled_store(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="session")
def sample_run(sample_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small model on the sample, two steps long; read only."""
    from case_fast.training import preset, train

    run = tmp_path_factory.mktemp("sample") / "run"
    train(sample_store, run, preset("demo", model={"d_model": 16, "ffn": 16}, phase1_steps=1, max_steps=1, validate_every=1,
                                    min_steps=0, valid_limit=2, device="cpu"))
    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets; the test is skipped where it is absent."""
    if not (REAL_DATA / "empatheticdialogues").is_dir():
        pytest.skip(f"no real data at {REAL_DATA} (CASE_FAST_REAL_DATA gives another folder)")
    return REAL_DATA


@pytest.fixture
def native():
    """The native module; the test is skipped where it was left out."""
    return pytest.importorskip("case_fast._native", reason="case_fast was installed with CASE_FAST_NATIVE=0")


@pytest.fixture
def on_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASE_FAST_BACKEND", "reference")


@pytest.fixture(params=["native", "reference"])
def runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend in turn."""
    if request.param == "native":
        request.getfixturevalue("native")
    monkeypatch.setenv("CASE_FAST_BACKEND", request.param)
    return request.param
