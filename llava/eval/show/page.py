"""What a user reads of a run: the row of numbers under attack, and the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.eval.numbers import COLUMNS

HEADINGS = dict(zip(COLUMNS, ("Clean", "PA", "SA", "SA+PA", "Avg."), strict=True)) | {"f1": "F1"}
"""what a number is called, where it is not called by its key"""
_WIDTH = 13


def report(summary: Mapping[str, Any], reading: str = "exact", out: Path | None = None) -> str:
    """The numbers of a run in a few lines; `reading` is the one shown with its intervals."""
    lines = [_what(summary)]
    if "readings" in summary:
        lines += ["", *_table(summary["readings"], reading), ""]
    if published := summary.get("published"):
        short = {name: value for name, value in published.items() if "/" not in name}
        lines += [""] * ("readings" not in summary) + number_lines(short).splitlines() + [""]
    if out is not None:
        lines.append(f"{_duration(summary['seconds'])} of computing; {out}")
    return "\n".join(lines)


def number_lines(numbers: Mapping[str, float]) -> str:
    """One line a metric, with two decimals."""
    width = max(map(len, numbers))
    return "\n".join(f"{name:<{width}}  {value:6.2f}" for name, value in numbers.items())


def comparison(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """Differences of two runs (`numbers.compare`) with intervals, and McNemar's p."""
    lines = [f"{'':<7}{'difference':>{_WIDTH}}{'95 %':>18}{'only 1st':>10}{'only 2nd':>10}{'p':>9}"]
    for name, entry in differences.items():
        low, high = entry["interval"]
        interval = f"{low:+.2f} to {high:+.2f}"
        line = f"{HEADINGS[name]:<7}{entry['value']:>+{_WIDTH}.2f}{interval:>18}"
        if "p" in entry:
            line += f"{entry['only_first']:>10}{entry['only_second']:>10}{entry['p']:>9.2g}"
        lines.append(line)
    return "\n".join(lines)


def _what(summary: Mapping[str, Any]) -> str:
    n, counted = summary["n_items"], summary.get("n_counted", summary["n_items"])
    items = f"{n} items" if counted == n else f"{counted} of {n} items"
    if summary.get("limit"):
        items += f" (the first {n} only)"
    told = [f"{summary['benchmark']}: {summary['model']}, {items}"]
    if summary.get("symbols"):
        told.append(f"symbols {summary['symbols'][:5]}...")
        told.append(f"{summary['pa_mode']} orders")
    return ", ".join(told)


def _table(readings: Mapping[str, Any], reading: str) -> list[str]:
    """The row with its intervals, then the same items read otherwise, then all items."""
    block = readings[reading]["counted"]
    names = [name for name in COLUMNS if name in block]
    ends = [block["intervals"][name] for name in names]
    others = {name: blocks["counted"] for name, blocks in readings.items() if name != reading}
    if readings[reading]["total"]["n"] != block["n"]:
        others[f"all {readings[reading]['total']['n']}"] = readings[reading]["total"]
    return [
        _line("", [HEADINGS[name] for name in names]),
        _line(reading, [f"{block[name]:.2f}" for name in names]),
        _line("95 %", [f"{low:.1f}-{high:.1f}" for low, high in ends]),
        *(_line(title, [f"{row[name]:.2f}" for name in names]) for title, row in others.items()),
    ]


def _line(title: str, cells: list[str]) -> str:
    return f"{title:<9}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
