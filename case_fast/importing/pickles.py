"""Plain data out of a pickle, by an interpreter that can make nothing else.

A pickle is a program: Python's own reader carries out whatever function it names. The one here knows the opcodes that write
down None, numbers, texts, bytes, lists, tuples, dicts and sets, and a short list of names (`case_fast.importing.names`), of which
each stands for a function of this package that makes such data; nothing is imported, looked up or called for a name. Any other
name, and any opcode that would need one, is refused where it stands.

What a file can cost is bounded by its size: time, as each opcode takes a bounded number of steps for each of its bytes; memory,
as containers are counted against the file's size; depth, as a container is closed when it is put into another one, which also
means that none can hold itself. Keys of dicts and members of sets are texts and numbers of at most 64 bits: cheap to hash.
"""

from __future__ import annotations

import gc
import re
import struct
from collections.abc import Callable
from typing import Any

from case_fast.errors import DataError
from case_fast.importing import names
from case_fast.importing.machine import DAMAGED, FOREIGN, LIST_BYTES, MOST_DEPTH, SET_BYTES, DataList, DataSet, Machine

_MOST_NUMBER = 32  # characters of a line that holds a number
_TOLD_EVERY = 1 << 16  # opcodes


def read_pickle(content: bytes, path: str, start: int = 0, progress: Callable[[int, int], None] | None = None) -> Any:
    """The data in ``content[start:]``: None, bool, int, float, str, bytes and lists, tuples, dicts and sets of them.

    Arrays of numpy become lists, its scalars Python's; an instance of the class ``Lang`` of the releases becomes the dict of its
    attributes.

    Args:
        path: what errors name. progress: told (bytes done, bytes in all).

    Raises:
        DataError: a name or opcode that is not allowed, a limit that is passed, damage; with the byte where it stands.
    """
    machine = Machine(content, path, start)
    collecting = gc.isenabled()
    gc.disable()  # nothing made here can hold itself, and looking for what does takes a third of the time
    try:
        while True:
            for _ in range(_TOLD_EVERY):
                machine.opcode_at = at = machine.at
                opcode = content[at]
                machine.at = at + 1
                if opcode == _STOP:
                    return machine.result()
                carry_out = _OPCODES[opcode]
                if carry_out is None:
                    raise _refused(machine, opcode)
                carry_out(machine)
            if progress:
                progress(machine.at, len(content))
    except IndexError:
        if machine.at >= len(content):
            raise machine.error("it ends in the middle", DAMAGED) from None
        raise machine.error("it takes more values than there are", DAMAGED) from None
    finally:
        if collecting:
            gc.enable()


_STOP = 0x2E
_BY_NUMBER = "a function by its number in a list of Python's"
_PYTHON_2 = "a text as Python 2 wrote it, whose encoding nothing tells"
_REFUSED = {
    0x69: ("INST", "an instance of {}.{}, as protocol 0 makes it"),
    0x6F: ("OBJ", "an instance of a class, as protocol 1 makes it"),
    0x92: ("NEWOBJ_EX", "an instance of a class, made with keywords"),
    0x82: ("EXT1", _BY_NUMBER), 0x83: ("EXT2", _BY_NUMBER), 0x84: ("EXT4", _BY_NUMBER),
    0x50: ("PERSID", "an object that lies elsewhere"), 0x51: ("BINPERSID", "an object that lies elsewhere"),
    0x97: ("NEXT_BUFFER", "data that lie elsewhere"), 0x98: ("READONLY_BUFFER", "data that lie elsewhere"),
    0x53: ("STRING", _PYTHON_2), 0x54: ("BINSTRING", _PYTHON_2), 0x55: ("SHORT_BINSTRING", _PYTHON_2),
}


def _refused(machine: Machine, opcode: int) -> DataError:
    unknown = (f"0x{opcode:02x}", "no pickle of plain data holds it; is this a pickle at all?")
    name, what = _REFUSED.get(opcode, unknown)
    shown = [ascii(machine.line(names.MOST_NAME))[1:-1] for _ in range(what.count("{}"))]  # no control codes on a terminal
    return machine.error(f"opcode {name}: {what.format(*shown)}", FOREIGN)


# ---- the opcodes, by their byte; those of one letter and of a width differ in nothing else

_OPCODES: list[Callable[[Machine], None] | None] = [None] * 256


def _opcode(byte: bytes) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    def listed(carry_out: Callable[[Machine], None]) -> Callable[[Machine], None]:
        _OPCODES[byte[0]] = carry_out
        return carry_out

    return listed


for _byte, _constant in ((b"N", None), (b"\x88", True), (b"\x89", False)):
    _opcode(_byte)(lambda m, value=_constant: m.stack.append(value))
for _byte, _width in ((b"K", 1), (b"M", 2)):
    _opcode(_byte)(lambda m, width=_width: m.stack.append(m.number(width)))
for _byte, _width in ((b"\x8c", 1), (b"X", 4), (b"\x8d", 8)):
    _opcode(_byte)(lambda m, width=_width: m.push_text(m.take(m.number(width))))
for _byte, _width in ((b"C", 1), (b"B", 4), (b"\x8e", 8), (b"\x96", 8)):  # the last one a bytearray
    _opcode(_byte)(lambda m, width=_width: m.stack.append(m.take(m.number(width))))
for _byte, _width in ((b"\x8a", 1), (b"\x8b", 4)):
    _opcode(_byte)(lambda m, width=_width: _long(m, m.number(width)))
for _byte, _width in ((b"q", 1), (b"r", 4)):
    _opcode(_byte)(lambda m, width=_width: m.remember(m.number(width)))
for _byte, _width in ((b"h", 1), (b"j", 4)):
    _opcode(_byte)(lambda m, width=_width: m.recall(m.number(width)))
for _byte, _count in ((b"\x85", 1), (b"\x86", 2), (b"\x87", 3)):
    _opcode(_byte)(lambda m, count=_count: m.push_tuple([m.stack.pop() for _ in range(count)][::-1]))
_opcode(b")")(lambda m: m.push_tuple([]))
_opcode(b"t")(lambda m: m.push_tuple(m.pop_mark()))
_opcode(b"J")(lambda m: m.stack.append(int.from_bytes(m.take(4), "little", signed=True)))
_opcode(b"G")(lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]))
_opcode(b"V")(lambda m: m.push_text(m.line().encode("utf-8", "surrogatepass")))
_opcode(b"p")(lambda m: m.remember(_natural(m)))
_opcode(b"g")(lambda m: m.recall(_natural(m)))
_opcode(b"\x94")(lambda m: m.memo.append(m.stack[-1]))
_opcode(b"]")(lambda m: m.stack.append(m.made(DataList(), LIST_BYTES)))
_opcode(b"}")(lambda m: m.stack.append(names.dictionary(m)))
_opcode(b"\x8f")(lambda m: m.stack.append(m.made(DataSet(), SET_BYTES)))
_opcode(b"a")(lambda m: m.extend([m.stack.pop()]))
_opcode(b"e")(lambda m: m.extend(m.pop_mark()))
_opcode(b"s")(lambda m: m.update([m.stack.pop() for _ in range(2)][::-1]))
_opcode(b"u")(lambda m: m.update(m.pop_mark()))
_opcode(b"c")(lambda m: names.push_name(m, m.line(names.MOST_NAME), m.line(names.MOST_NAME)))
_opcode(b"\x93")(lambda m: names.push_name(m, *[m.stack.pop() for _ in range(2)][::-1]))
_opcode(b"R")(names.call)
_opcode(b"\x81")(names.instance)
_opcode(b"b")(names.set_state)


@_opcode(b"\x80")
def _protocol(m: Machine) -> None:
    if (version := m.number(1)) > 5:
        raise m.error(f"protocol {version}, of which nothing is known", DAMAGED)


@_opcode(b"\x95")
def _frame(m: Machine) -> None:
    if (size := m.number(8)) > len(m.content) - m.at:
        raise m.error(f"it announces {size:,} bytes, and {len(m.content) - m.at:,} follow", DAMAGED)


@_opcode(b"(")
def _mark(m: Machine) -> None:
    if len(m.marks) > 2 * MOST_DEPTH:
        raise m.error(f"containers within containers, more than {MOST_DEPTH} deep", FOREIGN)
    m.marks.append(m.stack)
    m.stack = []


@_opcode(b"l")
def _list_of_mark(m: Machine) -> None:
    items = m.pop_mark()
    m.stack.append(m.made(DataList(), LIST_BYTES))
    m.extend(items)


@_opcode(b"d")
def _dict_of_mark(m: Machine) -> None:
    items = m.pop_mark()
    m.stack.append(names.dictionary(m))
    m.update(items)


@_opcode(b"\x90")
def _add_items(m: Machine) -> None:
    items = m.pop_mark()
    if m.stack[-1].__class__ is not DataSet:
        raise m.error("members are added to what is no set", DAMAGED)
    m.deepen(m.stack[-1], 0)
    m.stack[-1].update(m.unite(items))


@_opcode(b"\x91")
def _frozen_set(m: Machine) -> None:
    items = m.pop_mark()
    m.stack.append(m.unite(items))


@_opcode(b"I")
@_opcode(b"L")
def _integer_line(m: Machine) -> None:
    digits = m.line(_MOST_NUMBER)
    if not re.fullmatch(r"-?\d+L?", digits, re.ASCII):
        raise m.error("a number that is none", DAMAGED)
    if digits in ("00", "01"):
        m.stack.append(digits == "01")
    else:
        m.push_integer(int(digits.removesuffix("L")))


@_opcode(b"F")
def _float_line(m: Machine) -> None:
    try:
        m.stack.append(float(m.line(_MOST_NUMBER)))
    except ValueError:
        raise m.error("a number that is none", DAMAGED) from None


def _long(m: Machine, size: int) -> None:
    if size > 9:  # 64 bits and a sign
        raise m.error("an integer of more than 64 bits", FOREIGN)
    m.push_integer(int.from_bytes(m.take(size), "little", signed=True))


def _natural(m: Machine) -> int:
    digits = m.line(_MOST_NUMBER)
    if not (digits.isascii() and digits.isdecimal()):
        raise m.error("a place of the memo that is no number", DAMAGED)
    return int(digits)
