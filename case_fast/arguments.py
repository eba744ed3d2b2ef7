"""Types of arguments and settings: what an annotation takes, numbers of numpy as Python's own, and the sentence for what does not
fit."""

from __future__ import annotations

import functools
import re
import reprlib
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from case_fast.errors import ConfigError, SettingTypeError


def plain(value: Any) -> Any:
    """A scalar of numpy as a number, string or truth value of Python; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def whole(name: str, value: Any, what: str = "a whole number") -> int:
    """A whole number, of Python or numpy, as an int.

    Raises:
        TypeError: it is none; True and False are none either.
    """
    if type(value) is int:  # before every call of an op: the short way
        return value
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {what}, not {told(value)}")
    return value


def number(name: str, value: Any) -> float:
    """A number, of Python or numpy, as one of Python.

    Raises:
        TypeError: it is none. A tensor is none either: what it was computed from would get no gradient.
    """
    if type(value) is float:
        return value
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {told(value)}")
    return value


def truth(name: str, value: Any) -> bool:
    """True or False, of Python or numpy, as one of Python.

    Raises:
        TypeError: it is neither.
    """
    if type(value) is bool:
        return value
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {told(value)}")
    return value


def told(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            return f"a tensor that is not dense ({'nested' if value.is_nested else value.layout})"
        return "a tensor"
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{reprlib.repr(value)} ({kind})" if isinstance(value, (bool, int, float, complex, str, bytes)) else kind


def misfit(name: str, value: Any, hint: Any) -> str:
    """What is wrong with a value for an annotation, naming it; empty where it fits. Looks into sequences and dataclasses."""
    inside = []
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if _is(value, option):
            inside.append(next(filter(None, (misfit(*part) for part in _parts(name, value, option))), ""))
    if not inside:
        return f"{name} must be {_written(hint)}, not {told(value)}"
    return "" if "" in inside else max(inside, key=lambda said: (said.index(" "), said))  # of what it was most likely meant to be


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type without alternatives, whatever it holds. A setting of `Literal` checks its value itself."""
    origin = get_origin(hint) or hint
    if origin is Any:
        return True
    if origin is Literal:
        return isinstance(value, tuple({type(choice) for choice in get_args(hint)}))
    if origin is None:
        return value is None
    value = plain(value)
    if origin is Tensor:
        return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, (tuple, list))  # JSON knows no tuples
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return isinstance(value, origin)


def _parts(name: str, value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a value holds, with name and annotation."""
    of = get_args(hint)
    if get_origin(hint) in (Sequence, tuple) and of:
        of = of if len(of) == len(value) and get_origin(hint) is tuple else of[:1] * len(value)
        yield from ((f"{name}[{place}]", *pair) for place, pair in enumerate(zip(value, of, strict=True)))
    elif is_dataclass(value):
        hints = _hints(type(value))
        yield from ((f"{name}.{item.name}", getattr(value, item.name), hints[item.name]) for item in fields(value))


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", Tensor: "a tensor",
          types.NoneType: "None"}


def _written(hint: Any) -> str:
    """An annotation in words, where there are any."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_written, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    plain_type = isinstance(hint, type) and not get_args(hint)
    return _WORDS.get(hint) or re.sub(r"\b\w+\.", "", hint.__name__ if plain_type else str(hint))


@functools.cache
def _hints(of: Callable) -> dict[str, Any]:
    return get_type_hints(of)


def misfit_of_call(function: Callable, arguments: tuple, named: dict[str, Any]) -> str:
    """`misfit` of the first argument of a call that has one; empty where all fit, or where the call has other arguments than the
    function, of which Python says so."""
    names, hints = function.__code__.co_varnames[: function.__code__.co_argcount], _hints(function)
    given = dict(zip(names, arguments, strict=False)) | named
    return next(filter(None, (misfit(name, value, hints[name]) for name, value in given.items() if name in hints)), "")


def settle(settings: Any) -> None:
    """For a frozen dataclass, in its ``__post_init__``: numbers of numpy become Python's own, which JSON takes.

    Raises:
        SettingTypeError: a setting is of another type than its annotation.
    """
    hints = _hints(type(settings))
    for item in fields(settings):
        value = getattr(settings, item.name)
        if said := misfit(item.name, value, hints[item.name]):
            raise SettingTypeError(said)
        if plain(value) is not value:
            object.__setattr__(settings, item.name, plain(value))


def check_choices(settings: Any) -> None:
    """For a dataclass whose settings of `Literal` can have what that lists and nothing else.

    Raises:
        ConfigError: one has another value.
    """
    for name, hint in _hints(type(settings)).items():
        known, value = get_args(hint), getattr(settings, name)
        if get_origin(hint) is Literal and value not in known:
            raise ConfigError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not {value!r}")


def at_least_1(settings: Any, *names: str) -> None:
    """Raises `ConfigError` at the first of these settings that is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(settings, name)}")
