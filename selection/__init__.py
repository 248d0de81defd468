"""Pick the visual-instruction samples worth training on: the public names. See docs/Python.md.

Pool       candidate samples: Pool.open("pool.json", images="data")
select     choose a subset with a method, given scores or a method object of your own
Scores     scores of your own, for the budget rules and the run folder
Run        a finished run: Run.open("outputs/ards30")
compare    what the subsets of some runs share
Method     base class of methods, with Context, Request, SecondStage and Scored
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selection.api import Scores, compare, select
    from selection.methods.base import Context, Method, Request, Scored, SecondStage
    from selection.output.folder import Run
    from selection.pool.pool import Pool

_HOMES = {
    **dict.fromkeys(("Scores", "compare", "select"), "selection.api"),
    **dict.fromkeys(
        ("Context", "Method", "Request", "Scored", "SecondStage"), "selection.methods.base"
    ),
    "Pool": "selection.pool.pool",
    "Run": "selection.output.folder",
}
__all__ = [
    "Context",
    "Method",
    "Pool",
    "Request",
    "Run",
    "Scored",
    "Scores",
    "SecondStage",
    "compare",
    "select",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: the command line needs few of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'selection' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
