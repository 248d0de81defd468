"""Selection methods: one a file here, found by import, and those that other people bring.

A file put into this folder is a method; so is a folder whose module of the same name defines one
(`coido/coido.py`). From outside come classes of packages that register the entry point group
`robust_selection.methods`, and classes named by their file: `path/to/file.py:Class`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import pkgutil
import sys
import traceback
from importlib.abc import SourceLoader
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from llava.errors import UsageError
from selection.methods.base import Method

__all__ = ["Method", "find_methods", "get_method"]

GROUP = "robust_selection.methods"


def find_methods() -> dict[str, type[Method]]:
    """Every method of this folder and of installed packages by name, sorted.

    Raises UsageError for a package whose entry point cannot be loaded or has a name that is taken.
    """
    methods = {name: _load(home) for name, home in sorted(_homes().items())}
    return {name: method for name, method in methods.items() if method is not None}


def get_method(name: str) -> type[Method]:
    """The method called `name`, or the class `path/to/file.py:Class`.

    Raises UsageError with the nearest name, or with what is wrong with the file.
    """
    if ":" in name:
        return _from_file(name)
    if name.endswith(".py"):
        raise UsageError(f"--method {name}: name the class in it too: {name}:Class")
    home = _homes().get(name)
    method = None if home is None else _load(home)
    if method is None:
        methods = find_methods()
        near = difflib.get_close_matches(name, methods, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"method {name!r} is unknown; {hint}the methods are {', '.join(methods)}")
    return method


def _homes() -> dict[str, str | EntryPoint]:
    """The module here or the entry point of every name; nothing is imported."""
    homes: dict[str, str | EntryPoint] = {
        info.name: f"{__name__}.{info.name}" + (f".{info.name}" if info.ispkg else "")
        for info in pkgutil.iter_modules(__path__)
    }
    for entry in entry_points(group=GROUP):
        if entry.name in homes:
            raise UsageError(f"{_told(entry)}: the name is taken; uninstall one of the two")
        homes[entry.name] = entry
    return homes


def _load(home: str | EntryPoint) -> type[Method] | None:
    """The method that lives there; None for a module here that holds none."""
    if isinstance(home, str):
        return next(iter(_methods_in(importlib.import_module(home))), None)
    try:
        method = home.load()
    except (Exception, SystemExit) as error:  # the package's own code: whatever it raises
        raise UsageError(f"{_told(home)}: {_reason(error)}") from error
    if not _is_method(method):
        raise UsageError(f"{_told(home)}: {home.value} is no subclass of selection.Method")
    method.name = method.origin = home.name
    return method


def _told(entry: EntryPoint) -> str:
    return f"entry point {entry.name} of {entry.dist.name if entry.dist else '?'}"


def _from_file(spec: str) -> type[Method]:
    """The class that `spec`, `path/to/file.py:Class`, names; its file is run, as the user asks."""
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file() or path.suffix != ".py":
        raise UsageError(f"--method {spec}: no Python file {file}; give path/to/file.py:Class")
    module = _run_file(path, spec)
    method = getattr(module, name, None)
    if not _is_method(method):
        others = ", ".join(other.__name__ for other in _methods_in(module)) or "none"
        raise UsageError(
            f"--method {spec}: {path.name} has no method {name!r} (a subclass of "
            f"selection.Method); it has {others}"
        )
    if isinstance(home := _homes().get(method.name), str) and _load(home) is not None:
        raise UsageError(
            f"--method {spec}: the name {method.name!r} is taken; call the class otherwise, or "
            "set its `name`"
        )
    return method


def _run_file(path: Path, spec: str) -> ModuleType:
    """The module of a file; the same one for the same contents, in every process of a run."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--method {spec}: {error.strerror}") from None
    name = f"robust_selection_method_{hashlib.sha256(bytes(path) + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = spec_from_loader(name, _Source(path, source))
    module = sys.modules[name] = module_from_spec(module_spec)
    module.__sha256__ = hashlib.sha256(source).hexdigest()
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file's own code: whatever it raises
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {f.lineno}" for f in frames if f.filename == str(path)]
        raise UsageError(f"--method {spec}{''.join(lines[-1:])}: {_reason(error)}") from error
    return module


class _Source(SourceLoader):
    """Runs the bytes that were hashed: neither newer ones nor Python's cache of older ones."""

    def __init__(self, path: Path, source: bytes) -> None:
        self.path, self.source = path, source

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.source


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _methods_in(module: ModuleType) -> list[type[Method]]:
    """The methods that a module itself defines."""
    classes = (cls for _, cls in inspect.getmembers(module, inspect.isclass))
    return [cls for cls in classes if _is_method(cls) and cls.__module__ == module.__name__]


def _is_method(cls: object) -> bool:
    return inspect.isclass(cls) and issubclass(cls, Method) and cls is not Method
