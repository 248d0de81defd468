"""Selection methods: one a file here, found by import, and those that other people bring.

A file put into this folder is a method; so is a folder whose module of the same name defines one
(`coido/coido.py`). From outside come classes of packages that register the entry point group
`robust_selection.methods`, and classes named by their file: `path/to/file.py:Class`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path

from llava.errors import UsageError
from selection.methods.base import Method

__all__ = ["Method", "find_methods", "get_method"]

GROUP = "robust_selection.methods"


def find_methods() -> dict[str, type[Method]]:
    """Every method of this folder and of installed packages by name, sorted.

    Raises UsageError for a package whose entry point cannot be loaded or has a name that is taken.
    """
    methods = {}
    for info in pkgutil.iter_modules(__path__):
        module = f"{__name__}.{info.name}" + (f".{info.name}" if info.ispkg else "")
        for cls in _methods_in(importlib.import_module(module)):
            methods[cls.name] = cls
    for entry in importlib.metadata.entry_points(group=GROUP):
        where = f"entry point {entry.name} of {entry.dist.name if entry.dist else '?'}"
        try:
            cls = entry.load()
        except Exception as error:  # the package's own code: whatever it raises
            raise UsageError(f"{where}: {type(error).__name__}: {error}") from error
        if not _is_method(cls):
            raise UsageError(f"{where}: {entry.value} is no subclass of selection.methods.Method")
        if entry.name in methods:
            raise UsageError(f"{where}: the name {entry.name} is taken; uninstall one of the two")
        cls.name = cls.origin = entry.name
        methods[entry.name] = cls
    return dict(sorted(methods.items()))


def get_method(name: str) -> type[Method]:
    """The method called `name`, or the class `path/to/file.py:Class`.

    Raises UsageError with the nearest name, or with what is wrong with the file.
    """
    if ":" in name:
        return _from_file(name)
    methods = find_methods()
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"method {name!r} is unknown; {hint}the methods are {', '.join(methods)}")
    return methods[name]


def _from_file(spec: str) -> type[Method]:
    """The class that `spec`, `path/to/file.py:Class`, names; its file is run, as the user asks."""
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"--method {spec}: no such file {file}; give path/to/file.py:Class")
    module = _run_file(path, spec)
    cls = getattr(module, name, None)
    if not _is_method(cls):
        there = [other.__name__ for other in _methods_in(module)] or ["none"]
        raise UsageError(
            f"--method {spec}: {path.name} has no method {name!r} (a subclass of "
            f"selection.methods.Method); it has {', '.join(there)}"
        )
    cls.origin = f"{path}:{name}"
    return cls


def _run_file(path: Path, spec: str):
    """The module of a file; the same one for the same file within a process."""
    name = f"robust_selection_method_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None:
        raise UsageError(f"--method {spec}: {path.name} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # the file's own code: whatever it raises
        del sys.modules[name]
        raise UsageError(f"--method {spec}: {type(error).__name__}: {error}") from error
    return module


def _methods_in(module) -> list[type[Method]]:
    """The methods that a module itself defines."""
    classes = (cls for _, cls in inspect.getmembers(module, inspect.isclass))
    return [cls for cls in classes if _is_method(cls) and cls.__module__ == module.__name__]


def _is_method(cls: object) -> bool:
    return inspect.isclass(cls) and issubclass(cls, Method) and cls is not Method
