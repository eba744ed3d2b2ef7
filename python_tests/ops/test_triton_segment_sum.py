"""The Triton kernels of segment_sum: in the interpreter against reference.py in float64, and compiled for sm_90; no GPU."""

from __future__ import annotations

import importlib.util

import pytest
from triton_worker import in_own_process
from triton_worker_segment_sum import CASES

WORKER = "triton_worker_segment_sum.py"
WRONG = ["7", "-1", str(2**31 + 3), str(-(2**40))]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    lines = in_own_process(WORKER, "interpret", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_sums_and_gradients_equal_the_equation(interpreted, case):
    found = interpreted[case]
    rows, size, dims, dtype, *_ = CASES[case]
    floor = 1e-12 if dtype == "float64" else 1e-5
    for error, plain in zip(found["error"], found["plain_error"], strict=True):
        assert error <= 2 * plain + floor  # the house's rule; NaN fails it
    assert set(found["dtypes"]) == {f"torch.{dtype}"}
    assert found["shapes"] == [[size, *dims], [rows, *dims]] and found["repeatable"]


@pytest.mark.parametrize("wrong", [*WRONG, *(f"{number}, sorted" for number in WRONG)])
def test_a_number_that_names_nothing_is_left_out_and_raised_once(interpreted, wrong):
    of_sum, of_gradient, others_stay, nan_rows = interpreted["damaged"]["said"][wrong]
    for first, again in (of_sum, of_gradient):
        assert first.startswith("segment_sum: segment names a segment, or take's index a row, that does not exist") and not again
    assert others_stay and nan_rows == [5]


def test_every_kernel_compiles_for_sm_90_without_a_gpu(tmp_path):
    kernels = in_own_process(WORKER, "compile", tmp_path)
    assert {line["kernel"].split()[0] for line in kernels} == {"forward_sums", "backward_rows"} and len(kernels) == 17
    for line in kernels:
        assert line["target"].startswith("sm_90") and line["bytes"] > 1000
        assert line.get("STACK", 0) == 0 and line.get("LOCAL", 0) == 0, f"{line['kernel']} spills"
        assert line.get("REG", 0) <= 128
