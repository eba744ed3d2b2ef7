"""What the user's paths are: stores, runs, weights, data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from case_fast.doctor.check import Finding, Look, command, ok, raised, skip
from case_fast.doctor.files import SOURCES, absent, look, missing
from case_fast.doctor.run import GivenRun
from case_fast.doctor.store import GivenStore


class Given:
    """Paths by what they are. Attributes: ``stores``, ``runs``; ``data``: of each data set that was found, its path."""

    def __init__(self, paths: Sequence[str]):
        self.stores: list[GivenStore] = []
        self.runs: list[GivenRun] = []
        self.data: dict[str, str] = {}
        self._looks: list[Look] = []
        for path in paths:
            try:
                self._take(path)
            except Exception as error:
                self._found("damaged", raised(error, command("ls", "-l", path)))

    def _take(self, path: str) -> None:
        kind = _kind_of(Path(path))
        if kind == "store":
            self.stores.append(GivenStore(path))
        elif kind == "run":
            self.runs.append(GivenRun(path, self.stores))
        elif kind == "weights":
            self._looks.append(Look("weights", lambda: _weights(path), command("ls", "-l", path)))
        else:
            for place, kind, finding in look(Path(path)):
                self._found(kind, finding)
                if kind in SOURCES and finding.state != "fail":
                    self.data.setdefault(kind, str(place))

    def _found(self, name: str, finding: Finding) -> None:
        self._looks.append(Look(name, lambda: finding, "case-fast doctor"))

    def looks(self, purpose: str | None) -> Iterator[Look]:
        """Those of data sets; of `prepare` also those that were not given."""
        yield from self._looks
        if self.data or purpose == "prepare":
            for name in missing(self.data):
                yield Look(name, lambda name=name: absent(name), SOURCES[name].get)
        elif not (self._looks or self.stores or self.runs):
            yield Look("files", lambda: skip("no path given, so no data set, store or run was looked at",
                                             "case-fast doctor ed.store ed.run"), "case-fast doctor")


def _kind_of(path: Path) -> str:
    """"store", "run" or "weights"; "" of anything else."""
    from case_fast.data.store import KIND
    from case_fast.runs import Run

    if not path.is_dir():
        return ""
    try:
        form = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        form = ""
    if str(form).startswith(KIND) or (path / "texts.safetensors").exists():
        return "store"
    run = Run(path)
    if any(part.exists() for part in (run.manifest, run.log, run.features, run.best, run.checkpoints)):
        return "run"
    of_comet = any((path / name).exists() for name in ("tokenizer.json", "vocab.json"))
    return "weights" if (path / "config.json").exists() and not of_comet else ""


def _weights(path: str) -> Finding:
    from case_fast.models import load, title_of

    model = load(path)
    return ok(f"{path}: {title_of(model.config.kind)}, {sum(x.numel() for x in model.parameters()):,} parameters; "
              "case_fast.models.load opens it")
