"""Modules that are imported when something of them is asked for: torch alone takes seconds."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """Stands for module `name`, as in `torch = Lazy("torch")`, without importing it.

    For modules that command lines read before it is known whether anything is computed (methods,
    signals, vectors): `python -m selection list`, `--help` and a wrong flag answer at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # parsers of flags ask for these of every global name
            raise AttributeError(attribute)
        return getattr(import_module(self._name), attribute)
