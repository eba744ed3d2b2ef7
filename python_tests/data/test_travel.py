"""A packed store: byte for byte what went in, or an error that says what is wrong, with nothing left behind."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import save

from case_fast.data import travel
from case_fast.data.travel import pack_store, unpack_store
from case_fast.errors import ConfigError, DataError

START = len(travel._MAGIC)


@pytest.fixture(scope="module")
def packed(sample_store, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("travel") / "sample.travel"
    size = pack_store(sample_store, path)
    assert size == path.stat().st_size
    return path.read_bytes()


def made(header: dict, *parts: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return b"".join([travel._MAGIC, len(raw).to_bytes(8, "little"), hashlib.sha256(raw).digest(), raw, *parts])


def part(data: bytes, **changes: object) -> dict:
    return {"count": 4, "stored": "uint8", "packed": "uint8", "differences": False, "size": len(data)} | changes


def refused(tmp_path, content: bytes, **limits: int) -> str:
    """What is said of a damaged file; nothing may be left of what it held."""
    path = tmp_path / "bad.travel"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        unpack_store(path, tmp_path / "store", **limits)
    assert [left.name for left in tmp_path.iterdir()] == ["bad.travel"]
    return str(error.value)


def test_a_store_comes_back_byte_for_byte_and_much_smaller(sample_store, packed, tmp_path):
    (tmp_path / "sample.travel").write_bytes(packed)
    found = unpack_store(tmp_path / "sample.travel", tmp_path / "store")
    names = sorted(path.name for path in sample_store.path.iterdir())
    assert sorted(path.name for path in found.path.iterdir()) == names
    for name in names:
        assert (found.path / name).read_bytes() == (sample_store.path / name).read_bytes(), name
    assert (found.manifest, found.fingerprint) == (sample_store.manifest, sample_store.fingerprint)
    assert len(packed) < sum((sample_store.path / name).stat().st_size for name in names) / 8


EDGES = [0, 1, -1, 127, 128, -128, -129, 255, 256, 32767, 32768, -32768, -32769, 65535, 65536, 2**31 - 1, -(2**31)]


def test_every_kind_of_array_comes_back():
    rng = np.random.default_rng(0)
    pairs = [(low, high, kind) for low in EDGES for high in EDGES for kind in ("int32", "int64")]
    arrays = {f"{kind} {low} {high}": np.array([low, high, low], kind) for low, high, kind in pairs}
    arrays |= {
        "wide": np.array([2**63 - 1, -(2**63), 0]), "none": np.zeros(0, np.int32), "none.offsets": np.zeros(0, np.int64),
        "a.offsets": np.cumsum(rng.integers(0, 300, 1000)), "falling.offsets": np.array([2**63 - 1, -(2**63), 5]),
        "floats": rng.standard_normal(100).astype(np.float32), "nan": np.array([np.nan, -0.0, np.inf], np.float32),
        "bytes": rng.integers(0, 256, 100).astype(np.uint8), "table": rng.integers(0, 9, (7, 5)).astype(np.int32),
    }
    content = save(arrays)
    found = [travel._pack(*piece) for piece in travel._parts("x.safetensors", content)]
    assert b"".join(how.unpack(data) for how, data in found) == content
    assert {how.packed for how, _ in found} == set(travel._PACKED)


def test_damage_anywhere_is_an_error_that_says_so(packed, tmp_path):
    rng = random.Random(0)
    length = int.from_bytes(packed[START : START + 8], "little")
    places = [0, START, START + 7, START + 8, START + 40, START + 40 + length, len(packed) - 1]
    for place in [*places, *rng.choices(range(len(packed)), k=30)]:
        damaged = bytearray(packed)
        damaged[place] ^= 1 << rng.randrange(8)
        assert "damaged, or no packed store (" in refused(tmp_path, bytes(damaged)), place
    for size in [0, 5, START, START + 8, START + 40, START + 41, START + 40 + length, len(packed) // 2, len(packed) - 1]:
        refused(tmp_path, packed[:size])
    assert "cut short or goes on behind its end" in refused(tmp_path, packed + b"x")
    assert "does not begin as one of this version" in refused(tmp_path, b"PK" + packed)


def test_a_file_that_says_it_holds_too_much_is_refused_before_it_is_unpacked(packed, tmp_path):
    assert "more than the 1000 that are allowed" in refused(tmp_path, packed, max_bytes=1000)
    zeros = lzma.compress(bytes(1 << 20), check=lzma.CHECK_NONE)
    for changes, said in (
        ({"count": 1 << 40}, "more than the"),
        ({"count": 1000}, "a part does not hold 1000 bytes"),  # it holds a MiB, of which no more than that is unpacked
        ({"count": 1 << 21}, "a part does not hold"),
        ({"count": -1}, "a part cannot be"), ({"count": 1.5}, "a part cannot be"), ({"size": -1}, "a part cannot be"),
        ({"packed": "int64"}, "a part cannot be"), ({"packed": "object"}, "a part cannot be"),
        ({"stored": "float32"}, "a part cannot be"), ({"differences": 1}, "a part cannot be"), ({"more": 1}, "more"),
        ({"size": len(zeros) - 1}, "cut short or goes on"),
    ):
        header = {"files": {"manifest.json": {"sha256": "", "parts": [part(zeros, **changes)]}}}
        assert said in refused(tmp_path, made(header, zeros)), changes
    assert "a header of" in refused(tmp_path, travel._MAGIC + (1 << 40).to_bytes(8, "little") + bytes(64))


@pytest.mark.parametrize("name", ["../manifest.json", "/manifest.json", "sub/manifest.json", "other.json", "", "."])
def test_no_name_but_those_of_a_store_s_files_is_taken(name, tmp_path):
    data = lzma.compress(b"evil")
    header = {"files": {name: {"sha256": hashlib.sha256(b"evil").hexdigest(), "parts": [part(data)]}}}
    assert "is no part of a store" in refused(tmp_path, made(header, data))


@pytest.mark.parametrize("header", [[], {}, {"files": []}, {"files": {"manifest.json": 1}}, {"files": {"manifest.json": {}}},
                                    {"files": {"manifest.json": {"sha256": "", "parts": [1]}}}])
def test_a_header_of_another_shape_is_refused(header, tmp_path):
    refused(tmp_path, made(header))


def test_bytes_that_are_not_those_of_the_checksum_are_refused(tmp_path):
    data = lzma.compress(b"good")
    header = {"files": {"manifest.json": {"sha256": hashlib.sha256(b"evil").hexdigest(), "parts": [part(data)]}}}
    assert "the checksum of manifest.json does not match" in refused(tmp_path, made(header, data))


def test_what_is_there_already_is_never_replaced(sample_store, packed, tmp_path):
    path = tmp_path / "sample.travel"
    path.write_bytes(packed)
    with pytest.raises(ConfigError, match="is there already; remove it, or name another file"):
        pack_store(sample_store, path)
    with pytest.raises(ConfigError, match="is there already; remove it, or name another folder"):
        unpack_store(path, tmp_path)
    with pytest.raises(DataError, match="packed store not found. Make one with case-fast pack"):
        unpack_store(tmp_path / "absent", tmp_path / "store")


def test_a_store_that_is_not_the_one_of_its_manifest_is_not_packed(sample_store, tmp_path):
    shutil.copytree(sample_store.path, tmp_path / "store")
    (tmp_path / "store" / "features.json").write_text((tmp_path / "store" / "features.json").read_text() + " ")
    with pytest.raises(DataError, match="features.json: it is not the file that the store's manifest knows"):
        pack_store(tmp_path / "store", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
