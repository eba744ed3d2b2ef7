"""Checksums beside files: a JSON file that has one form only, its own checksum in it, and lists the sha256 of others.

    CHECKPOINT/manifest.json    see `training.checkpoint`
    MODEL/checksums.json        of what `DialogueModel.save_pretrained` writes and loading reads

A flipped byte anywhere is noticed: in a listed file by its checksum, in the list by its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

from case_fast.errors import CheckpointError
from case_fast.files import sha256, write_bytes

NAME = "checksums.json"
FORMAT = "case_fast checksums 1"
MAX_BYTES = 1 << 20
MODEL = ("config.json", "model.safetensors")
_log = logging.getLogger("case_fast")


def digest_of(body: dict[str, Any]) -> str:
    """SHA-256 of plain values, whatever their order in dicts."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sealed(body: dict[str, Any]) -> bytes:
    """The only text that a list of this content can have, its own checksum included."""
    return json.dumps({**body, "sha256": digest_of(body)}, indent=1, sort_keys=True).encode()


def unsealed(path: Path, raw: bytes, *keys: str) -> dict[str, Any]:
    """The content of a text that `sealed` made, with these keys in it; `CheckpointError` if it is damaged."""
    try:
        body = json.loads(raw)
        body.pop("sha256")
        sound = sealed(body) == raw and all(key in body for key in keys)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r})") from error
    if not sound:
        raise CheckpointError(f"{path}: damaged (its checksum does not match)")
    return body


def damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: damaged (its checksum does not match the manifest's)")


def write(folder: Path, before: Path | None = None) -> None:
    """List the model in ``folder``; with ``before`` list there that its files may still be those of that folder as well: while
    one takes the place of the other, at every moment the list fits what is there."""
    body = {"format": FORMAT, "files": _listed(folder)} | ({} if before is None else {"replaced": _listed(before)})
    write_bytes((before or folder) / NAME, sealed(body))


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: _entry(folder / name) for name in MODEL if (folder / name).is_file()}


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "bytes": os.path.getsize(path)}


def check(path: Path, listed_in: str = NAME) -> None:
    """Check a file by the list beside it. Without one, as earlier versions wrote none, nothing is checked, which is said once.

    Raises:
        CheckpointError: the file or the list is damaged.
        OSError: one cannot be read.
    """
    listed = path.parent / listed_in
    if not listed.is_file():
        _unlisted(str(path.parent.absolute()))
        return
    with open(listed, "rb") as stream:
        body = unsealed(listed, stream.read(MAX_BYTES), "files")
    allowed = [files[path.name] for files in (body["files"], body.get("replaced", {})) if path.name in files]
    if _entry(path) not in allowed:
        raise damaged(path)


@cache
def _unlisted(folder: str) -> None:
    _log.warning("%s: there are no checksums beside its files (an earlier version or another program wrote them): it is used "
                 "unchecked", folder)
