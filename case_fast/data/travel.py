"""A store as one small file, for a machine without network: packed without loss, unpacked byte for byte.

    magic, length of the header (8 bytes), sha256 of the header (32 bytes), header (JSON), parts end to end

The header names the store's files, each with its sha256 and its parts in order. A part is an array of a safetensors file, its
numbers brought to the smallest type that holds them and its offsets to differences, or any other bytes as they are; each is
packed by xz. It takes numpy and the standard library.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from case_fast.data.empathetic_dialogues import SPLITS
from case_fast.data.store import Store, open_store
from case_fast.errors import ConfigError, DataError
from case_fast.files import require_file_place, require_place, require_room, whole_folder, write_bytes
from case_fast.text_files import reading, require_file

MAX_UNPACKED_BYTES = 4 << 30  # of a store's files together: a small file could hold terabytes of zeros
_MAGIC = b"case_fast travel 1\n"
_MAX_HEADER_BYTES = 1 << 20
_MEMORY = 256 << 20  # bytes that xz may take to unpack a part, the part itself not counted
_MANIFEST = "manifest.json"  # comes last, as in `write_store`
_NAMES = {_MANIFEST, "vocabulary.json", "features.json", *(f"{part}.safetensors" for part in ("texts", "embeddings", *SPLITS))}
_STORED = {"I32": "int32", "I64": "int64"}  # safetensors' names of whole numbers; what is of another type is packed as bytes
_PACKED = ("uint8", "int8", "uint16", "int16", "int32", "int64")  # smallest first
_REMEDY = "Copy it again, or pack the store again"


@dataclass(frozen=True)
class _Part:
    """How a part was packed: ``count`` numbers of type ``stored`` as type ``packed``, in ``size`` bytes of the file."""

    count: int
    stored: str
    packed: str
    differences: bool
    size: int

    @classmethod
    def read(cls, found: Any) -> Self:
        part = cls(**found)
        sound = all(isinstance(n, int) and n >= 0 for n in (part.count, part.size)) and isinstance(part.differences, bool)
        if not sound or part.stored not in _PACKED or part.packed not in _PACKED or part.width > np.dtype(part.stored).itemsize:
            raise ValueError(f"a part cannot be {found}")
        return part

    @property
    def width(self) -> int:
        return np.dtype(self.packed).itemsize

    @property
    def bytes(self) -> int:
        return self.count * np.dtype(self.stored).itemsize

    def unpack(self, data: bytes) -> bytes:
        size = self.count * self.width
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
        raw = decoder.decompress(data, max_length=size + 1)  # with room for one more, so that the stream's end is read too
        if len(raw) != size or not decoder.eof or decoder.unused_data:
            raise ValueError(f"a part does not hold {size} bytes")
        values = np.frombuffer(raw, self.packed)
        return (values.cumsum(dtype=self.stored) if self.differences else values.astype(self.stored)).tobytes()


def pack_store(store: str | Path | Store, out: str | Path) -> int:
    """Pack a store into the file ``out``; the number of its bytes.

    Raises:
        DataError: the store is damaged, or a file of it is not the one that its manifest knows.
        ConfigError: ``out`` is there already.
        PlaceError: it cannot be written.
    """
    store, out = store if isinstance(store, Store) else open_store(store, check=False), Path(out)
    if os.path.lexists(out):
        raise ConfigError(f"{out} is there already; remove it, or name another file")
    require_file_place(out)
    files: dict[str, Any] = {}
    packed: list[bytes] = []
    for name in [*store.manifest["files"], _MANIFEST]:
        with reading(store.path / name, "part of the store"):
            content = require_file(store.path / name, "part of the store", "Prepare the store again").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != store.manifest["files"].get(name, digest):
            raise DataError(store.path / name, "it is not the file that the store's manifest knows", "Prepare the store again")
        found = [_pack(*part) for part in _parts(name, content)]
        files[name] = {"sha256": digest, "parts": [asdict(part) for part, _ in found]}
        packed += [data for _, data in found]
    header = json.dumps({"files": files}).encode()
    start = _MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header
    content = b"".join([start, *packed])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, content)
    return len(content)


def _parts(name: str, content: bytes) -> Iterator[tuple[bytes, str, bool]]:
    """(bytes, type, whether they are offsets) of each part of a file, in order."""
    arrays: dict[str, Any] = {}
    data = len(content)
    if name.endswith(".safetensors"):
        data = 8 + int.from_bytes(content[:8], "little")
        arrays = json.loads(content[8:data])
        arrays.pop("__metadata__", None)
    yield content[:data], "uint8", False
    for array, item in sorted(arrays.items(), key=lambda pair: pair[1]["data_offsets"]):
        start, end = item["data_offsets"]
        yield content[data + start : data + end], _STORED.get(item["dtype"], "uint8"), array.endswith(".offsets")


def _pack(raw: bytes, stored: str, offsets: bool) -> tuple[_Part, bytes]:
    values = np.frombuffer(raw, stored)
    if offsets:
        values = np.diff(values, prepend=values.dtype.type(0))
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    packed = next(kind for kind in _PACKED if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max)
    data = lzma.compress(values.astype(packed).tobytes(), check=lzma.CHECK_NONE)
    return _Part(len(values), stored, packed, offsets, len(data)), data


def unpack_store(path: str | Path, out: str | Path, max_bytes: int = MAX_UNPACKED_BYTES) -> Store:
    """Unpack what `pack_store` made into the folder ``out``, whole or not at all, every byte checked, and open the store.

    Args:
        max_bytes: of all its files together; a file that says it holds more is refused before any is unpacked.

    Raises:
        DataError: ``path`` is missing, damaged, cut short, or no packed store.
        ConfigError: ``out`` is there already.
        PlaceError: it cannot be written.
    """
    path, out = require_file(path, "packed store", "Make one with case-fast pack"), Path(out)
    if os.path.lexists(out):
        raise ConfigError(f"{out} is there already; remove it, or name another folder")
    require_place(out)
    try:
        with open(path, "rb") as stream, whole_folder(out) as folder:
            with reading(path, "packed store"):
                files = _read_header(stream, path.stat().st_size, max_bytes)
            require_room(folder, sum(part.bytes for _, parts in files.values() for part in parts))
            for name, (expected, parts) in files.items():
                digest = hashlib.sha256()
                with open(folder / name, "wb") as file:
                    for part in parts:
                        with reading(path, "packed store"):
                            packed = stream.read(part.size)
                        content = part.unpack(packed)
                        digest.update(content)
                        file.write(content)
                if digest.hexdigest() != expected:
                    raise ValueError(f"the checksum of {name} does not match")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, lzma.LZMAError) as error:
        raise DataError(path, f"damaged, or no packed store ({error})", _REMEDY) from error
    return open_store(out)


def _read_header(stream: BinaryIO, size: int, max_bytes: int) -> dict[str, tuple[str, list[_Part]]]:
    """name -> (sha256, parts) of each file; ``size``: bytes of the packed store."""
    if stream.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin as one of this version")
    length, digest = int.from_bytes(stream.read(8), "little"), stream.read(32)
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header = stream.read(length)
    if hashlib.sha256(header).digest() != digest:
        raise ValueError("the checksum of the header does not match")
    files = {name: (file["sha256"], [_Part.read(part) for part in file["parts"]])
             for name, file in json.loads(header)["files"].items()}
    if unknown := files.keys() - _NAMES:
        raise ValueError(f"{', '.join(sorted(unknown))} is no part of a store")
    parts = [part for _, parts in files.values() for part in parts]
    if sum(part.size for part in parts) != size - stream.tell():
        raise ValueError("it is cut short or goes on behind its end")
    if (whole := sum(part.bytes for part in parts)) > max_bytes:
        raise ValueError(f"it says that it holds {whole} bytes, more than the {max_bytes} that are allowed")
    return files
