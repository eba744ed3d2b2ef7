"""Arrays of numpy in the releases: their values as plain lists, and the files that hold one array."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

MOST_DIMENSIONS = 4
NPY = b"\x93NUMPY"
_HEADER = re.compile(r"\{'descr': '([<>|=]?)([biufUSO]\d{0,5})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\),? *\}\s*")


class ArrayProblem(ValueError):
    """Why an array is none, without the file's name and place."""


def _size(shape: Any) -> int:
    """The number of values in an array of that shape."""
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise ArrayProblem("the shape of an array that is none")
    if not 1 <= len(shape) <= MOST_DIMENSIONS:
        raise ArrayProblem(f"an array of {len(shape)} dimensions, where 1 to {MOST_DIMENSIONS} can be read")
    return math.prod(shape)


def plain_values(raw: Any, code: str, order: str, shape: Any, layout: str) -> list:
    """The values of an array, as (nested) lists of int, float, bool, str or bytes.

    Args:
        raw: its bytes. code, order: of its dtype, such as "U12" and "<". layout: "C" or "F".

    Raises:
        ArrayProblem: it is none of plain numbers or texts, or the bytes are not as many as its shape says.
    """
    size = _size(shape)
    try:
        dtype = np.dtype(code).newbyteorder(order)
    except (TypeError, ValueError) as error:
        raise ArrayProblem(f"an array of {code}, which is no dtype of numpy") from error
    if dtype.kind not in "biufUS" or not dtype.itemsize:
        raise ArrayProblem(f"an array of {code}, where numbers and texts can be read")
    if not isinstance(raw, bytes) or len(raw) != size * dtype.itemsize:
        held = f"{len(raw):,}" if isinstance(raw, bytes) else "no"
        raise ArrayProblem(f"an array of {size:,} values of type {code} with {held} bytes")
    if not size:  # however long its other sides are
        return []
    found = np.frombuffer(raw, dtype)
    if dtype.kind == "U":
        points = found.view(np.dtype("u4").newbyteorder(order))
        if ((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any():
            raise ArrayProblem("an array of texts that holds what is no character")
    return found.reshape(shape, order=layout).tolist()


def shaped(values: list, shape: Any) -> list:
    """The values of an array of objects as lists within lists, by its shape."""
    size = _size(shape)
    if len(values) != size:
        raise ArrayProblem(f"an array of shape {shape} with {len(values):,} values")
    for side in reversed(shape[1:] if size else ()):
        values = [values[start : start + side] for start in range(0, len(values), side)]
    return values


def npy_header(content: bytes) -> tuple[int, str, str, tuple[int, ...], str]:
    """Of a ``.npy`` file: where its values begin, and code, order, shape and layout as for `plain_values`.

    Raises:
        ArrayProblem: it is none, or its header is not that of an array of numbers, texts or objects.
    """
    width = {1: 2, 2: 4, 3: 4}.get(content[6] if len(content) > 6 else 0)
    if not content.startswith(NPY) or width is None:
        raise ArrayProblem("no .npy file of a known version")
    size = int.from_bytes(content[8 : 8 + width], "little")
    start = 8 + width + size
    if size > 10_000 or start > len(content):
        raise ArrayProblem(f"a header that announces {size:,} bytes, in a file of {len(content):,}")
    header = _HEADER.fullmatch(content[8 + width : start].decode("latin-1"))
    if header is None:
        raise ArrayProblem("a header that is not that of an array of numbers, texts or objects")
    order, code, fortran, sides = header.groups()
    sides = [side.strip() for side in sides.split(",") if side.strip()]
    if not all(side.isdecimal() and len(side) < 16 for side in sides):
        raise ArrayProblem("the shape of an array that is none")
    return start, code, order or "=", tuple(map(int, sides)), "F" if fortran == "True" else "C"
