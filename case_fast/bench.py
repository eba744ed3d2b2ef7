"""Runs the benchmarks of a checkout; they are not installed with the package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from case_fast.errors import CaseFastError, ConfigError

_CHECKOUT = Path(__file__).resolve().parents[1]


def families() -> list[str]:
    """The kernels that have a benchmark; none where the package was installed without its checkout."""
    folder = _CHECKOUT / "benchmarks"
    return sorted(path.stem.removesuffix("_peers") for path in folder.glob("*_peers.py"))


def bench(family: str, sizes: Sequence[str], quick: bool, out: Path, tell: Callable[[str, int, int], None], budget: float = 30.0
          ) -> tuple[list[dict[str, Any]], list[Path]]:
    """Measure a family of kernels against its peers, about ``budget`` seconds a case and mode besides compiling and checking,
    and write JSON, Markdown and a picture into ``out``.

    Returns:
        A line for each case and mode (case, mode, ours_ms, best_peer, best_peer_ms, ratio, in_yardsticks), and the files written.

    Raises:
        ConfigError: no such family or size, or no checkout.
        CaseFastError: our own result was wrong; it is not timed, cases before it are written.
    """
    known = families()
    if not known:
        raise ConfigError("the benchmarks are not installed with the package; run case-fast bench in a checkout of case_fast, "
                          "installed by pip install -e '.[bench]'")
    if family not in known:
        raise ConfigError(f"there is no benchmark of {family!r}; one of {', '.join(known)}")
    if not budget > 0:
        raise ConfigError(f"budget must be above 0 seconds, not {budget}")
    if str(_CHECKOUT) not in sys.path:
        sys.path.insert(0, str(_CHECKOUT))
    run = importlib.import_module("benchmarks.run")
    report = importlib.import_module("benchmarks.report")
    wrong = importlib.import_module("benchmarks.measure").WrongResult
    chosen = run.family_of(family)
    found = report.environment(chosen.op or family) | {"quick": quick}
    cases: list[dict[str, Any]] = []
    paths: list[Path] = []
    try:
        for case in run.run(chosen, sizes, quick, budget=budget, tell=tell):
            cases.append(case)
            paths = report.write(family, found, cases, out)  # after each: a run that is stopped leaves what it has
    except wrong as error:
        raise CaseFastError(f"our own result is wrong, the benchmark stops: {error}") from error
    return [line for case in cases for line in report.summary(case)], paths
