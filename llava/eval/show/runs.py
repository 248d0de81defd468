"""Finished runs side by side: what `table` and `plot` read of them, and what they are called."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from llava.errors import DataError, UsageError
from llava.eval.question import SYMBOLS
from llava.eval.tasks import Task, find_task, task_names
from llava.eval.tasks.files import read_document
from llava.flags import Parser, normalised

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A finished run: its `summary.json`, and what tells it from others."""

    folder: Path
    model: str
    """what its row is called"""
    path: str
    """of the model, as the run was given it"""
    checkpoint: str
    """fingerprint of the model"""
    summary: Mapping[str, Any]

    @property
    def benchmark(self) -> str:
        return self.summary["benchmark"]

    @cached_property
    def task(self) -> Task:
        """The benchmark; of one whose file is not here no more than its name is known."""
        if self.benchmark in task_names():
            return find_task(self.benchmark)
        task = Task()
        task.name = self.benchmark
        return task

    @property
    def attacked(self) -> bool:
        return "readings" in self.summary

    def block(self, reading: str) -> Mapping[str, Any]:
        """Numbers under attack of the items that count, in percent; see `numbers.summarise`."""
        return self.summary["readings"][reading]["counted"]


def read_runs_and_flags(
    verb: str, about: str, argv: list[str], group: type[T]
) -> tuple[list[Run], T]:
    """The runs and the settings that `argv` names; what has to be known of runs goes to stderr."""
    parser = Parser(prog=f"python -m llava.eval {verb}", description=about)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders")
    parser.add_class_arguments(group, as_group=True)
    flags = parser.parse_args(normalised(argv, (group,))).as_dict()
    folders = flags.pop("runs")
    if not folders:
        raise UsageError(f"{verb}: no runs; name their folders, such as outputs/eval/*/*")
    runs = read_runs(folders)
    for run in runs:
        if run.summary["limit"] is not None:
            print(f"note: {run.folder}: the first {run.summary['n_items']} items", file=sys.stderr)
    return runs, group(**flags)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in `folders`, in this order, each model with a name of its own.

    That is its folder's name; its path where two models have the same; and with it the symbols
    of the attack where runs differ in them. Raises DataError for a folder without a finished run,
    UsageError if two runs are of one name and benchmark.
    """
    runs = [_read(Path(folder)) for folder in folders]
    checkpoints, symbols = defaultdict(set), {run.summary["symbols"] for run in runs} - {""}
    for run in runs:
        checkpoints[run.model].add(run.checkpoint)
    for i, run in enumerate(runs):
        name = run.model if len(checkpoints[run.model]) == 1 else run.path
        if len(symbols) > 1 and run.summary["symbols"]:
            shown = run.summary["symbols"]
            known = {letters: short for short, letters in SYMBOLS.items()}
            name += f" ({known.get(shown, shown[:5])})"
        runs[i] = replace(run, model=name)
    seen: dict[tuple[str, str], Run] = {}
    for run in runs:
        other = seen.setdefault((run.model, run.benchmark), run)
        if other is not run:
            raise UsageError(
                f"{other.folder} and {run.folder} are both {run.benchmark} of {run.model}; give one"
            )
    return runs


def _read(folder: Path) -> Run:
    if not (folder / "manifest.json").is_file():
        raise DataError(f"{folder}: holds no finished run; run it to its end, or leave it out")
    summary, manifest, identity = (
        read_document(folder / f"{name}.json", dict) for name in ("summary", "manifest", "run")
    )
    path, checkpoint = manifest["settings"]["model"], identity["model"]["checkpoint"]
    return Run(folder, summary["model"], path, checkpoint, summary)
