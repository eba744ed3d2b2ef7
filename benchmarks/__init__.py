"""Speed and memory of the kernels against their peers: `case-fast bench FAMILY`, or `pytest benchmarks` one by one.

Not installed with the package. A folder for each family of kernels: `cases.py` says what is measured and what is right,
`peers.py` the other ways to compute it, `gpu.py` what of it runs on a GPU. `run.py` and `measure.py` say how, for CPU and GPU
alike: everything is checked against float64 before it is timed. What was measured lies in `results/<machine>/<family>.json`.
"""

from pathlib import Path


def families() -> list[str]:
    """The kernels that have a benchmark."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/peers.py"))
