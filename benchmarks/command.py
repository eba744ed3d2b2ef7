"""What `case-fast bench` does: measure a family of kernels, or show what was measured before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import families, report
from benchmarks.family import DTYPES, family_of
from benchmarks.measure import WrongResult
from benchmarks.run import run
from case_fast.errors import CaseFastError, ConfigError, DataError
from case_fast.text_files import read_json

RESULTS = Path(__file__).parent / "results"  # <machine>/<name>.json
# which module tells of results that are no family's
TELLS = {"large_batches": "benchmarks.bilinear_mim.large_batches", "gpu": "benchmarks.gpu_results",
         "step": "benchmarks.step.report", "decode": "benchmarks.decode.report"}


def bench(family: str, sizes: Sequence[str], quick: bool, out: Path, tell: Callable[[str, int, int], None], budget: float = 30.0,
          device: str = "cpu") -> tuple[list[dict[str, Any]], list[Path]]:
    """Measure a family of kernels against its peers, about ``budget`` seconds a case and mode besides compiling and checking,
    and write JSON, Markdown and a picture into ``out``.

    Returns:
        A line for each case and mode (case, mode, ours_ms, best_peer, best_peer_ms, ratio, in_yardsticks), and the files written.

    Raises:
        ConfigError: no such family, size or device.
        CaseFastError: our own result was wrong; it is not timed, cases before it are written.
    """
    if family not in families():
        raise ConfigError(f"there is no benchmark of {family!r}; one of {', '.join(families())}")
    if not budget > 0:
        raise ConfigError(f"budget must be above 0 seconds, not {budget}")
    require(device)
    found = report.environment(family, device) | {"quick": quick}
    cases: list[dict[str, Any]] = []
    paths: list[Path] = []
    try:
        for case in run(family_of(family, device), sizes, quick, budget=budget, tell=tell):
            cases.append(case)
            paths = report.write(family, found, cases, out)  # after each: a run that is stopped leaves what it has
    except WrongResult as error:
        raise CaseFastError(f"our own result is wrong, the benchmark stops: {error}") from error
    return [line for case in cases for line in report.summary(case)], paths


def require(device: str) -> None:
    """Raises ConfigError where the device is not one to measure on, or is not here."""
    if device not in DTYPES:
        raise ConfigError(f"device {device!r} is not one to measure on; one of {', '.join(DTYPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        built = " (this torch is built without CUDA)" if torch.version.cuda is None else ""
        raise ConfigError(f"device 'cuda' needs an NVIDIA GPU: torch sees none{built}")


def show(name: str = "", machine: str = "", out: Path | None = None) -> Iterator[tuple[str, list[Path]]]:
    """The stored results of this name and machine, of every one where none is named: Markdown, and the files written.

    Without a name, a table of all cases; with it, one of each case besides. ``out``: whole tables and pictures are written to
    OUT/MACHINE/NAME.md and .png.

    Raises:
        ConfigError: no such results; says which there are.
        DataError: a stored file is damaged, or of a dry run.
    """
    stored = sorted(RESULTS.glob("*/*.json"))
    chosen = [path for path in stored if name in ("", path.stem)]
    if not chosen:
        how = "; benchmarks/gpu.sh makes them on a machine with a GPU" if name == "gpu" else ""
        others = ", ".join(sorted({path.stem for path in stored}))
        raise ConfigError(f"there are no results of {name!r}{how}; there are those of {others}")
    machines = sorted({path.parent.name for path in chosen})
    if machine and machine not in machines:
        raise ConfigError(f"there are no results {f'of {name} ' if name else ''}from the machine {machine!r}; there are those "
                          f"from {', '.join(machines)}")
    for path in chosen:
        if machine in ("", path.parent.name):
            yield _told(path, not name, out)


def _told(path: Path, briefly: bool, out: Path | None) -> tuple[str, list[Path]]:
    tells = import_module(TELLS.get(path.stem, "benchmarks.report"))
    remedy = "Take the file from the repository again, or measure again"
    results = read_json(path, "stored results", remedy)
    if isinstance(results, dict) and results.get("dry"):
        raise DataError(path, "this is the record of a dry run, which is no result", "Remove it")
    try:
        whole, brief = tells.markdown(results), tells.overview(results)
        written = [] if out is None else [out / path.parent.name / f"{path.stem}.{ending}" for ending in ("md", "png")]
        if written:
            written[0].parent.mkdir(parents=True, exist_ok=True)
            written[0].write_text(whole, encoding="utf-8")
            tells.plot(results, written[1])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(path, f"stored results are damaged ({type(error).__name__}: {error})", remedy) from error
    return brief if briefly else whole, written
