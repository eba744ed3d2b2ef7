"""Writing folders and files so that they are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from case_fast.errors import ConfigError, PlaceError

_PROBE_BYTES = 4096


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing(path: str | Path, *also: type[Exception]) -> Iterator[None]:
    """Turns a failure to write inside, an OSError or one of ``also``, into a `PlaceError` that names ``path``."""
    try:
        yield
    except PlaceError:
        raise
    except (OSError, *also) as error:
        raise PlaceError(path, error) from error


def png_of(figure: Any, **how: Any) -> bytes:
    """A figure of matplotlib's as PNG; ``how``: as of its savefig."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **how)
    return stream.getvalue()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file in one step: readers see the old content or the new one.

    Raises:
        PlaceError: it could not be written; what was there is untouched.
    """
    path = Path(path)
    with writing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_beside(path))
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _beside(path: Path) -> str:
    """How the names of its temporary siblings begin: no longer than a name may be."""
    return f".{path.name[:50]}."


def write_text(path: str | Path, text: str) -> None:
    """As `write_bytes`, in UTF-8. A path's bytes that are no text stand as Python and JSON write them: ``\\udcff``."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


# ---- places, tried before the work whose outcome belongs there


def require_folder_place(folder: str | Path) -> None:
    """Make sure, before long work, that files can be written into a folder, made where it is not there. Nothing is left of it.

    Raises:
        PlaceError: they cannot: no permission, nothing but reading, a full disk, a file in the way.
        ConfigError: it lies in a folder that is whole as it is, such as a store.
    """
    with writing(folder):
        _require_text(folder)
        _try_writing(Path(os.path.abspath(folder)))


def require_place(path: str | Path) -> None:
    """As `require_folder_place`, for a file, or a folder that is put in its place as a whole; either may be there already."""
    with writing(path):
        _require_text(path)
        with suppress(FileNotFoundError):
            os.lstat(path)  # too long a name
        _try_writing(Path(os.path.abspath(path)).parent)


def require_file_place(path: str | Path) -> Path:
    """As `require_place`, for a file: the path to write, where a link leads to."""
    with writing(path), suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):  # a file would be put in the place of a device
            raise OSError("it is no regular file")
    require_place(path)
    return Path(os.path.realpath(path))


def _require_text(path: str | Path) -> None:
    """Raise OSError where a path is no text in UTF-8: safetensors would write there, and not read it back."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        raise OSError(errno.EILSEQ, "its name is no text in UTF-8") from None


def _try_writing(folder: Path) -> None:
    """Write a file into a folder and remove it, with the folders that are made for that; raises OSError, or ConfigError."""
    missing, made = [], []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    if whole := kind_of(folder):
        raise ConfigError(f"{folder} is a {whole}, and nothing else belongs in it; give another folder")
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        handle, probe = tempfile.mkstemp(dir=folder, prefix=".probe.")
        try:
            left = _PROBE_BYTES
            while left:  # a disk may take a part
                left -= os.write(handle, bytes(left))
            os.fsync(handle)
        finally:
            os.close(handle)
            os.unlink(probe)
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # another process has put something there
                folder.rmdir()


def require_room(folder: str | Path, size: int) -> None:
    """Raise `PlaceError` where the disk of a folder that is there has less than ``size`` bytes left."""
    with writing(folder):
        disk = shutil.disk_usage(folder)
        if disk.total and disk.free < size:
            need, left = (f"{count / 2**20:,.0f} MiB" for count in (size, disk.free))
            raise OSError(errno.ENOSPC, f"{need} are needed and {left} are left")


def kind_of(folder: str | Path) -> str:
    """What a folder of ours that is whole as it is says in its manifest, or a published model in its features: "case_fast store
    1"; "" of any other."""
    for name in ("manifest.json", "features.json"):
        path = Path(folder) / name
        try:
            form = json.loads(path.read_text(encoding="utf-8"))["format"] if path.is_file() else ""
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(form, str) and form.startswith("case_fast "):
            return form
    return ""


def plain(value: Any) -> Any:
    """The same value with NaN and infinities as text, deep down."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Ask the system to put a file's or folder's content on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling to fill; it takes the name ``path`` when the block ends well and vanishes otherwise.

    A folder that is already there is replaced at the very end.

    Raises:
        PlaceError: it could not be written; an OSError of the block is taken for that.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_beside(path)))
        yield from _filled(path, temporary)


def _filled(path: Path, temporary: Path) -> Iterator[Path]:
    try:
        yield temporary
        for item in [*sorted(temporary.rglob("*")), temporary]:
            item.chmod(0o755 if item.is_dir() else 0o644)  # temporary folders and safetensors' files are the owner's alone
            sync(item)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_beside(path)}old."))
            try:
                path.rename(old / "folder")
                temporary.rename(path)
                sync(path.parent)
            except BaseException:
                if not path.exists():
                    (old / "folder").rename(path)
                raise
            finally:
                if path.exists():  # one of the two is in place
                    shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
            sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
