"""The packed store: what was written comes back; what was damaged is refused at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_examples, tensors
from safetensors.numpy import load_file, save_file

import case_fast
from case_fast.batch import PARTS
from case_fast.data.empathetic_dialogues import EMOTIONS, SPLITS, listener_turns, read_conversations
from case_fast.data.featurizer import Example, FeatureSettings, Featurizer, TextTable
from case_fast.data.graphs import CSR
from case_fast.data.pack import make_batch
from case_fast.data.prepare import bundled
from case_fast.data.store import FORMAT, SplitWriter, Store, open_store, write_store
from case_fast.data.vocabulary import SPECIALS, Vocabulary
from case_fast.errors import ConfigError, DataError
from case_fast.files import sha256
from case_fast.training import preset, train

MANIFEST = {"counts": {"examples": {"train": 40, "valid": 3, "test": 0}}, "knowledge": {"spec": "bundled", "cache": None}}
VECTORS = (np.array([8, 10, 11], dtype=np.int32), np.arange(12, dtype=np.float32).reshape(3, 4))


def write(folder: Path, examples: dict[str, list[Example]], texts: TextTable, embeddings=None, manifest=MANIFEST) -> Path:
    writers = {}
    for split, found in examples.items():
        writers[split] = SplitWriter()
        for example in found:
            writers[split].add(example)
        assert len(writers[split]) == len(found)
    folder.mkdir()
    intensity = texts.emotional.intensity if texts.emotional else {}
    write_store(folder, Featurizer(texts.vocabulary, {}, intensity, FeatureSettings()), texts, writers, embeddings, manifest)
    return folder


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, list[Example]], TextTable]:
    examples, texts = random_examples(43, seed=5)
    return {"train": examples[:40], "valid": examples[40:], "test": []}, texts


@pytest.fixture
def store(tmp_path: Path, made) -> Store:
    return open_store(write(tmp_path / "a.store", *made, VECTORS))


def equal(found: Example, expected: Example) -> None:
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, CSR):
            for part in ("indptr", "indices", "relation"):
                assert np.array_equal(getattr(other, part), getattr(value, part)), f"{name}.{part}"
        elif isinstance(value, np.ndarray):
            assert other.dtype == value.dtype and np.array_equal(other, value), name
        else:
            assert other == value, name


# ---- round trip


def test_every_example_comes_back(store, made):
    examples, texts = made
    assert store.splits == SPLITS and [store.size(split) for split in SPLITS] == [40, 3, 0]
    for split in SPLITS:
        for index, expected in enumerate(examples[split]):
            equal(store.example(split, index), expected)
    assert len(store.texts) == len(texts)
    for index in range(len(texts)):
        assert store.texts.text(index) == texts.text(index)
        assert np.array_equal(store.texts.tokens(index), texts.tokens(index))
    assert store.knowledge == {"spec": "bundled", "cache": None}
    assert store.featurizer.vocabulary.words == texts.vocabulary.words


def test_a_batch_is_that_of_its_examples(store, made):
    examples, texts = made
    for indices in ([0], [3, 3], [39, 0, 7, 21], list(range(40)), np.array([5, 2]), torch.tensor([4, 1])):
        found = dict(tensors(store.batch("train", indices, seed=0)))
        expected = dict(tensors(make_batch([examples["train"][int(i)] for i in indices], texts)))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_store_of_before_the_feedback_serves_all_other_parts_and_names_what_it_lacks(tmp_path, made):
    settings = {"dialogues": "ed folder", "embeddings": None, "limit": 3, "features": {"max_context": 512}}
    path = write(tmp_path / "a.store", *made, manifest=MANIFEST | {"settings": settings})
    for split in SPLITS:
        arrays = load_file(path / f"{split}.safetensors")
        save_file({name: x for name, x in arrays.items() if not name.startswith("feedback")}, path / f"{split}.safetensors")
    store = open_store(path, check=False)
    others = [part for part in PARTS if part != "feedback"]
    found = dict(tensors(store.batch("train", [3, 1], seed=0)))
    expected = dict(tensors(make_batch([made[0]["train"][3], made[0]["train"][1]], made[1], others)))
    assert found.keys() == expected.keys() and all(x.equal(expected[name]) for name, x in found.items())
    with pytest.raises(DataError, match=r"train.safetensors: it has no field feedback, .* Prepare the store again: "
                                        r"case-fast prepare --dialogues 'ed folder' --limit 3\.$"):
        store.batch("train", [3], ["dialogue", "feedback"])
    with pytest.raises(DataError, match="it has no field feedback"):
        train(store, tmp_path / "run", preset("demo", "empdg-d"))
    assert not (tmp_path / "run").exists()
    assert store.example("train", 3).feedback is None and "feedback" not in found
    with pytest.raises(ConfigError, match="the example has no field feedback: .* make it again with case-fast prepare"):
        make_batch([store.example("train", 3)], made[1])


def test_any_text_comes_back(tmp_path, made):
    words = Vocabulary([*SPECIALS, "naïve", "🙂", "数学"])
    texts = TextTable(words)
    for text in ("naïve 🙂", "数学", "", "a\nb\t\u2028"):
        texts.add(text)
    store = open_store(write(tmp_path / "s", {}, texts, manifest=MANIFEST | {"counts": {"examples": {}}}))
    assert [store.texts.text(i) for i in range(4)] == ["naïve 🙂", "数学", "", "a\nb\t\u2028"]
    assert store.splits == ()


def test_the_cost_of_an_example_counts_the_rows_that_a_model_reads(store, made):
    examples, texts = made
    for split in SPLITS:
        expected = []
        for e in examples[split]:
            rows = sum(1 + len(texts.tokens(text)) for text in [*e.sub_utterance, *e.knowledge])
            rows += (1 + len(e.context)) * (1 + len(e.sub_utterance)) + 1 + len(e.response)
            expected.append(rows + 2 * (len(e.cognition_graph.indptr) - 1 + len(e.concept_graph.indptr) - 1))
        assert store.costs(split).tolist() == expected


def test_word_vectors_come_back(store, tmp_path, made):
    ids, vectors = store.embeddings()
    assert torch.equal(ids, torch.tensor([8, 10, 11], dtype=torch.int32)) and torch.equal(vectors, torch.arange(12.0).view(3, 4))
    assert open_store(write(tmp_path / "b.store", *made)).embeddings() is None


def test_arrays_are_views_of_the_mapped_file(store):
    """Opening a store of any size reads its offsets alone."""
    example = store.example("train", 0)
    for part in (example.context, example.concept_intensity, example.cognition_graph.indices, store.texts.tokens(0)):
        base = part
        while base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) and not part.flags.writeable and not part.flags.owndata


def test_opening_reads_no_array(tmp_path, made):
    """40 MB of words in an example: neither opening the store nor another example's batch holds them in memory."""
    examples, texts = made
    manifest = MANIFEST | {"counts": {"examples": {"train": 2}}}
    folder = write(tmp_path / "s", {"train": examples["train"][:2]}, texts, manifest=manifest)
    arrays = load_file(folder / "train.safetensors")
    arrays["response"] = np.concatenate([arrays["response"], np.zeros(10_000_000, np.int32)])
    arrays["response.offsets"] = np.append(arrays["response.offsets"][:2], len(arrays["response"]))
    save_file(arrays, folder / "train.safetensors")
    del arrays
    tracemalloc.start()
    try:
        store = open_store(folder, check=False)
        store.batch("train", [0])
        assert len(store.example("train", 1).response) >= 10_000_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_the_bundled_sample_is_what_the_readers_give(sample_store):
    """The store's texts and emotions are those of the files, listener turn by listener turn, in order."""
    for split in SPLITS:
        turns = list(listener_turns(read_conversations(bundled("dialogues"), split)[0]))
        assert sample_store.size(split) == len(turns) == sample_store.manifest["counts"]["examples"][split]
        for index, turn in enumerate(turns):
            found = sample_store.example(split, index)
            assert found.source == {
                "id": turn.id, "situation": turn.situation, "emotion": turn.emotion, "response": turn.response,
                "feedback": turn.feedback,
                "context": [t.text for t in turn.context], "by_speaker": [t.by_speaker for t in turn.context],
            }
            assert found.emotion == EMOTIONS.index(turn.emotion)


def test_the_package_opens_a_store(sample_store):
    assert isinstance(case_fast.open_store(str(sample_store.path)), case_fast.Store)


# ---- what a caller may get wrong


def test_an_unknown_split_or_index_is_named(store):
    with pytest.raises(ValueError, match="split 'dev' is not in this store; it has train, valid, test"):
        store.size("dev")
    for index in (-1, 40):
        with pytest.raises(IndexError, match=f"index {index} is outside the split 'train' of 40 examples"):
            store.example("train", index)
        with pytest.raises(IndexError, match=f"index {index} is outside"):
            store.batch("train", [0, index])
    with pytest.raises(IndexError, match="of 0 examples"):
        store.example("test", 0)
    with pytest.raises(ValueError, match="at least one example"):
        store.batch("train", [])


# ---- fingerprint


def test_fingerprint_is_that_of_the_content(tmp_path, made):
    examples, texts = made
    prints = {}
    for name, (content, vectors, manifest) in {
        "one": (examples, None, MANIFEST),
        "two": (examples, None, MANIFEST | {"seconds": 99.0}),
        "vectors": (examples, VECTORS, MANIFEST),
        "order": (examples | {"train": examples["train"][::-1]}, None, MANIFEST),
    }.items():
        store = open_store(write(tmp_path / name, content, texts, vectors, manifest))
        prints[name] = store.fingerprint
        assert store.manifest["files"] == {
            path.name: sha256(path) for path in sorted((tmp_path / name).iterdir()) if path.name != "manifest.json"
        }
    assert prints["one"] == prints["two"] and len(set(prints.values())) == 3


# ---- damage: a part changed by a function of its bytes, and the file that the error must name


def manifest_with(**parts) -> Callable[[bytes], bytes]:
    return lambda raw: json.dumps(json.loads(raw) | parts).encode()


def manifest_without(name: str) -> Callable[[bytes], bytes]:
    return lambda raw: json.dumps({key: value for key, value in json.loads(raw).items() if key != name}).encode()


def header_with(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def damage(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        change(header)
        packed = json.dumps(header).encode()
        packed += b" " * (-len(packed) % 8)
        return struct.pack("<Q", len(packed)) + packed + raw[8 + size :]

    return damage


def header_length(value: int) -> Callable[[bytes], bytes]:
    return lambda raw: struct.pack("<Q", value) + raw[8:]


def array_with(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        arrays = load_file(path)
        arrays[name] = change(arrays[name])
        save_file(arrays, path)

    return damage


def edited(array: np.ndarray, place: int, value: int) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


DAMAGE: dict[str, tuple[str, Callable]] = {
    "manifest empty": ("manifest.json", lambda raw: b""),
    "manifest cut": ("manifest.json", lambda raw: raw[:-30]),
    "manifest binary": ("manifest.json", lambda raw: random.Random(0).randbytes(500)),
    "manifest a list": ("manifest.json", lambda raw: b"[]"),
    "manifest nested deep": ("manifest.json", lambda raw: b"[" * 300_000),
    "older format": ("manifest.json", manifest_with(format="case_fast store 0")),
    "format of another kind": ("manifest.json", manifest_with(format=7)),
    "no format": ("manifest.json", manifest_without("format")),
    "no fingerprint": ("manifest.json", manifest_without("fingerprint")),
    "no knowledge": ("manifest.json", manifest_without("knowledge")),
    "no counts": ("manifest.json", manifest_without("counts")),
    "no files": ("manifest.json", manifest_without("files")),
    "counts as text": ("manifest.json", manifest_with(counts={"examples": "train"})),
    "counts as a list": ("manifest.json", manifest_with(counts=["train"])),
    "knowledge as text": ("manifest.json", manifest_with(knowledge="bundled")),
    "no emotions": ("manifest.json", manifest_without("emotions")),
    "emotions a number": ("manifest.json", manifest_with(emotions=32)),
    "emotions swapped": ("manifest.json", manifest_with(emotions=[EMOTIONS[1], EMOTIONS[0], *EMOTIONS[2:]])),
    "another number of examples": ("train.safetensors", None),  # the manifest is changed, the split named
    "split empty": ("train.safetensors", lambda raw: b""),
    "split of 7 bytes": ("train.safetensors", lambda raw: raw[:7]),
    "split cut in the header": ("train.safetensors", lambda raw: raw[:100]),
    "split cut at the end": ("train.safetensors", lambda raw: raw[:-1]),
    "split with a tail": ("valid.safetensors", lambda raw: raw + b"\0"),
    "split of zeros": ("train.safetensors", lambda raw: bytes(len(raw))),
    "split a pickle": ("train.safetensors", lambda raw: b"\x80\x04cos\nsystem\n(S'touch /tmp/never'\ntR."),
    "texts cut": ("texts.safetensors", lambda raw: raw[: len(raw) // 2]),
    "header length 0": ("train.safetensors", header_length(0)),
    "header length 2^63": ("train.safetensors", header_length(2**63)),
    "header length all ones": ("train.safetensors", header_length(2**64 - 1)),
    "header length of the file": ("train.safetensors", lambda raw: struct.pack("<Q", len(raw)) + raw[8:]),
    "header length one more": ("train.safetensors", lambda raw: struct.pack("<Q", raw[0] + 256 * raw[1] + 1) + raw[8:]),
    "header bomb of 99 MB": ("train.safetensors", lambda raw: struct.pack("<Q", 99_000_000) + b" " * 99_000_000),
    "header nested deep": ("train.safetensors", lambda raw: struct.pack("<Q", 300_000) + b"[" * 300_000),
    "header no JSON": ("train.safetensors", lambda raw: raw[:8] + b"x" * (len(raw) - 8)),
    "array missing": ("train.safetensors", header_with(lambda h: h.pop("source"))),
    "array out of the file": ("train.safetensors", header_with(lambda h: h["context"].update(data_offsets=[0, 10**12]))),
    "array of negative size": ("train.safetensors", header_with(lambda h: h["context"].update(data_offsets=[8, 0]))),
    "array of a huge shape": ("train.safetensors", header_with(lambda h: h["context"].update(shape=[2**62, 2**62]))),
    "arrays over each other": ("train.safetensors",
                               header_with(lambda h: h["context"].update(data_offsets=h["response"]["data_offsets"]))),
    "array renamed": ("train.safetensors", header_with(lambda h: h.update(konzept=h.pop("concept")))),
    "offsets missing": ("texts.safetensors", header_with(lambda h: h.update(x=h.pop("text.offsets")))),
    "array of another type": ("train.safetensors", header_with(lambda h: h["context"].update(dtype="F64"))),
    "array as float": ("train.safetensors", array_with("context.offsets", lambda a: a.astype(np.float64))),
    "offsets beyond the end": ("train.safetensors", array_with("context.offsets", lambda a: edited(a, -1, 10**9))),
    "offsets falling": ("train.safetensors", array_with("context.offsets", lambda a: edited(a, 3, 10**9))),
    "offsets negative": ("train.safetensors", array_with("source.offsets", lambda a: edited(a, 1, -5))),
    "offsets not from 0": ("train.safetensors", array_with("response.offsets", lambda a: edited(a, 0, 1))),
    "no offsets": ("train.safetensors", array_with("response.offsets", lambda a: a[:0])),
    "one item less": ("train.safetensors", array_with("emotion", lambda a: a[:-1])),
    "one row less": ("texts.safetensors", array_with("words.offsets", lambda a: np.delete(a, -2))),
    "vocabulary cut": ("vocabulary.json", lambda raw: raw[:-10]),
    "features cut": ("features.json", lambda raw: raw[:-10]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_at_once(store, case):
    part, damage = DAMAGE[case]
    path = store.path / part
    if damage is None:
        manifest = store.path / "manifest.json"
        manifest.write_bytes(manifest_with(counts={"examples": {"train": 41, "valid": 3, "test": 0}})(manifest.read_bytes()))
    elif damage.__qualname__.startswith("array_with"):
        damage(path)
    else:
        path.write_bytes(damage(path.read_bytes()))
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        open_store(store.path)
    assert time.monotonic() - began < 1
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith("Prepare the store again.")


def test_an_older_format_is_named(store):
    path = store.path / "manifest.json"
    path.write_text(json.dumps({"format": "case_fast store 0"}))
    with pytest.raises(DataError, match=f"format 'case_fast store 0', this version reads '{FORMAT}'"):
        open_store(store.path)


def test_emotions_in_another_order_are_refused_by_name(store):
    """An example's label is a place in the list: in another order it would mean another emotion without a sound."""
    path = store.path / "manifest.json"
    whole = path.read_bytes()
    for stored, said in (
        ((*EMOTIONS[:30], *EMOTIONS[:29:-1]), f"emotion 30 is {EMOTIONS[31]!r} in this store and {EMOTIONS[30]!r}"),
        (EMOTIONS[:-1], f"emotion 31 is None in this store and {EMOTIONS[31]!r} in this version. Prepare the store again"),
        ((*EMOTIONS, "smug"), "emotion 32 is 'smug' in this store and None in this version"),
    ):
        path.write_bytes(manifest_with(emotions=list(stored))(whole))
        with pytest.raises(DataError, match=said):
            open_store(store.path)


@pytest.mark.parametrize("part", ["manifest.json", "vocabulary.json", "features.json", "texts.safetensors", "valid.safetensors"])
@pytest.mark.parametrize("how", ["missing", "folder", "link to nothing", "link to itself", "link to a device", "pipe"])
def test_a_missing_part_or_a_link_to_no_file_is_refused(store, part, how):
    path = store.path / part
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        path.symlink_to({"link to nothing": store.path / "x", "link to itself": path, "link to a device": "/dev/zero"}[how])
    began = time.monotonic()
    with pytest.raises(DataError, match=f"{part}: .*(not found|is a folder)"):
        open_store(store.path)
    assert time.monotonic() - began < 1


def test_a_split_name_is_no_path(store):
    """Only the three splits are looked for, whatever the manifest lists."""
    outside = store.path.parent / "outside.safetensors"
    shutil.copy(store.path / "train.safetensors", outside)
    manifest = store.path / "manifest.json"
    manifest.write_bytes(manifest_with(counts={"examples": {"../outside": 40, "valid": 3}})(manifest.read_bytes()))
    assert open_store(store.path, check=False).splits == ("valid",)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: store not found. Make one with case-fast prepare"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: store is a file, not a folder"):
        open_store(tmp_path / "file")
    with pytest.raises(DataError, match=r"manifest\.json: manifest of the store not found"):
        open_store(tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-4], lambda raw: b"", header_with(lambda h: h.update(v=h.pop("vectors")))])
def test_damaged_word_vectors_are_named(store, damage):
    path = store.path / "embeddings.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"embeddings\.safetensors: damaged"):
        open_store(store.path, check=False).embeddings()
    path.unlink()
    with pytest.raises(DataError, match=r"embeddings\.safetensors: word vectors of the store not found"):
        open_store(store.path, check=False).embeddings()
    with pytest.raises(DataError, match=r"embeddings\.safetensors: part of the store not found"):
        open_store(store.path)


def test_any_flipped_byte_of_a_header_is_survived(store):
    """Refused, or the store reads as before or differs in values; no other exception on opening."""
    path = store.path / "valid.safetensors"
    whole = path.read_bytes()
    rng = random.Random(0)
    size = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            open_store(store.path, check=False)
        except DataError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("part", ["manifest.json", "vocabulary.json", "features.json", "texts.safetensors", "train.safetensors",
                                  "valid.safetensors", "embeddings.safetensors"])
def test_a_flipped_bit_anywhere_is_noticed_on_opening(store, part):
    """Of the manifest: but where JSON has the same value all the same, or where it is the name of its own checksum."""
    path = store.path / part
    whole = path.read_bytes()
    rng = random.Random(part)
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = open_store(store.path)
        except DataError as error:
            assert str(error).startswith(f"{path}: ") or part == "manifest.json", error
        else:
            assert part == "manifest.json"
            assert {name: found.manifest[name] for name in store.manifest if name != "sha256"} == {
                name: value for name, value in store.manifest.items() if name != "sha256"}
    path.write_bytes(whole)
    open_store(store.path)


def test_a_manifest_of_before_it_had_a_checksum_is_read_and_other_checksums_hold(store):
    path = store.path / "manifest.json"
    path.write_bytes(manifest_without("sha256")(path.read_bytes()))
    assert open_store(store.path).fingerprint == store.fingerprint
    for change in (manifest_with(fingerprint="0" * 64), manifest_with(files=store.manifest["files"] | {"x": "0" * 64})):
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        with pytest.raises(DataError, match=r"manifest\.json: damaged \(its checksum does not match\)"):
            open_store(store.path)
        path.write_bytes(whole)
    path.write_bytes(manifest_with(files={"../train.safetensors": "0" * 64})(path.read_bytes()))
    with pytest.raises(DataError, match="damaged"):
        open_store(store.path)
