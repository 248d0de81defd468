"""Tables for the terminal: names at the left, numbers at the right, never cut to its width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print `rows` of as many cells as there are `headings`, the first of them a name."""
    table = Table(
        title=title or None,
        title_justify="left",
        box=None,
        pad_edge=False,
        show_header=any(headings),
    )
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    unbounded = console.options.update(width=100_000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)
