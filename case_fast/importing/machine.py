"""The state of the interpreter of pickles: stack, marks, memo, and what bounds them (`case_fast.importing.pickles`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from case_fast.errors import DataError

MOST_DEPTH = 100
MEMORY_PER_BYTE, MEMORY_ALLOWED = 24, 1 << 24  # bytes of containers that a byte of the file may make; that any file may
LIST_BYTES, DICT_BYTES, SET_BYTES, TUPLE_BYTES = 80, 300, 260, 180  # about what an empty or short one takes
DAMAGED, FOREIGN = "Download it again", "Nothing in it was run. Do not open it by other means"
_SHARED_TEXTS, _SHARED_LENGTH = 1 << 18, 40  # short texts that occur again are one object: so many, up to so long
_SCALARS = frozenset({str, int, float, bool, type(None), bytes})


class DataList(list):
    """``depth``: levels of containers, itself included; negative once it is part of another one, and then it stays as it is."""

    __slots__ = ("depth",)


class DataArray(DataList):
    """An array, as a list of its values. ``open``: they are still to come."""

    __slots__ = ("open",)


class DataDict(dict):
    """``open``: an instance of a class whose attributes are still to come."""

    __slots__ = ("depth", "open")


class DataSet(set):
    __slots__ = ("depth",)


class DataTuple(tuple):
    """``name``: a name among its items, which makes it the arguments of one, and no data."""

    depth: int
    name: Name | Dtype | None


@dataclass(frozen=True, slots=True)
class Name:
    """What a name in the file stands for: ``build`` makes data of its arguments; without it, it is an argument itself."""

    module: str
    name: str
    build: Callable[[Machine, tuple], Any] | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True)
class Dtype:
    """A dtype of numpy; the order of its bytes comes with its state."""

    code: str
    order: str = "="

    def __str__(self) -> str:
        return f"the dtype {self.code}"


_COUNTED = frozenset({DataList, DataArray, DataDict, DataSet, DataTuple, Name, Dtype})


class Machine:
    """``content``: the whole file; ``path``: what errors name; ``at``: the next byte; ``opcode_at``: that of the opcode."""

    def __init__(self, content: bytes, path: str, start: int = 0):
        self.content, self.path = content, path
        self.at = self.opcode_at = start
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each mark
        self.memo: list[Any] = []
        self.texts: dict[str, str] = {}
        self.memory = MEMORY_ALLOWED + MEMORY_PER_BYTE * (len(content) - start)

    def error(self, problem: str, remedy: str) -> DataError:
        return DataError(self.path, f"byte {self.opcode_at:,}: {problem}", remedy)

    def result(self) -> Any:
        """What is left when the program ends: one value, at the end of the file."""
        if len(self.stack) != 1 or self.marks:
            left = f"{len(self.stack)} values and {len(self.marks)} open marks"
            raise self.error(f"it ends with {left}, not with one value", DAMAGED)
        if self.at != len(self.content):
            raise self.error(f"{len(self.content) - self.at:,} bytes follow the end of the data", DAMAGED)
        self.close(self.stack)
        return self.stack[0]

    # ---- the bytes of an opcode

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self.content):
            self.at = start
            raise self.error(f"it announces {count:,} bytes, and {len(self.content) - start:,} follow", DAMAGED)
        return self.content[start : self.at]

    def number(self, count: int) -> int:
        """An unsigned little-endian number of so many bytes."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.content):
            raise self.error("it ends in the middle", DAMAGED)
        return self.content[start] if count == 1 else int.from_bytes(self.content[start : self.at], "little")

    def line(self, most: int | None = None) -> str:
        """The rest of the line, in ASCII; of a text (no ``most``) in Python's escapes."""
        end = self.content.find(b"\n", self.at, len(self.content) if most is None else self.at + most + 1)
        if end < 0:
            raise self.error(f"a line of more than {most} characters" if most else "a line that does not end", DAMAGED)
        raw = self.take(end - self.at)
        self.at += 1
        try:
            return raw.decode("raw-unicode-escape" if most is None else "ascii")
        except UnicodeDecodeError as error:
            raise self.error(f"a line that is no text ({error.reason})", DAMAGED) from error

    # ---- values

    def push_text(self, raw: bytes) -> None:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a text that is not UTF-8 ({error.reason})", DAMAGED) from error
        if len(text) <= _SHARED_LENGTH:
            known = self.texts.get(text)
            if known is not None:
                text = known
            elif len(self.texts) < _SHARED_TEXTS:
                self.texts[text] = text
        self.stack.append(text)

    def push_integer(self, value: int) -> None:
        if not -(1 << 63) <= value < 1 << 63:
            raise self.error("an integer of more than 64 bits", FOREIGN)
        self.stack.append(value)

    def made(self, container: Any, memory: int) -> Any:
        """The container, counted against what the file may ask for."""
        self.memory -= memory
        if self.memory < 0:
            most = f"{MEMORY_PER_BYTE} times its size and {MEMORY_ALLOWED >> 20} MiB"
            raise self.error(f"it asks for more memory than {most}, which no such data need", FOREIGN)
        container.depth = 1
        return container

    def close(self, items: Iterable[Any]) -> int:
        """Close what is put into a container now; the levels of the deepest of it."""
        deepest = 0
        for item in items:
            kind = item.__class__
            if kind in _COUNTED:
                name = item if kind is Name or kind is Dtype else item.name if kind is DataTuple else None
                if name is not None:
                    raise self.error(f"{name} stands where data should", FOREIGN)
                depth = abs(item.depth)
                if kind is not DataTuple:
                    item.depth = -depth
                deepest = max(deepest, depth)
        return deepest

    def deepen(self, container: Any, inside: int) -> None:
        """The container, still open, holds something of so many levels now."""
        if container.depth < 0:
            raise self.error("a container is changed after it was put into another one, or holds itself", FOREIGN)
        if inside >= MOST_DEPTH:
            raise self.error(f"containers within containers, more than {MOST_DEPTH} deep", FOREIGN)
        if inside >= container.depth:
            container.depth = inside + 1

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target.__class__ is not DataList:
            raise self.error("items are added to what is no list", DAMAGED)
        self.deepen(target, self.close(items))
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target.__class__ is not DataDict or target.open or len(items) % 2:
            raise self.error("keys and values are added to what is no dict", DAMAGED)
        self.deepen(target, self.close(items))
        self.require_scalars(items[::2], "a key of a dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    def unite(self, items: Iterable[Any]) -> DataSet:
        items = list(items)
        self.require_scalars(items, "a member of a set")
        return self.made(DataSet(items), SET_BYTES)

    def require_scalars(self, items: Iterable[Any], what: str) -> None:
        for item in items:
            if item.__class__ not in _SCALARS:
                raise self.error(f"{what} that is no text or number", FOREIGN)

    def push_tuple(self, items: list[Any]) -> None:
        made = self.made(DataTuple(items), TUPLE_BYTES)
        made.name = next((item for item in items if item.__class__ in (Name, Dtype)), None)
        self.deepen(made, self.close(item for item in items if item.__class__ not in (Name, Dtype)))
        self.stack.append(made)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def remember(self, place: int) -> None:
        memo = self.memo
        if place == len(memo):  # as nearly always
            memo.append(self.stack[-1])
            return
        if place >= self.at:  # each value that is remembered takes a byte of the file at least
            raise self.error(f"memo {place:,}, which is more than there can be values", FOREIGN)
        memo += [None] * (place + 1 - len(memo))
        memo[place] = self.stack[-1]

    def recall(self, place: int) -> None:
        if place >= len(self.memo):
            raise self.error(f"memo {place:,}, which holds nothing", DAMAGED)
        self.stack.append(self.memo[place])
