"""`python -m llava.eval table`: runs side by side, as the papers print them.

A row is a model, a group of columns a benchmark: Clean, PA, SA, SA+PA and their mean for those that
are attacked, the published numbers for the others. The best of a column is bold.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llava.eval.numbers import COLUMNS
from llava.eval.show.page import HEADINGS
from llava.eval.show.runs import Run

WIDEST = 20
"""columns of numbers in one table: four benchmarks under attack"""
_LATEX = str.maketrans({c: rf"\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}"})


class Group(NamedTuple):
    """The columns of one benchmark."""

    benchmark: str
    title: str
    columns: dict[str, str]
    """key of a number: its heading"""


@dataclass(frozen=True)
class Table:
    """Models by benchmarks."""

    groups: list[Group]
    rows: dict[str, dict[tuple[str, str], float]]
    """numbers of a model by benchmark and key"""

    def blocks(self) -> Iterator[Table]:
        """Tables of the same rows, none wider than WIDEST unless one benchmark is."""
        groups: list[Group] = []
        for group in self.groups:
            if groups and sum(len(g.columns) for g in [*groups, group]) > WIDEST:
                yield Table(groups, self.rows)
                groups = []
            groups.append(group)
        yield Table(groups, self.rows)

    def keys(self) -> list[tuple[str, str]]:
        """Benchmark and key of each column."""
        return [(group.benchmark, key) for group in self.groups for key in group.columns]

    def cells(self, missing: str, bold: str) -> dict[str, list[str]]:
        """Rows of text with two decimals; `bold` is the format of a column's best, if one is."""
        columns = [self._column(key, missing, bold) for key in self.keys()]
        return {name: list(cells) for name, *cells in zip(self.rows, *columns, strict=True)}

    def _column(self, key: tuple[str, str], missing: str, bold: str) -> list[str]:
        texts = [f"{row[key]:.2f}" if key in row else missing for row in self.rows.values()]
        known = [text for text in texts if text != missing]
        best = max(known, key=float) if len(set(known)) > 1 else None
        return [bold.format(text) if text == best else text for text in texts]


def join(runs: Sequence[Run], reading: str) -> Table:
    """The table of `runs`, models in the order in which they first appear."""
    groups: dict[str, Group] = {}
    rows: dict[str, dict[tuple[str, str], float]] = {run.model: {} for run in runs}
    for run in sorted(runs, key=lambda run: run.task.place):
        if run.attacked:
            numbers, keys = run.block(reading), COLUMNS
        else:
            numbers = keys = run.task.headline(run.summary["published"])
        headings = {key: HEADINGS.get(key, key) for key in keys}
        groups[run.benchmark] = Group(run.benchmark, run.task.title, headings)
        rows[run.model] |= {(run.benchmark, key): numbers[key] for key in keys if key in numbers}
    return Table(list(groups.values()), rows)


def render(table: Table, form: str) -> str:
    """The table as text: "markdown", "csv" or "latex"."""
    if form == "csv":
        return _csv(table)
    return "\n\n".join(map({"markdown": _markdown, "latex": _latex}[form], table.blocks()))


def _markdown(table: Table) -> str:
    headings = ["model"]
    for group in table.groups:
        first, *others = group.columns.values()
        headings += [f"{group.title} {first}", *others]
    lines = [headings, *([name, *cells] for name, cells in table.cells("–", "**{}**").items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        f"| {line[0]:<{widths[0]}} | {' | '.join(map(str.rjust, line[1:], widths[1:]))} |"
        for line in [headings, rule, *lines[1:]]
    )


def _csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = table.keys()
    writer.writerow(["model", *("/".join(key) for key in keys)])
    writer.writerows([name, *(row.get(key) for key in keys)] for name, row in table.rows.items())
    return out.getvalue().rstrip("\n")


def _latex(table: Table) -> str:
    titles, rules, headings, column = [""], [], ["Model"], 2
    for group in table.groups:
        n = len(group.columns)
        titles.append(rf"\multicolumn{{{n}}}{{c}}{{{group.title.translate(_LATEX)}}}")
        rules.append(rf"\cmidrule(lr){{{column}-{column + n - 1}}}")
        headings += [heading.translate(_LATEX) for heading in group.columns.values()]
        column += n
    cells = table.cells("--", r"\textbf{{{}}}")
    rows = [[name.translate(_LATEX), *texts] for name, texts in cells.items()]
    lines = [rf"\begin{{tabular}}{{l{'r' * len(table.keys())}}}", r"\toprule"]
    lines += [_latex_row(titles), " ".join(rules), _latex_row(headings), r"\midrule"]
    return "\n".join([*lines, *map(_latex_row, rows), r"\bottomrule", r"\end{tabular}"])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
