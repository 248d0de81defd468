"""One file a benchmark: how its owners' files are read, and how its published number is made.

A benchmark is added by adding a file here that holds a subclass of `Task`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from llava.errors import UsageError
from llava.eval.tasks.base import EVAL, Item, Task

__all__ = ["EVAL", "Item", "Task", "find_task", "task_names"]


def task_names() -> list[str]:
    """Names of all benchmarks, sorted."""
    return sorted({cls.name for cls in _classes()})


def find_task(name: str) -> Task:
    """The benchmark `name`; UsageError, with the nearest name and all there are, for another."""
    for cls in _classes():
        if cls.name == name:
            return cls()
    names = task_names()
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"--benchmark {name}: {hint}there are {', '.join(names)}")


def _classes() -> list[type[Task]]:
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
        if module.name != "base"
    ]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
        and hasattr(value, "name")
    ]
