"""Inferences kept in one SQLite file: resumable, mergeable, open to inspection with ``sqlite3``.

COMET needs days for the whole data set, so nothing asked once is asked again. The file's view ``readable`` shows it in
words: ``sqlite3 FILE 'SELECT * FROM readable LIMIT 5'``.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from case_fast.errors import ConfigError, DataError
from case_fast.knowledge.source import KnowledgeSource, check_request
from case_fast.text_files import require_file

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x43415345  # "CASE": tells our files from other SQLite files
_BUSY_SECONDS = 60.0
_MERGE_CHUNK = 20_000
_FIRST_CHUNK, _LARGEST_CHUNK, _CHUNK_SECONDS = 16, 4096, 5.0  # texts, texts, s
_RECORD_PARTS = (slice(0, 2), slice(2, 3), slice(3, 4))  # source, relation, text of a record
_REBUILD = "Move the file away, then what it held is inferred again, or put a copy back in its place"
_SQLITE_PROBLEMS = (
    ("SQLITE_BUSY", "in use by another process", "Wait until that one has ended, then run again"),
    ("SQLITE_LOCKED", "in use by another process", "Wait until that one has ended, then run again"),
    ("SQLITE_READONLY", "cache cannot be written", "Check the permissions of the file and its folder"),
    ("SQLITE_CANTOPEN", "cache cannot be opened or made", "Check that the folder is there and its permissions"),
    ("SQLITE_FULL", "cache cannot grow", "Free some disk space, then run again: finished chunks are kept"),
    ("SQLITE_IOERR", "cache cannot be read or written", "Check the disk, then run again: finished chunks are kept"),
)

# "checksum" binds an answer to its question, so that no damaged byte can hand one text the inferences of another.
_SCHEMA = (
    "CREATE TABLE sources (id INTEGER PRIMARY KEY, identity TEXT NOT NULL, settings TEXT NOT NULL, UNIQUE (identity, settings))",
    "CREATE TABLE relations (id INTEGER PRIMARY KEY, relation TEXT NOT NULL UNIQUE)",
    "CREATE TABLE texts (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    "CREATE TABLE inferences (source INTEGER NOT NULL, relation INTEGER NOT NULL, text INTEGER NOT NULL, "
    "result TEXT NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (text, source, relation)) WITHOUT ROWID",
    "CREATE VIEW readable AS SELECT s.identity, s.settings, t.text, r.relation, i.result FROM inferences i "
    "JOIN sources s ON s.id = i.source JOIN texts t ON t.id = i.text JOIN relations r ON r.id = i.relation",
)


def _checksum(identity: str, settings: str, relation: str, text: str, result: str) -> int:
    return zlib.crc32("\0".join((identity, settings, relation, text, result)).encode())


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)


class InferenceCache:
    """Inferences by (source identity, settings with k, relation, text).

    Rollback journal, not WAL: between commits the one file is the whole cache, also after a kill (SQLite undoes a
    half-written chunk at the next opening), and it works on network folders. Two processes may use it at once; each
    waits for the other's writing up to a minute. Use as a context manager, or `close`.

    Raises (every method):
        DataError: not a cache of this schema version, damaged, not writable, disk full, or locked for too long.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._guard():
            self._db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                self._db.execute("PRAGMA trusted_schema = OFF")
                self._db.execute("PRAGMA temp_store = MEMORY")
                if not self._schema():
                    self._create()
                self._check()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> InferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of answered (source, settings, relation, text) prompts."""
        return sum(count for _, _, count in self.contents())

    def contents(self) -> list[tuple[str, dict[str, Any], int]]:
        """(source identity, settings with k, answered prompts) of every source in the cache."""
        with self._guard():
            rows = self._db.execute(
                "SELECT identity, settings, n FROM (SELECT source, COUNT(*) AS n FROM inferences GROUP BY source) "
                "JOIN sources ON id = source ORDER BY id"
            ).fetchall()
        return [(identity, json.loads(settings), count) for identity, settings, count in rows]

    def lookup(
        self, identity: str, settings: Mapping[str, Any], texts: Iterable[str], relations: Sequence[str]
    ) -> dict[str, dict[str, list[str]]]:
        """Text -> relation -> inferences, of what is stored; the rest is left out."""
        settings_text = _canonical(settings)
        found: dict[str, dict[str, list[str]]] = {}
        shared: dict[str, str] = {}  # inferences repeat ("happy"): one string each
        with self._transaction("DEFERRED"):
            self._db.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (text TEXT)")
            self._db.execute("DELETE FROM wanted")
            self._db.executemany("INSERT INTO wanted VALUES (?)", ((text,) for text in dict.fromkeys(texts)))
            rows = self._db.execute(
                # CROSS JOIN keeps this order: a look-up by text, then by the leading columns of the primary key
                "SELECT w.text, r.relation, i.result, i.checksum FROM wanted w CROSS JOIN texts t ON t.text = w.text "
                "CROSS JOIN sources s ON s.identity = ? AND s.settings = ? "
                "CROSS JOIN inferences i ON i.text = t.id AND i.source = s.id "
                f"CROSS JOIN relations r ON r.id = i.relation WHERE r.relation IN ({', '.join('?' * len(relations))})",
                (identity, settings_text, *relations),
            )
            for text, relation, result, checksum in rows:
                self._compare(checksum, identity, settings_text, relation, text, result)
                inferences = [shared.setdefault(inference, inference) for inference in json.loads(result)]
                found.setdefault(text, {})[relation] = inferences
        return found

    def store(self, identity: str, settings: Mapping[str, Any], answers: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Add text -> relation -> inferences in one transaction; what is already stored stays."""
        settings_text = _canonical(settings)
        records = []
        for text, by_relation in answers.items():
            for relation, inferences in by_relation.items():
                result = json.dumps(list(inferences), ensure_ascii=False)
                checksum = _checksum(identity, settings_text, relation, text, result)
                records.append((identity, settings_text, relation, text, result, checksum))
        self._insert(records)

    def merge(self, other_path: str | Path) -> int:
        """Add what another cache file holds and this one does not; how many prompts that were. Ours wins.

        Raises:
            DataError: the other file is missing, no cache or damaged; what was read before the damage has been added.
            ConfigError: the other file is this file.
        """
        other_path = require_file(other_path, "inference cache to merge")
        if other_path.samefile(self.path):
            raise ConfigError(f"{other_path}: a cache cannot be merged into itself")
        before = len(self)
        with InferenceCache(other_path) as other, other._guard():
            rows = other._db.execute(
                "SELECT s.identity, s.settings, r.relation, t.text, i.result, i.checksum FROM inferences i "
                "JOIN sources s ON s.id = i.source JOIN texts t ON t.id = i.text JOIN relations r ON r.id = i.relation"
            )
            while records := rows.fetchmany(_MERGE_CHUNK):
                for *content, checksum in records:
                    other._compare(checksum, *content)
                self._insert(records)
        return len(self) - before

    def _insert(self, records: Sequence[tuple[str, str, str, str, str, int]]) -> None:
        """Records: (identity, settings, relation, text, result, checksum)."""
        with self._transaction("IMMEDIATE"):
            insert = self._db.executemany
            sources, relations, texts = (dict.fromkeys(record[part] for record in records) for part in _RECORD_PARTS)
            insert("INSERT OR IGNORE INTO sources (identity, settings) VALUES (?, ?)", sources)
            insert("INSERT OR IGNORE INTO relations (relation) VALUES (?)", relations)
            insert("INSERT OR IGNORE INTO texts (text) VALUES (?)", texts)
            insert(
                "INSERT OR IGNORE INTO inferences (source, relation, text, result, checksum) "
                "SELECT s.id, r.id, t.id, ?5, ?6 FROM sources s, relations r, texts t "
                "WHERE s.identity = ?1 AND s.settings = ?2 AND r.relation = ?3 AND t.text = ?4",
                records,
            )

    def _schema(self) -> set[str]:
        return {sql for (sql,) in self._db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}

    def _create(self) -> None:
        with self._transaction("IMMEDIATE"):
            if self._schema():  # another process was faster
                return
            for statement in _SCHEMA:
                self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check(self) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            raise DataError(self.path, "an SQLite file, but no inference cache", "Give another path for the cache")
        if version != SCHEMA_VERSION:
            problem = f"inference cache of schema version {version}; this version of case_fast has {SCHEMA_VERSION}"
            raise DataError(self.path, problem, _REBUILD)
        if self._schema() != set(_SCHEMA):
            raise self._damaged("its tables are not those of an inference cache")
        (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(" ".join(verdict.split()))

    def _compare(self, checksum: int, *content: str) -> None:
        try:
            sound = checksum == _checksum(*content)
        except (TypeError, UnicodeError):
            sound = False
        if not sound:
            raise self._damaged("a record does not match its checksum")

    def _damaged(self, what: str) -> DataError:
        return DataError(self.path, f"damaged inference cache ({what})", _REBUILD)

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        with self._guard():
            self._db.execute(f"BEGIN {kind}")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn SQLite's errors into a `DataError` that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            for prefix, problem, remedy in _SQLITE_PROBLEMS:
                if name.startswith(prefix):
                    raise DataError(self.path, f"{problem} ({error})", remedy) from error
            raise self._damaged(str(error)) from error


class CachedSource:
    """A `KnowledgeSource` that asks ``source`` for what ``cache`` does not hold, chunk by chunk, each kept at once.

    Interrupted at any moment (Ctrl-C, kill), the next call goes on after the last whole chunk. Chunks grow or shrink to
    some seconds of work: little is lost with a slow model, and a fast source does not wait for the disk.
    ``progress(done, total)`` counts distinct (text, relation) prompts, those in the cache included, at the start and
    after every chunk.
    """

    def __init__(
        self,
        source: KnowledgeSource,
        cache: InferenceCache,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.source, self.cache, self.progress = source, cache, progress
        self._chunk = _FIRST_CHUNK

    @property
    def identity(self) -> str:
        return self.source.identity

    @property
    def settings(self) -> dict[str, Any]:
        return self.source.settings

    def infer(self, texts: Sequence[str], relations: Sequence[str], k: int) -> list[dict[str, list[str]]]:
        """See `KnowledgeSource`.

        Raises:
            DataError: the cache cannot be read or written.
        """
        check_request(relations, k)
        key = (self.source.identity, {**self.source.settings, "k": k})
        # half surrogate pairs (bad terminal input) have no UTF-8, so neither SQLite nor a tokenizer takes them
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        known = self.cache.lookup(*key, texts, relations)
        missing: dict[tuple[str, ...], list[str]] = {}
        for text in dict.fromkeys(texts):
            held = known.setdefault(text, {})
            if lacking := tuple(relation for relation in relations if relation not in held):
                missing.setdefault(lacking, []).append(text)
        total = len(known) * len(relations)
        done = total - sum(len(lacking) * len(group) for lacking, group in missing.items())
        self._report(done, total)
        for lacking, group in missing.items():
            group.sort(key=len, reverse=True)  # like lengths make full batches; too long for memory shows at once
            start = 0
            while chunk := group[start : start + self._chunk]:
                start += len(chunk)
                began = time.monotonic()
                answers = dict(zip(chunk, self.source.infer(chunk, lacking, k), strict=True))
                self.cache.store(*key, answers)
                seconds = time.monotonic() - began
                if seconds < _CHUNK_SECONDS / 2 and len(chunk) == self._chunk:
                    self._chunk = min(2 * self._chunk, _LARGEST_CHUNK)
                elif seconds > 2 * _CHUNK_SECONDS:
                    self._chunk = max(self._chunk // 2, 1)
                for text, answer in answers.items():
                    known[text].update(answer)
                done += len(lacking) * len(chunk)
                self._report(done, total)
        return [{relation: list(known[text][relation]) for relation in relations} for text in texts]

    def _report(self, done: int, total: int) -> None:
        if self.progress:
            self.progress(done, total)
