"""The launches of all Triton kernels against a simulated H100 (simulated_cuda): where they go, what is compiled, how often."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from triton_worker import MARKS, in_own_process

WORKER = str(Path(__file__).parents[1] / "support" / "triton_worker_launches.py")
MOST_VARIANTS = 27  # of both phases of training: a third of a second each, before the first steps
pytestmark = MARKS


def test_every_kernel_is_launched_on_the_device_of_its_tensors(tmp_path):
    """cuda:1, while cuda:0 is the current device."""
    kernels, *launches = in_own_process(WORKER, "record", folder=tmp_path)
    assert {launch["kernel"] for launch in launches} == set(kernels["kernels"])
    assert {launch["device"] for launch in launches} == {1}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda half: in_own_process(WORKER, "compile", half, folder=folder), "01")
        return [line for half in halves for line in half]


def test_no_kernel_spills(compiled):
    assert len(compiled) > 100
    assert not [line for line in compiled if line["spilled"]]
    assert {line["target"] for line in compiled} == {"sm_90a"}


def test_two_blocks_or_more_fit_an_sm(compiled):
    assert not [line for line in compiled if line["blocks"] < 2]


def test_products_run_on_tensor_cores(compiled):
    """But for float32 that is not to be rounded, float64, and tiles of few rows."""
    large = [line for line in compiled if line["tile"] and line["tile"][0] >= 64 and line["said"].get("KEPT") != "True"]
    assert {line["wgmma"] for line in large} == {True, False}
    for line in large:
        said = line["said"]
        assert line["wgmma"] == (said.get("xw", said.get("hidden")) == "*bf16 16" or said["PRECISION"] == "'tf32'")


def test_training_compiles_few_variants(sample_store, tmp_path):
    command = ("-m", "python_tests.triton_variants", "--store", str(sample_store.path), "--steps", "6", "--json")
    *phases, all_of_them = in_own_process(*command, folder=tmp_path)
    assert [phase["launches"] > 30 for phase in phases] == [True, True]
    assert all_of_them["variants"] <= MOST_VARIANTS
