"""Speed and memory of the kernels against their peers: `case-fast bench FAMILY`, or `pytest benchmarks` one by one.

Not installed with the package. `<family>.py` says what is measured, `<family>_peers.py` the other ways to compute it, `run.py`
and `measure.py` how: everything is checked against float64 before it is timed.
"""
