"""The packed store: ragged arrays in safetensors, memory-mapped, with a manifest that says where they come from.

    STORE/manifest.json                     format, sources with hashes, settings, counts, reports of skipped rows
    STORE/vocabulary.json, features.json    the `Featurizer` that made it
    STORE/texts.safetensors                 distinct knowledge texts: words, and the text itself (UTF-8)
    STORE/{train,valid,test}.safetensors    the examples: each ragged field as `<field>` end to end and `<field>.offsets`;
                                            earlier versions wrote none of the `_LATER` ones
    STORE/embeddings.safetensors            vectors of the words that the embedding file covers (when one was given)
"""

from __future__ import annotations

import hashlib
import json
import shlex
from array import array
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from case_fast.batch import PARTS, Batch
from case_fast.checksums import digest_of
from case_fast.data.empathetic_dialogues import EMOTIONS, SPLITS
from case_fast.data.featurizer import Example, Featurizer, TextTable
from case_fast.data.graphs import CSR
from case_fast.data.pack import pack
from case_fast.data.ragged import Ragged, offsets_of, places_of
from case_fast.errors import DataError
from case_fast.files import sha256, write_json
from case_fast.text_files import read_json, require_file, require_folder

KIND = "case_fast store"
FORMAT = f"{KIND} 1"
_REMEDY = "Prepare the store again"
_DTYPES = {"I32": np.int32, "I64": np.int64, "F32": np.float32, "U8": np.uint8}  # safetensors' names
_INT, _FLOAT, _BYTE = ("i", np.int32), ("f", np.float32), ("B", np.uint8)
# Graphs are stored as degrees (vertices), neighbours and relations (edges), all local to the example.
_FIELDS: dict[str, tuple[str, type]] = {
    "context": _INT, "context_role": _INT, "context_intensity": _FLOAT, "response": _INT, "sub_utterance": _INT,
    "knowledge": _INT, "knowledge_sub": _INT, "knowledge_relation": _INT, "reaction": _INT, "reaction_sub": _INT,
    "concept": _INT, "concept_position": _INT, "concept_intensity": _FLOAT,
    "cognition_degree": _INT, "cognition_indices": _INT, "cognition_relation": _BYTE,
    "concept_degree": _INT, "concept_indices": _INT, "concept_relation": _BYTE,
    "source": _BYTE,
}
_LATER: dict[str, tuple[str, type]] = {"feedback": _INT}  # fields that a store may lack; the part that needs one says so
_SCALARS = ("emotion", "truncated")
_GRAPHS = ("cognition", "concept")


class RaggedWriter:
    """Grows ragged arrays in memory as compactly as they will lie on disk."""

    def __init__(self, kinds: dict[str, tuple[str, type]]):
        self.kinds = kinds
        self.data = {name: array(code) for name, (code, _) in kinds.items()}
        self.offsets = {name: array("q", [0]) for name in kinds}

    def append(self, name: str, row: np.ndarray | bytes) -> None:
        raw = row if isinstance(row, bytes) else np.ascontiguousarray(row, dtype=self.kinds[name][1]).tobytes()
        self.data[name].frombytes(raw)
        self.offsets[name].append(len(self.data[name]))

    def arrays(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for name, (_, dtype) in self.kinds.items():
            arrays[name] = np.frombuffer(self.data[name], dtype=dtype)
            arrays[f"{name}.offsets"] = np.frombuffer(self.offsets[name], dtype=np.int64)
        return arrays


class SplitWriter:
    """Collects the examples of one split and writes them as one file."""

    def __init__(self) -> None:
        self.ragged = RaggedWriter(_FIELDS | _LATER)
        self.scalars = {name: array("i") for name in _SCALARS}

    def add(self, example: Example) -> None:
        for name in self.ragged.kinds:
            source = name == "source"
            self.ragged.append(name, json.dumps(example.source, ensure_ascii=False).encode() if source else example.column(name))
        for name in _SCALARS:
            self.scalars[name].append(getattr(example, name))

    def __len__(self) -> int:
        return len(self.scalars["emotion"])

    def write(self, path: Path) -> None:
        arrays = self.ragged.arrays()
        arrays |= {name: np.frombuffer(values, dtype=np.int32) for name, values in self.scalars.items()}
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path)


def write_texts(texts: TextTable, path: Path) -> None:
    writer = RaggedWriter({"words": _INT, "text": _BYTE})
    for index in range(len(texts)):
        writer.append("words", texts.tokens(index))
        writer.append("text", texts.text(index).encode())
    save_file(writer.arrays(), path)


class _Arrays:
    """Named arrays of a safetensors file as views of the mapped file: opening costs nothing, rows are read on use.

    Args:
        ragged, scalars: the arrays that the file must hold; all have the same number of items. later: those that it may hold.

    Raises:
        DataError: the file is missing or damaged.
    """

    def __init__(self, path: Path, ragged: Iterable[str], scalars: Iterable[str] = (), later: Iterable[str] = ()):
        self.path = require_file(path, "part of the store", _REMEDY)
        try:
            with safe_open(path, framework="numpy"):  # checks lengths, types and places of all arrays
                pass
            arrays = self._map()
            self.scalars = {name: arrays[name] for name in scalars}
            names = [*ragged, *(name for name in later if name in arrays)]
            self.ragged = {name: Ragged(arrays[name], arrays[f"{name}.offsets"]) for name in names}
            sizes = {len(values) for values in self.scalars.values()}
            for name, found in self.ragged.items():
                if found.offsets[0] != 0 or found.offsets[-1] != len(found.values) or (found.sizes < 0).any():
                    raise ValueError(f"the offsets of {name} do not fit")
                sizes.add(len(found))
                shape = next((one for one in self.ragged.values() if np.array_equal(one.offsets, found.offsets)), found)
                self.ragged[name] = Ragged(found.values, shape.offsets)  # fields of one shape share their offsets
            if len(sizes) != 1:
                raise ValueError("arrays of different lengths")
        except KeyError as error:
            raise DataError(path, f"an array is missing: {error}", _REMEDY) from error
        except (SafetensorError, OSError, ValueError, IndexError, TypeError) as error:
            raise DataError(path, f"damaged ({error})", _REMEDY) from error

    def _map(self) -> dict[str, np.ndarray]:
        # safetensors copies what it hands to numpy; its header says where each array lies, so map the file instead
        with open(self.path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        filled = self.path.stat().st_size > 8 + size  # an empty file part cannot be mapped
        # as a plain array: each view of a memmap would cost a microsecond in Python
        whole = np.asarray(np.memmap(self.path, dtype=np.uint8, mode="r", offset=8 + size) if filled else np.zeros(0, np.uint8))
        arrays: dict[str, np.ndarray] = {}
        for name, item in header.items():
            if item["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is of type {item['dtype']}")
            start, end = item["data_offsets"]
            arrays[name] = whole[start:end].view(_DTYPES[item["dtype"]]).reshape(item["shape"])
        return arrays


class _Rows:
    """Fields of some examples, copied. Where their values lie is worked out once for all fields of one shape."""

    def __init__(self, fields: dict[str, Ragged], rows: np.ndarray):
        self.fields, self.rows = fields, rows
        self.places: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, name: str) -> Ragged:
        field = self.fields[name]
        key = id(field.offsets)
        if key not in self.places:
            self.places[key] = places_of(field.offsets, self.rows)
        places, offsets = self.places[key]
        return Ragged(field.values.take(places), offsets)


class _StoredTexts:
    def __init__(self, path: Path, featurizer: Featurizer):
        self.vocabulary, self.emotional = featurizer.vocabulary, featurizer.emotional
        found = _Arrays(path, ("words", "text")).ragged
        self._words, self._text = found["words"], found["text"]

    def __len__(self) -> int:
        return len(self._words)

    def tokens(self, index: int) -> np.ndarray:
        return self._words.row(index)

    def rows(self, ids: np.ndarray) -> Ragged:
        return self._words.take(ids)

    def text(self, index: int) -> str:
        return self._text.row(index).tobytes().decode()

    def rows_of(self, ids: Ragged) -> np.ndarray:
        """(n,) rows of the texts of each row of ids: their words and a [CLS] each."""
        total = offsets_of((1 + self._words.sizes)[ids.values])
        return total[ids.offsets[1:]] - total[ids.offsets[:-1]]


class Store:
    """A prepared data set; `open_store` opens it. Arrays are memory-mapped."""

    def __init__(self, path: str | Path, check: bool = True):
        self.path = require_folder(path, "store", "Make one with case-fast prepare, or out of a packed one with case-fast unpack")
        self.manifest = read_manifest(self.path)
        counts = self.manifest["counts"]["examples"]
        self.splits: tuple[str, ...] = tuple(split for split in SPLITS if split in counts)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.knowledge: dict[str, str | None] = self.manifest["knowledge"]
        self.featurizer = Featurizer.load(self.path)
        self.texts = _StoredTexts(self.path / "texts.safetensors", self.featurizer)
        self._splits = {split: _Arrays(self.path / f"{split}.safetensors", _FIELDS, _SCALARS, _LATER) for split in self.splits}
        for split in self.splits:
            if self.size(split) != counts[split]:
                problem = f"{self.size(split)} examples, {counts[split]} in the manifest"
                raise DataError(self.path / f"{split}.safetensors", problem, _REMEDY)
        if check:
            self._check()

    def _check(self) -> None:
        """Every byte of every file: with SHA instructions 0.16 s for 217 MB, which training reads again and again anyway."""
        manifest = self.path / "manifest.json"
        body = {name: value for name, value in self.manifest.items() if name != "sha256"}
        own = self.manifest.get("sha256")  # not there: of an earlier version
        if self.fingerprint != _fingerprint(self.manifest["files"]) or own not in (None, digest_of(body)):
            raise DataError(manifest, "damaged (its checksum does not match)", _REMEDY)
        for name in changed_files(self.path, self.manifest):
            raise DataError(self.path / name, "damaged (its checksum does not match the manifest's)", _REMEDY)

    def size(self, split: str) -> int:
        """Number of examples of a split."""
        return len(self._split(split).scalars["emotion"])

    def _split(self, split: str) -> _Arrays:
        if split not in self._splits:
            raise ValueError(f"split {split!r} is not in this store; it has {', '.join(self.splits)}")
        return self._splits[split]

    def field(self, split: str, name: str) -> Ragged:
        """A field of all examples of a split, such as "response", each example a row: views of the mapped file."""
        return self._split(split).ragged[name]

    def emotions(self, split: str) -> np.ndarray:
        """(size,) the label of each example of a split, -1 where it is unknown."""
        return self._split(split).scalars["emotion"]

    def example(self, split: str, index: int) -> Example:
        """One example; IndexError outside 0 .. size - 1."""
        arrays, size = self._split(split), self.size(split)
        if not 0 <= index < size:
            raise IndexError(f"index {index} is outside the split {split!r} of {size} examples")
        row = {name: found.row(index) for name, found in arrays.ragged.items()}
        graphs = {}
        for name in _GRAPHS:
            indptr = offsets_of(row[f"{name}_degree"]).astype(np.int32)
            graphs[f"{name}_graph"] = CSR(indptr, row[f"{name}_indices"], row[f"{name}_relation"])
        fields = {name: values for name, values in row.items() if name in Example.__dataclass_fields__}
        scalars = {name: int(values[index]) for name, values in arrays.scalars.items()}
        return Example(**fields | scalars | graphs | {"source": json.loads(row["source"].tobytes())})

    def batch(self, split: str, indices: Sequence[int], parts: Iterable[str] | None = None, seed: int | None = None) -> Batch:
        """The packed batch of these examples, on the CPU.

        Args:
            parts: those that a model reads, `DialogueModel.needs`; default all that the store has fields for.
            seed: the number in `Batch.seed`; None draws one from torch's generator, so that every batch of a training loop has
                another.

        Raises:
            ValueError: unknown split, or no indices.
            IndexError: an index outside the split.
            ConfigError: an unknown part.
            DataError: a part whose field the store lacks.
        """
        arrays, size = self._split(split), self.size(split)
        parts = [part for part in PARTS if part not in self._lacking(split)] if parts is None else list(parts)
        self.require(split, parts)
        rows = np.asarray(indices, dtype=np.int64)
        for index in rows[(rows < 0) | (rows >= size)]:
            raise IndexError(f"index {index} is outside the split {split!r} of {size} examples")
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        return pack(_Rows(arrays.ragged, rows), self.emotions(split)[rows], self.texts, parts, seed)

    def require(self, split: str, parts: Iterable[str]) -> None:
        """`DataError` if a split has no field for one of the parts of a batch."""
        for part in set(parts) & set(self._lacking(split)):
            raise DataError(self._split(split).path, f"it has no field {part}, of which the part {part} of a batch is made: an "
                            "earlier version prepared it", f"Prepare the store again: {prepare_command(self.manifest)}")

    def _lacking(self, split: str) -> list[str]:
        """Fields that a split lacks; such a field has the name of the part that is made of it."""
        return [name for name in _LATER if name not in self._split(split).ragged]

    def costs(self, split: str) -> np.ndarray:
        """(size,) about what each example adds to a step, in rows that a layer of an encoder reads: those of its texts, those
        of its context once and once more for each sub-utterance, those of its reply; a vertex of a graph counts as two."""
        fields = self._split(split).ragged
        context, response, subs, knowledge, concept = (
            fields[name].sizes for name in ("context", "response", "sub_utterance", "knowledge", "concept")
        )
        texts = self.texts.rows_of(fields["sub_utterance"]) + self.texts.rows_of(fields["knowledge"])
        vertices = subs + knowledge + 1 + context + concept
        return texts + (1 + context) * (1 + subs) + 1 + response + 2 * vertices

    def embeddings(self) -> tuple[Tensor, Tensor] | None:
        """Word ids (n,) and their pretrained vectors (n, d), or None when the store was prepared without any."""
        path = self.path / "embeddings.safetensors"
        if path.name not in self.manifest["files"]:
            return None
        try:
            found = load_file(require_file(path, "word vectors of the store", _REMEDY))
            return found["ids"], found["vectors"]
        except (SafetensorError, OSError, KeyError) as error:
            raise DataError(path, f"damaged ({error})", _REMEDY) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store of this format; `DataError` if the folder has none."""
    path = folder / "manifest.json"
    found = read_json(path, "manifest of the store", _REMEDY)
    form = found.get("format") if isinstance(found, dict) else None
    if form != FORMAT:
        raise DataError(path, f"format {form!r}, this version reads {FORMAT!r}", _REMEDY)
    try:
        parts = (found["counts"]["examples"], found["files"], found["knowledge"])
        sound = isinstance(found["fingerprint"], str) and all(isinstance(part, dict) for part in parts)
        emotions = list(found["emotions"])
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(path, "entries are missing or damaged", _REMEDY)
    for label, (stored, ours) in enumerate(zip_longest(emotions, EMOTIONS)):  # an example holds its emotion's place alone
        if stored != ours:
            raise DataError(path, f"emotion {label} is {stored!r} in this store and {ours!r} in this version", _REMEDY)
    return found


def prepare_command(manifest: dict[str, Any], out: str | Path | None = None) -> str:
    """The command that made a store, as far as its manifest tells; ``out``: where the store is now."""
    settings = manifest.get("settings", {}) | ({} if out is None else {"out": out})
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in settings.items()
             if value is not None and not isinstance(value, dict)]
    return " ".join(["case-fast prepare", *given])


def changed_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The files of a store whose bytes are not those that its manifest knows; `DataError` if one is missing."""
    if strange := [name for name in manifest["files"] if Path(name).name != name]:
        raise DataError(folder / "manifest.json", f"{strange[0]!r} is no file of a store", _REMEDY)
    parts = {name: require_file(folder / name, "part of the store", _REMEDY) for name in manifest["files"]}
    return [name for name, path in parts.items() if sha256(path) != manifest["files"][name]]


def open_store(path: str | Path, check: bool = True) -> Store:
    """Open a store that ``case-fast prepare`` made; `DataError` names what is missing or damaged.

    Args:
        check: compare every byte with the manifest's checksums. Without it opening costs next to nothing.
    """
    return Store(path, check)


def write_store(folder: Path, featurizer: Featurizer, texts: TextTable, splits: dict[str, SplitWriter],
                embeddings: tuple[np.ndarray, np.ndarray] | None, manifest: dict[str, Any]) -> None:
    """Write every part of a store into ``folder``, the manifest last."""
    featurizer.save(folder)
    write_texts(texts, folder / "texts.safetensors")
    for split, writer in splits.items():
        writer.write(folder / f"{split}.safetensors")
    if embeddings is not None:
        ids, vectors = embeddings
        save_file({"ids": ids, "vectors": vectors}, folder / "embeddings.safetensors")
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "fingerprint": _fingerprint(files), **manifest, "emotions": list(EMOTIONS), "files": files}
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    write_json(folder / "manifest.json", manifest | {"sha256": digest_of(manifest)})


def _fingerprint(files: dict[str, str]) -> str:
    content = "\n".join(f"{name} {digest}" for name, digest in files.items())
    return hashlib.sha256(content.encode()).hexdigest()
