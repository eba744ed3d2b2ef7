"""What a pickle may name, and the function of ours that each name stands for (`case_fast.importing.pickles`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from case_fast.importing.arrays import ArrayProblem, plain_values, shaped
from case_fast.importing.machine import (
    DICT_BYTES,
    FOREIGN,
    LIST_BYTES,
    DataArray,
    DataDict,
    DataList,
    DataSet,
    DataTuple,
    Dtype,
    Machine,
    Name,
)

MOST_NAME = 200  # characters of a name that are shown


def push_name(machine: Machine, module: Any, name: Any) -> None:
    known = NAMES.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
    if known is None:
        shown = ".".join(part[:MOST_NAME] if isinstance(part, str) else "?" for part in (module, name))
        raise machine.error(f"it names {shown!r}, which is no part of the data that were released", FOREIGN)
    machine.stack.append(known)


def call(machine: Machine) -> None:
    """REDUCE: the data that a name stands for with these arguments."""
    arguments, name = machine.stack.pop(), machine.stack.pop()
    if name.__class__ is not Name or arguments.__class__ is not DataTuple:
        raise machine.error("a call of what is no function", FOREIGN)
    made = name.build(machine, arguments) if name.build else None
    if made is None:
        raise machine.error(f"{name} is called with arguments that the released data do not have", FOREIGN)
    machine.stack.append(made)


def instance(machine: Machine) -> None:
    """NEWOBJ: of the vocabulary's class alone."""
    arguments, name = machine.stack.pop(), machine.stack.pop()
    if name.__class__ is not Name or name.name != "Lang" or arguments.__class__ is not DataTuple or arguments:
        raise machine.error(f"an instance of {name if name.__class__ is Name else 'what is no class'}", FOREIGN)
    machine.stack.append(_vocabulary(machine))


def set_state(machine: Machine) -> None:
    """BUILD: the attributes of the vocabulary, the values of an array, the rest of a dtype."""
    state, target = machine.stack.pop(), machine.stack[-1]
    kind = target.__class__
    if kind is DataDict and target.open and state.__class__ is DataDict:
        machine.deepen(target, abs(state.depth))
        target.update(state)
        target.open = False
    elif kind is DataArray and target.open and state.__class__ is DataTuple and len(state) == 5:
        _fill(machine, target, state)
    elif kind is Dtype and state.__class__ is DataTuple and state[2:5] == (None, None, None) and state[1] in ("<", ">", "|"):
        target.order = state[1]
    else:
        raise machine.error("a state that nothing in the released data has", FOREIGN)


def _fill(machine: Machine, target: DataArray, state: DataTuple) -> None:
    """``state``: version, shape, dtype, whether columns come first, and the values: bytes, or of objects a list."""
    _, shape, dtype, fortran, values = state
    if dtype.__class__ is not Dtype:
        raise machine.error("an array without a dtype", FOREIGN)
    if dtype.code[0] != "O":
        _set_values(machine, target, values, dtype, shape, "F" if fortran else "C")
    elif values.__class__ is DataList and not fortran:
        rows = _sound(machine, shaped, list(values), shape)
        machine.deepen(target, abs(values.depth) + len(shape) - 1)
        target += _nested(machine, rows, abs(values.depth))
        target.open = False
    else:
        raise machine.error("an array of objects that the released data do not have", FOREIGN)


def _set_values(machine: Machine, target: DataArray, raw: Any, dtype: Dtype, shape: Any, layout: str) -> None:
    values = _sound(machine, plain_values, raw, dtype.code, dtype.order, shape, layout)
    machine.deepen(target, len(shape) - 1)
    target += _nested(machine, values, len(shape) - 1)
    target.open = False


def _nested(machine: Machine, values: list, depth: int) -> list:
    """The rows of an array of several dimensions become lists of the interpreter's own, ``depth`` levels deep at most."""
    if not values or values[0].__class__ is not list:
        return values
    rows = []
    for row in values:
        made = machine.made(DataList(_nested(machine, row, depth)), LIST_BYTES)
        made.depth = -depth
        rows.append(made)
    return rows


def _sound(machine: Machine, function: Callable[..., list], *arguments: Any) -> list:
    try:
        return function(*arguments)
    except ArrayProblem as problem:
        raise machine.error(str(problem), FOREIGN) from None


def dictionary(machine: Machine) -> DataDict:
    made = machine.made(DataDict(), DICT_BYTES)
    made.open = False
    return made


def _vocabulary(machine: Machine) -> DataDict:
    made = dictionary(machine)
    made.open = True
    return made


def _array(machine: Machine) -> DataArray:
    made = machine.made(DataArray(), LIST_BYTES)
    made.open = True
    return made


# ---- functions of (machine, arguments); None: not with these arguments


def _default_dict(machine: Machine, arguments: DataTuple) -> DataDict | None:
    """A dict whose missing values are lists; what is missing is missing here."""
    return dictionary(machine) if all(item.__class__ is Name and item.name == "list" for item in arguments) else None


def _reconstructed(machine: Machine, arguments: DataTuple) -> DataDict | None:
    """An instance as protocols 0 and 1 write it: (class, its base, the base's state)."""
    names = [item.name if item.__class__ is Name else item for item in arguments]
    return _vocabulary(machine) if names == ["Lang", "object", None] else None


def _empty_array(machine: Machine, arguments: DataTuple) -> DataArray | None:
    """An array that is to be filled: (class, shape, type)."""
    right = len(arguments) == 3 and arguments[0].__class__ is Name and arguments[0].name == "ndarray"
    return _array(machine) if right else None


def _scalar(machine: Machine, arguments: DataTuple) -> Any:
    if len(arguments) != 2 or arguments[0].__class__ is not Dtype:
        return None
    (value,) = _sound(machine, plain_values, arguments[1], arguments[0].code, arguments[0].order, (1,), "C")
    return value


def _from_buffer(machine: Machine, arguments: DataTuple) -> DataArray | None:
    """An array as protocol 5 writes it: (bytes, type, shape, layout)."""
    if len(arguments) != 4 or arguments[1].__class__ is not Dtype or arguments[3] not in ("C", "F"):
        return None
    made = _array(machine)
    _set_values(machine, made, *arguments)
    return made


def _dtype(machine: Machine, arguments: DataTuple) -> Dtype | None:
    code = arguments[0] if arguments else None
    return Dtype(code) if isinstance(code, str) and re.fullmatch(r"[biufUSO]\d{1,5}", code, re.ASCII) else None


def _encoded(machine: Machine, arguments: DataTuple) -> bytes | None:
    """Bytes as protocols 0 to 2 write them: a text whose characters are the bytes."""
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
        return None
    try:
        return arguments[0].encode("latin-1")
    except UnicodeEncodeError:
        return None


def _bytes(machine: Machine, arguments: DataTuple) -> bytes | None:
    whole = arguments or (b"",)
    return whole[0] if len(whole) == 1 and isinstance(whole[0], bytes) else None


def _set(machine: Machine, arguments: DataTuple) -> DataSet | None:
    return machine.unite(arguments[0]) if len(arguments) == 1 and arguments[0].__class__ is DataList else None


def _all_names() -> dict[tuple[str, str], Name]:
    """What Python and numpy write for plain data, and the class of the vocabulary in the releases."""
    found: dict[tuple[str, str], Callable[[Machine, DataTuple], Any] | None] = {
        ("numpy", "ndarray"): None, ("numpy", "dtype"): _dtype, ("_codecs", "encode"): _encoded,
        ("collections", "defaultdict"): _default_dict,
    }
    for core in ("numpy.core", "numpy._core"):
        found |= {(f"{core}.multiarray", "_reconstruct"): _empty_array, (f"{core}.multiarray", "scalar"): _scalar,
                  (f"{core}.numeric", "_frombuffer"): _from_buffer}
    for builtins, copyreg in (("builtins", "copyreg"), ("__builtin__", "copy_reg")):
        found |= {(builtins, "list"): None, (builtins, "object"): None, (builtins, "bytes"): _bytes,
                  (builtins, "bytearray"): _bytes, (builtins, "set"): _set, (builtins, "frozenset"): _set,
                  (copyreg, "_reconstructor"): _reconstructed}
    # CASE and CEM; MoEL, EmpDG and MIME; made by a script
    found |= dict.fromkeys([(module, "Lang") for module in ("src.utils.data.loader", "utils.data_reader", "__main__")])
    return {key: Name(*key, build) for key, build in found.items()}


NAMES = _all_names()
