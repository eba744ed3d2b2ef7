"""The inference cache: what it keeps, what it never asks twice, kills, two processes, merging, damage."""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import limited_memory

import case_fast
from case_fast.errors import ConfigError, DataError
from case_fast.knowledge import RELATIONS, CachedSource, InferenceCache
from case_fast.knowledge import cache as cache_module

ROOT = Path(case_fast.__file__).parents[1]
REAL = Path(os.environ.get("CASE_FAST_REAL_DATA", ROOT.parent / "shared" / "data"))
KEY = ("echo:1", {"k": 2, "beams": 5})


class Echo:
    """A source whose answers are a function of the prompt, and which remembers what it was asked."""

    def __init__(self, identity: str = "echo:1", seconds_a_text: float = 0.0, **settings):
        self.identity, self.settings, self.seconds = identity, settings, seconds_a_text
        self.asked: list[tuple[str, str]] = []

    def infer(self, texts, relations, k):
        time.sleep(self.seconds * len(texts))
        self.asked += [(text, relation) for text in texts for relation in relations]
        return [{r: [f"{r} of {text} {i}" for i in range(min(k, len(text) % 4))] for r in relations} for text in texts]


TEXTS = [f"text {'x' * (i % 7)} {i}" for i in range(100)]


def test_nothing_is_asked_twice(tmp_path):
    texts = [*TEXTS, *TEXTS[::-3], "", "naïve — 数学 🙂", "nul\0inside"]
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        source = Echo(beams=5)
        first = CachedSource(source, cache).infer(texts, RELATIONS, 3)
        assert first == Echo().infer(texts, RELATIONS, 3)
        assert len(source.asked) == len(set(source.asked)) == len(set(texts)) * len(RELATIONS) == len(cache)
        asked = len(source.asked)
        assert CachedSource(source, cache).infer(texts[::-1], RELATIONS, 3) == first[::-1]
        assert len(source.asked) == asked
    with InferenceCache(tmp_path / "c.sqlite") as cache:  # and none after reopening
        assert CachedSource(source, cache).infer(texts, RELATIONS, 3) == first and len(source.asked) == asked


def test_only_missing_relations_are_asked(tmp_path):
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        source = Echo()
        CachedSource(source, cache).infer(["a", "b"], ["xWant"], 2)
        source.asked.clear()
        CachedSource(source, cache).infer(["a", "c"], ["xReact", "xWant"], 2)
        assert sorted(source.asked) == [("a", "xReact"), ("c", "xReact"), ("c", "xWant")]


@pytest.mark.parametrize("other", [Echo("echo:2", beams=5), Echo(beams=6), Echo()])
def test_another_source_or_setting_is_another_key(tmp_path, other):
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        CachedSource(Echo(beams=5), cache).infer(["a"], ["xWant"], 2)
        CachedSource(other, cache).infer(["a"], ["xWant"], 2)
        assert other.asked and len(cache.contents()) == 2
        again = Echo(beams=5)
        CachedSource(again, cache).infer(["a"], ["xWant"], 3)  # k is a part of the key as well
        assert again.asked and len(cache) == 3


def test_answers_are_the_callers_own(tmp_path):
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        one, two = CachedSource(Echo(), cache).infer(["abc", "abc"], ["xWant"], 2)
        one["xWant"].append("changed")
        assert two["xWant"] == ["xWant of abc 0", "xWant of abc 1"]


def test_progress_counts_distinct_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_LARGEST_CHUNK", 16)
    seen: list[tuple[int, int]] = []
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        cached = CachedSource(Echo(), cache, lambda done, total: seen.append((done, total)))
        cached.infer([*TEXTS[:40], *TEXTS[:10]], ["xWant", "xNeed"], 2)
        assert seen == [(0, 80), (32, 80), (64, 80), (80, 80)]
        seen.clear()
        cached.infer(TEXTS[:50], ["xWant", "xNeed"], 2)
        assert seen == [(80, 100), (100, 100)]
        seen.clear()
        cached.infer([], ["xWant"], 2)
        assert seen == [(0, 0)]


def test_chunks_follow_the_speed_of_the_source(tmp_path, monkeypatch):
    sizes: list[int] = []

    class Timed(Echo):
        def infer(self, texts, relations, k):
            sizes.append(len(texts))
            return super().infer(texts, relations, k)

    with InferenceCache(tmp_path / "c.sqlite") as cache:
        CachedSource(Timed(), cache).infer([f"t{i}" for i in range(200)], ["xWant"], 2)
        assert sizes == [16, 32, 64, 88]
        sizes.clear()
        monkeypatch.setattr(cache_module, "_CHUNK_SECONDS", 0.0)  # everything takes too long
        CachedSource(Timed(), cache).infer([f"u{i}" for i in range(40)], ["xWant"], 2)
        assert sizes == [16, 8, 4, 2, 1] + [1] * 9


def test_half_surrogates_from_a_terminal_are_taken(tmp_path):
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        (answer,) = CachedSource(Echo(), cache).infer(["bad \udce9 byte"], ["xWant"], 2)
        assert answer == {"xWant": ["xWant of bad ? byte 0", "xWant of bad ? byte 1"]}


def test_requests_are_checked(tmp_path):
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        with pytest.raises(ConfigError, match="xAttr"):
            CachedSource(Echo(), cache).infer(["a"], ["xAttr"], 2)
        with pytest.raises(ConfigError, match="k: 0"):
            CachedSource(Echo(), cache).infer(["a"], ["xWant"], 0)


def test_the_file_reads_with_plain_sqlite(tmp_path):
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        CachedSource(Echo(beams=5), cache).infer(["abc"], ["xWant"], 2)
        assert cache.contents() == [("echo:1", {"beams": 5, "k": 2}, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["c.sqlite"]
    plain = sqlite3.connect(tmp_path / "c.sqlite")
    ((identity, settings, text, relation, result),) = plain.execute("SELECT * FROM readable")
    plain.close()
    assert (identity, text, relation) == ("echo:1", "abc", "xWant")
    assert json.loads(settings) == {"beams": 5, "k": 2} and json.loads(result) == ["xWant of abc 0", "xWant of abc 1"]


def test_an_interrupt_keeps_finished_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_LARGEST_CHUNK", 16)

    class Interrupting(Echo):
        def infer(self, texts, relations, k):
            if len(self.asked) >= 48:
                raise KeyboardInterrupt
            return super().infer(texts, relations, k)

    with InferenceCache(tmp_path / "c.sqlite") as cache:
        with pytest.raises(KeyboardInterrupt):
            CachedSource(Interrupting(), cache).infer(TEXTS, ["xWant"], 2)
        assert len(cache) == 48
        source = Echo()
        assert CachedSource(source, cache).infer(TEXTS, ["xWant"], 2) == Echo().infer(TEXTS, ["xWant"], 2)
        assert len(source.asked) == 52


# --- other processes

WORKER = """
    import time
    from case_fast.knowledge import cache as cache_module
    {echo}
    cache_module._FIRST_CHUNK = cache_module._LARGEST_CHUNK = {chunk}
    with cache_module.InferenceCache({path!r}) as cache:
        print("ready", flush=True)
        cached = cache_module.CachedSource(Echo(seconds_a_text={seconds}), cache)
        cached.infer([f"text {{i}}" for i in range({first}, {last})], ["xWant", "xNeed"], 2)
"""


def worker(path: Path, first: int, last: int, chunk: int, seconds: float = 0.0) -> subprocess.Popen:
    echo = textwrap.indent(inspect.getsource(Echo), "    ").lstrip()  # by its text: this file would load torch
    code = WORKER.format(echo=echo, path=str(path), first=first, last=last, chunk=chunk, seconds=seconds)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_it_keeps_what_was_finished(tmp_path):
    path, rng = tmp_path / "c.sqlite", random.Random(3)
    texts = [f"text {i}" for i in range(20_000)]
    kept = 0
    for _ in range(5):
        process = worker(path, 0, 20_000, chunk=2)  # hardly anything but commits: a kill hits the writing
        assert process.stdout.readline() == "ready\n"
        watching = sqlite3.connect(path, timeout=60)
        while watching.execute("SELECT COUNT(*) FROM inferences").fetchone()[0] == kept:
            time.sleep(0.005)
        watching.close()
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with InferenceCache(path) as cache:  # opens, and lost nothing that had been kept
            assert kept < len(cache) < 40_000 and len(cache) % 4 == 0
            kept = len(cache)
    with InferenceCache(path) as cache:
        source = Echo()
        answers = CachedSource(source, cache).infer(texts, ["xWant", "xNeed"], 2)
        assert answers == Echo().infer(texts, ["xWant", "xNeed"], 2)
        assert len(source.asked) == 40_000 - kept and len(cache) == 40_000


def test_two_processes_may_write_at_once(tmp_path):
    path = tmp_path / "c.sqlite"
    processes = [worker(path, first, first + 400, chunk=8) for first in (0, 200, 0)]  # overlapping, all from nothing
    for process in processes:
        assert process.wait(timeout=60) == 0
    with InferenceCache(path) as cache:
        source, texts = Echo(), [f"text {i}" for i in range(600)]
        assert CachedSource(source, cache).infer(texts, ["xWant", "xNeed"], 2) == Echo().infer(texts, ["xWant", "xNeed"], 2)
        assert source.asked == [] and len(cache) == 1200


def test_a_long_lock_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_BUSY_SECONDS", 0.05)
    path = tmp_path / "c.sqlite"
    with InferenceCache(path) as cache:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DataError, match=r"c\.sqlite: in use by another process .* Wait"):
            cache.store(*KEY, {"a": {"xWant": []}})
        other.execute("ROLLBACK")
        other.close()
        cache.store(*KEY, {"a": {"xWant": []}})
        assert len(cache) == 1


# --- merging


def test_merge_adds_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_MERGE_CHUNK", 7)
    with InferenceCache(tmp_path / "a.sqlite") as a, InferenceCache(tmp_path / "b.sqlite") as b:
        a.store(*KEY, {"both": {"xWant": ["ours"]}, "only a": {"xWant": ["a"]}})
        b.store(*KEY, {"both": {"xWant": ["theirs"], "xNeed": ["b"]}, **{f"b {i}": {"xReact": []} for i in range(30)}})
        b.store("echo:2", {"k": 1}, {"both": {"xWant": ["other source"]}})
        assert a.merge(tmp_path / "b.sqlite") == 32 and len(a) == 34
        assert a.merge(tmp_path / "b.sqlite") == 0
        assert a.lookup(*KEY, ["both"], RELATIONS) == {"both": {"xWant": ["ours"], "xNeed": ["b"]}}
        assert a.lookup("echo:2", {"k": 1}, ["both"], RELATIONS) == {"both": {"xWant": ["other source"]}}
        assert len(b) == 33


def test_merge_refuses_itself_and_what_is_no_cache(tmp_path):
    with InferenceCache(tmp_path / "a.sqlite") as a:
        with pytest.raises(ConfigError, match="into itself"):
            a.merge(tmp_path / "." / "a.sqlite")
        with pytest.raises(DataError, match="inference cache to merge not found"):
            a.merge(tmp_path / "missing.sqlite")
        assert not (tmp_path / "missing.sqlite").exists()
        (tmp_path / "b.sqlite").write_text("no database at all, but long enough to be looked at" * 40)
        with pytest.raises(DataError, match=r"b\.sqlite: damaged inference cache"):
            a.merge(tmp_path / "b.sqlite")
        with InferenceCache(tmp_path / "c.sqlite") as c:
            c.store(*KEY, {"a": {"xWant": ["happy"]}})
            c._db.execute("UPDATE inferences SET result = '[\"sad\"]'")
        with pytest.raises(DataError, match=r"c\.sqlite: .*does not match its checksum"):
            a.merge(tmp_path / "c.sqlite")
        assert len(a) == 0


# --- damage


def filled(path: Path) -> Path:
    with InferenceCache(path) as cache:
        CachedSource(Echo(), cache).infer(TEXTS, ["xWant", "xReact"], 3)
    return path


def plain_sql(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path)
    for statement in statements:
        database.execute(statement)
    database.commit()
    database.close()


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda path: path.write_bytes(b"text, not a database\n" * 100), "damaged inference cache"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "damaged inference cache"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "damaged inference cache"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "damaged inference cache"),
        (lambda path: path.write_bytes(b"\0" * 16 + path.read_bytes()[16:]), "damaged inference cache"),
        (lambda path: path.write_bytes(b"\xff" * path.stat().st_size), "damaged inference cache"),
        (lambda path: plain_sql(path, "PRAGMA application_id = 0"), "no inference cache"),
        (
            lambda path: plain_sql(path, "PRAGMA user_version = 99"),
            "schema version 99; this version of case_fast has 1",
        ),
        (lambda path: plain_sql(path, "DROP TABLE texts"), "tables are not those"),
        (lambda path: plain_sql(path, "ALTER TABLE texts ADD COLUMN more TEXT"), "tables are not those"),
        (
            lambda path: plain_sql(path, "CREATE TRIGGER t AFTER INSERT ON texts BEGIN DELETE FROM inferences; END"),
            "tables are not those",
        ),
        (
            lambda path: plain_sql(path, "DROP TABLE texts", "CREATE VIEW texts AS SELECT 1 AS id, 'a' AS text"),
            "tables are not those",
        ),
        (lambda path: path.write_bytes(_zero_a_page(path.read_bytes())), "damaged inference cache"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be opened"),
    ],
)
def test_damage_is_said_with_a_remedy(tmp_path, break_it, message):
    path = filled(tmp_path / "c.sqlite")
    break_it(path)
    with pytest.raises(DataError) as error:
        InferenceCache(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert any(word in str(error.value) for word in ("Move the file away", "Give another path", "Check that the folder"))


def _zero_a_page(content: bytes) -> bytes:
    size = int.from_bytes(content[16:18], "big")
    last = len(content) // size - 1
    return content[: last * size] + bytes(size) + content[(last + 1) * size :]


def test_one_flipped_byte_never_gives_a_wrong_answer(tmp_path):
    sound = filled(tmp_path / "sound.sqlite").read_bytes()
    expected = Echo().infer(TEXTS, ["xWant", "xReact"], 3)
    rng, path, noticed = random.Random(11), tmp_path / "flipped.sqlite", 0
    for _ in range(150):
        flipped = bytearray(sound)
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            with InferenceCache(path) as cache:
                assert CachedSource(Echo(), cache).infer(TEXTS, ["xWant", "xReact"], 3) == expected
        except DataError as error:
            assert str(path) in str(error)
            noticed += 1
        path.unlink()
    assert noticed > 30  # the rest lay in unused space, or only hid a record, which is then asked again


def test_a_missing_folder_and_a_full_disk_are_named(tmp_path):
    with pytest.raises(DataError, match="cannot be opened or made .* Check that the folder is there"):
        InferenceCache(tmp_path / "missing" / "c.sqlite")
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        cache.store(*KEY, {"first": {"xWant": ["kept"]}})
        (pages,) = cache._db.execute("PRAGMA page_count").fetchone()
        cache._db.execute(f"PRAGMA max_page_count = {pages}")  # as a full disk
        with pytest.raises(DataError, match="cache cannot grow .* Free some disk space"):
            cache.store(*KEY, {f"{i} {'x' * 100}": {"xWant": ["lost"]} for i in range(1000)})
        assert cache.lookup(*KEY, ["first"], ["xWant"]) == {"first": {"xWant": ["kept"]}} and len(cache) == 1


def test_a_read_only_cache_still_answers(tmp_path, monkeypatch):
    path, connect = filled(tmp_path / "c.sqlite"), sqlite3.connect
    # file permissions do not bind root, so the connection is opened as SQLite opens a file that it may not write
    monkeypatch.setattr(sqlite3, "connect", lambda path, **other: connect(f"file:{path}?mode=ro", uri=True, **other))
    with InferenceCache(path) as cache:
        source = Echo()
        CachedSource(source, cache).infer(TEXTS, ["xWant"], 3)
        assert source.asked == []
        with pytest.raises(DataError, match=r"cannot be written .* Check the permissions"):
            CachedSource(source, cache).infer(["new"], ["xWant"], 3)


# --- size and speed


def test_bulk_lookup_is_fast_and_the_file_compact(tmp_path):
    texts = [f"I had quite a day, number {i}" for i in range(10_000)]
    path = tmp_path / "c.sqlite"
    with InferenceCache(path) as cache:
        CachedSource(Echo(), cache).infer(texts, RELATIONS, 5)
        began = time.perf_counter()
        found = cache.lookup("echo:1", {"k": 5}, texts, RELATIONS)
        assert time.perf_counter() - began < 5 and len(found) == 10_000
        held = sum(len(json.dumps(by_relation[r])) for by_relation in found.values() for r in RELATIONS)
    assert path.stat().st_size < 1.7 * held  # keys, checksums and both copies of the texts included


@pytest.mark.skipif(not (REAL / "atomic").is_dir(), reason=f"no real data at {REAL}")
@limited_memory(1 << 30)
def test_real_atomic_through_the_cache(tmp_path):
    from case_fast.knowledge.atomic import AtomicRetrieval

    source = AtomicRetrieval(REAL / "atomic")
    lines = (REAL / "empatheticdialogues" / "test.csv").read_text(encoding="utf-8").splitlines()[1:1501]
    texts = [line.split(",")[5].replace("_comma_", ",") for line in lines]
    with InferenceCache(tmp_path / "c.sqlite") as cache:
        first = CachedSource(source, cache).infer(texts, RELATIONS, 5)
        source.infer = None  # the second call does not touch it
        began = time.perf_counter()
        assert CachedSource(source, cache).infer(texts, RELATIONS, 5) == first
        assert time.perf_counter() - began < 5
