"""The interpreter of pickles: every kind of plain data at every protocol, and what it says where it stops."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import case_pickle, npy_bytes, vocabulary_class

from case_fast.errors import DataError
from case_fast.importing import machine
from case_fast.importing.pickles import read_pickle
from case_fast.importing.released import read_array

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
of_each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)
OBJECTS = np.empty(3, dtype=object)
OBJECTS[:] = [["a"], ["b", "c"], []]
VALUES = {
    "none and truth": [None, True, False],
    "integers": [0, 1, -1, 255, 256, 65535, 65536, -(1 << 31), 1 << 31, (1 << 63) - 1, -(1 << 63)],
    "numbers": [0.0, -0.0, 1.5, -1e300, 5e-324, float("inf")],
    "texts": ["", "a", "a" * 300, "é", "😀", "line\nend\\ \x00 \x1a", "'\"", "ا"],
    "bytes": [b"", b"a", bytes(range(256)), b"\n" * 300],
    "containers": [[], [[]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "dicts": [{}, {"a": {"b": [1]}}, {1: "a", None: "b", 2.5: "c"}],
    "sets": [set(), {1, 2}, frozenset("ab")],
    "long ones": [list(range(3000)), {str(i): i for i in range(3000)}, tuple(range(1500)), set(range(1500))],
    "shared": [["a", "b"]] * 3,
}
ARRAYS = {
    "texts": np.array(["sad", "happy"]), "integers": np.arange(6).reshape(2, 3), "numbers": np.array([0.5, 1.5], np.float32),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "truth": np.array([True, False]), "empty": np.array([], "U3"),
    "big-endian": np.array([1, 2], dtype=">i4"), "big-endian texts": np.array(["é", "a"], dtype=">U2"), "bytes": np.array([b"a"]),
    "objects": OBJECTS, "objects in rows": np.array([[1, "a"], [None, "b"]], object), "no objects": np.array([], object),
}


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


@of_each_protocol
@pytest.mark.parametrize("kind", VALUES)
def test_plain_data_come_out_as_they_went_in(kind, protocol):
    found = read_pickle(pickle.dumps(VALUES[kind], protocol), "x")
    assert found == VALUES[kind]
    for item, expected in zip(found, VALUES[kind], strict=True):
        assert isinstance(item, set if isinstance(expected, frozenset) else type(expected))
        assert isinstance(item, bool) == isinstance(expected, bool)
    if kind == "numbers":
        assert [str(item) for item in found] == [str(item) for item in VALUES[kind]]


@of_each_protocol
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_and_scalars_of_numpy_become_lists_and_numbers(kind, protocol):
    array = ARRAYS[kind]
    data = {"array": array, "again": [array], "scalars": [] if array.dtype == object else list(array.ravel())}
    found = read_pickle(pickle.dumps(data, protocol), "x")
    assert found == {"array": plain(array), "again": [plain(array)], "scalars": [plain(item.item()) for item in data["scalars"]]}
    assert read_array(npy_bytes(array), "x") == plain(array)


@of_each_protocol
@pytest.mark.parametrize("module", ["src.utils.data.loader", "utils.data_reader"])
def test_the_vocabulary_becomes_a_mapping_and_a_default_dict_a_dict(module, protocol):
    found = defaultdict(list)
    found["xIntent"].append(["to", "go"])
    with vocabulary_class(module) as lang:
        vocabulary = lang()
        vocabulary.word2index, vocabulary.index2word = {"a": 0}, {0: "a"}
        content = pickle.dumps([found, vocabulary, bytearray(b"x")], protocol)
    assert module not in sys.modules
    assert read_pickle(content, "x") == [{"xIntent": [["to", "go"]]}, {"word2index": {"a": 0}, "index2word": {0: "a"}}, b"x"]
    assert module not in sys.modules


integers = st.integers(-(1 << 63), (1 << 63) - 1)
scalars = st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text() | st.binary()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(-99, 99), inner)
                     | st.tuples(inner, inner) | st.sets(st.integers(-99, 99)), max_leaves=30)


@settings(max_examples=150, deadline=None)
@given(trees, st.sampled_from(PROTOCOLS))
def test_any_tree_of_plain_data_comes_out_as_it_went_in(tree, protocol):
    assert read_pickle(pickle.dumps(tree, protocol), "x") == tree


@of_each_protocol
def test_a_file_that_ends_early_is_told_with_its_byte(protocol):
    content = pickle.dumps({"a": [1, 2.5, "text"], "b": (b"bytes", {3}), "c": np.array(["x"])[0]}, protocol)
    for end in range(len(content)):
        with pytest.raises(DataError, match=r"x: byte \d+: "):
            read_pickle(content[:end], "x")


def test_a_flipped_byte_gives_data_or_a_named_error():
    rng, content = random.Random(0), case_pickle(2)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] = rng.randrange(256)
        try:
            read_pickle(bytes(damaged), "x")
        except DataError as error:
            assert error.remedy and "byte " in error.problem
            refused += 1
    assert 0 < refused < 400


def test_where_it_stops_is_the_byte_of_the_opcode():
    with pytest.raises(DataError, match=r"^f\.p: byte 4: it names 'os\.system', which .*Nothing in it was run"):
        read_pickle(b"\x80\x02]Ncos\nsystem\n.", "f.p")


def test_progress_comes_to_the_end_and_never_goes_back():
    content, told = pickle.dumps(list(range(200_000)), 4), []
    read_pickle(content, "x", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and len(told) >= 3 and {total for _, total in told} == {len(content)}


def test_the_limits_let_pass_what_is_within_them(monkeypatch):
    nested = []
    for _ in range(machine.MOST_DEPTH - 2):
        nested = [nested]
    assert read_pickle(pickle.dumps(nested, 2), "x") == nested
    with pytest.raises(DataError, match="100 deep"):
        read_pickle(pickle.dumps([[[nested]]], 2), "x")
    monkeypatch.setattr(machine, "MEMORY_ALLOWED", 0)  # the texts of a release need no more than its bytes allow
    read_pickle(case_pickle(3), "x")


def test_reading_imports_no_module_that_runs_pickles():
    """In a process of its own, where nothing else has imported it."""
    code = ("import sys; from case_fast.importing.machine import Machine; import case_fast.importing.pickles as p; "
            "before = set(sys.modules); p.read_pickle(sys.stdin.buffer.read(), 'x'); print(sorted(set(sys.modules) - before))")
    done = subprocess.run([sys.executable, "-c", code], input=case_pickle(5), cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.decode().strip() == "[]", done.stderr.decode()
