"""What identifies the code of a method from elsewhere: other code is another run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

_APART = {"__module__", "__doc__", "__firstlineno__", "__static_attributes__"}


def file_of(cls: type) -> Path | None:
    """The file that a class can be had from by its name; None for one of a session or a script."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or cls.__module__ == "__main__" or "." in cls.__qualname__:
        return None
    return Path(file).resolve()


def file_digest(cls: type) -> str | None:
    """sha256 of that file as it is now, or as it was when `selection.methods` has run it."""
    if read := getattr(sys.modules.get(cls.__module__), "__sha256__", None):
        return read
    file = file_of(cls)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None


def session_digest(cls: type) -> str:
    """sha256 of what a class of a notebook or a script does now.

    Covers its functions and constants and, of its module, those that they name: a cell that
    changes something else changes no run. Comments and line numbers do not count.
    """
    digest, waiting = hashlib.sha256(), [cls]
    seen: dict[int, Any] = {}  # kept, or another thing could get the number of one that is gone
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, str | bytes | int | float | None):
            digest.update(repr(thing).encode())
        elif id(thing) not in seen:
            seen[id(thing)] = thing
            waiting += _parts(thing, cls.__module__)
    return digest.hexdigest()


def _parts(thing: Any, module: str) -> Iterator[Any]:
    """What else decides what `thing` does, in an order that is the same in every process."""
    if isinstance(thing, property | classmethod | staticmethod):
        yield thing.fget if isinstance(thing, property) else thing.__func__
    elif isinstance(thing, type) and thing.__module__ == module:
        yield from thing.__bases__
        yield from (pair for pair in vars(thing).items() if pair[0] not in _APART)
    elif isinstance(thing, FunctionType) and thing.__module__ == module:
        yield from (thing.__code__, thing.__defaults__, thing.__kwdefaults__)
        yield from (cell.cell_contents for cell in thing.__closure__ or ())
        yield from (thing.__globals__.get(name) for name in _names(thing.__code__))
    elif isinstance(thing, CodeType):
        yield from (thing.co_code, thing.co_names, thing.co_consts)
    elif isinstance(thing, tuple | list):
        yield from thing
    elif isinstance(thing, dict):
        yield from thing.items()
    elif isinstance(thing, set | frozenset):
        yield from sorted(map(repr, thing))


def _names(code: CodeType) -> list[str]:
    """Names that a function and the functions inside it look up."""
    inside = [const for const in code.co_consts if isinstance(const, CodeType)]
    return [*code.co_names, *(name for other in inside for name in _names(other))]
