"""Selection methods, one per file. A file put here is a method: nothing else has to be edited."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil

from llava.errors import UsageError
from selection.methods.base import Method

__all__ = ["Method", "find_methods", "get_method"]


def find_methods() -> dict[str, type[Method]]:
    """Every method of this folder by name, sorted: the subclass of `Method` each file defines."""
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Method) and cls.__module__ == module.__name__ and cls is not Method:
                found[cls.name] = cls
    return dict(sorted(found.items()))


def get_method(name: str) -> type[Method]:
    """The method called `name`; raises UsageError with the nearest name."""
    methods = find_methods()
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"method {name!r} is unknown; {hint}the methods are {', '.join(methods)}")
    return methods[name]
