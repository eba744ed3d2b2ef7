"""Checks of a store, by what opens it elsewhere: format, arrays, checksums, examples, fields."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from case_fast.doctor.check import Finding, Look, command, fail, ok, size, skip, warn

if TYPE_CHECKING:
    from case_fast.data import Store

MOST_BYTES = 1 << 30  # of a store or a checkpoint, whose checksums take about a second


class GivenStore:
    """A store that the user gave; it is opened once, when it is first asked for."""

    def __init__(self, path: str):
        self.path = path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        from case_fast.data.store import read_manifest

        return read_manifest(Path(self.path))

    @cached_property
    def opened(self) -> Store:
        from case_fast.data import open_store

        return open_store(self.path, check=False)  # `_checksums` says which file

    def again(self) -> str:
        """The line that prepares it again."""
        from case_fast.data.store import prepare_command
        from case_fast.errors import DataError

        try:
            return prepare_command(self.manifest, self.path)
        except DataError:
            return "case-fast prepare --help"

    def looks(self) -> Iterator[Look]:
        again = self.again()
        yield Look("format", self._format, again)
        yield Look("arrays", self._arrays, again)
        yield Look("checksums", self._checksums, again)
        yield Look("examples", self._examples, again)
        yield Look("fields", self._fields, again)
        yield Look("word vectors", self._vectors, again)

    def _format(self) -> Finding:
        found, knowledge = self.manifest, self.manifest["knowledge"].get("spec", "nothing")
        return ok(f"{found['format']}, fingerprint {found['fingerprint'][:12]}, knowledge of {knowledge}")

    def _arrays(self) -> Finding:
        store = self.opened
        words = len(store.featurizer.vocabulary)
        return ok(f"whole: {', '.join(store.splits)} and {len(store.texts):,} texts of {words:,} words")

    def _checksums(self) -> Finding:
        from case_fast.data.store import changed_files

        whole = sum((Path(self.path) / name).stat().st_size for name in self.manifest["files"])
        if whole > MOST_BYTES:
            return skip(f"{size(whole)} are too much for a look", command("case-fast", "pack", self.path, "ed.travel"))
        if changed := changed_files(Path(self.path), self.manifest):
            return fail(f"{', '.join(changed)}: not the bytes that the manifest knows", self.again())
        return ok(f"{len(self.manifest['files'])} files, {size(whole)}, are those that the manifest knows")

    def _examples(self) -> Finding:
        store = self.opened
        counts = {split: store.size(split) for split in store.splits}
        said = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        if empty := [split for split in ("train", "valid", "test") if not counts.get(split)]:
            return warn(f"{said or 'none'}; there are none of {' and '.join(empty)}", self.again())
        first = {split: store.batch(split, [0], ["dialogue"]) for split in counts}
        outside = [split for split, batch in first.items() if not _within(batch, len(store.featurizer.vocabulary))]
        if outside:
            return fail(f"{said}; of {', '.join(outside)} the first holds a word that is not in the vocabulary", self.again())
        return ok(said + (", bundled toy corpus" if self.manifest.get("bundled") else ""))

    def _fields(self) -> Finding:
        from case_fast.batch import PARTS
        from case_fast.errors import DataError

        store = self.opened
        lacking: dict[str, DataError] = {}
        for part in PARTS:
            try:
                for split in store.splits:
                    store.require(split, [part])
            except DataError as error:
                lacking[part] = error
        if lacking:
            return warn(f"no field {', '.join(lacking)}: an earlier version prepared it; models that read none of it are served",
                        self.again())
        return ok(f"all that models read: {', '.join(PARTS)}")

    def _vectors(self) -> Finding:
        found = self.opened.embeddings()
        if found is None:
            return skip("prepared without: they begin at random", f"{self.again()} --embeddings glove.6B.300d.txt")
        ids, vectors = found
        words = len(self.opened.featurizer.vocabulary)
        if not vectors.isfinite().all():
            return fail("some are not finite", self.again())
        return ok(f"{vectors.shape[1]} numbers each, of {len(ids):,} of {words:,} words ({100 * len(ids) / words:.1f} %)")


def _within(batch: Any, words: int) -> bool:
    return all(bool(((x >= 0) & (x < words)).all()) for x in (batch.context, batch.target))
