"""`python -m llava.eval`: how right a model is, and how right under attack.

run       ask a model a benchmark's questions: every order of the options, letters and other symbols
score     compute a benchmark's published numbers from an answer file alone
attack    compute every number under attack from a run, or compare two runs
table     runs side by side: models by benchmarks
plot      draw what the attacks cost, and which positions are chosen

Each takes --help. docs/Evaluation.md lists the benchmarks, their files, what each number means and
the exit codes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava.errors import DataError
from llava.eval.answers import Answers, Matched, match, read_answers
from llava.eval.tasks import find_task
from llava.flags import read_flags, run_verb
from llava.launch import process

VERBS = ("run", "score", "attack", "table", "plot")


@dataclass(frozen=True)
class ScoreSettings:
    """What is scored."""

    benchmark: str
    """name of the benchmark, such as sqa; docs/Evaluation.md lists them"""
    data: str
    """its folder, or its question file"""
    answers: str
    """JSON lines, as LLaVA writes them"""
    json: bool = False
    """print one JSON object: name to number"""
    allow_missing: bool = False
    """score although items have no answer: by the rule of the benchmark's own script, which mostly
    is that they are wrong (otherwise: exit 65)"""
    submission: str | None = None
    """folder for the answers in the formats of the benchmark's server or own script"""


@dataclass(frozen=True)
class AttackSettings:
    """Which run, and how it is read."""

    run: str
    """run folder, or its attacks.jsonl"""
    reading: Literal["exact", "parse", "logit"] = "exact"
    """exact: the bare symbol; parse: also "B. ..." and "The answer is B."; logit: the likeliest"""
    against: str | None = None
    """another run over the same items: its numbers minus this one's, each with a paired test"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str] | None = None) -> None:
    """Run one verb; UserError is left to `process`."""
    run_verb(argv, __doc__, {verb: globals()[f"run_{verb}"] for verb in VERBS})


def run_run(argv: list[str]) -> None:
    """Ask what is missing and print the numbers; of several processes the first prints."""
    from llava.eval.run import Evaluation, RunSettings, place_in_launch
    from llava.eval.show.page import report

    about = "Ask a model a benchmark's questions, as they are and under attack."
    (settings,) = read_flags("python -m llava.eval run", about, argv, RunSettings)
    rank, world_size = place_in_launch()
    out = Evaluation(settings, rank, world_size).execute()
    if rank == 0:
        print(report(json.loads((out / "summary.json").read_bytes()), out=out))


def run_score(argv: list[str]) -> None:
    """Print the published numbers of an answer file."""
    from llava.eval.records import write_submission
    from llava.eval.show.page import number_lines

    about = "Compute a benchmark's numbers from an answer file alone."
    (settings,) = read_flags("python -m llava.eval score", about, argv, ScoreSettings)
    task = find_task(settings.benchmark)
    items = task.read(Path(settings.data))
    answers = read_answers(settings.answers, task)
    matched = match(answers, items)
    if matched.missing and not settings.allow_missing:
        raise DataError(
            f"{answers.path}: of {len(items)} items, without an answer: {_some(matched.missing)}; "
            "finish the run, or score them by the benchmark's own rule with --allow-missing"
        )
    for note in _notes(answers, matched, len(items)):
        print(f"note: {answers.path}: {note}", file=sys.stderr)
    if settings.submission is not None:  # before scoring: a test split has nothing but this
        write_submission(Path(settings.submission), task.submission(items, matched.texts))
    numbers = task.score(items, matched.texts)
    print(json.dumps(numbers) if settings.json else number_lines(numbers))


def run_attack(argv: list[str]) -> None:
    """Print every number under attack, or how another run differs."""
    from llava.eval.numbers import collect, compare, summarise
    from llava.eval.records import ATTACKS, read_attacks
    from llava.eval.show.page import comparison, report

    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    about = "Compute the numbers under attack: python -m llava.eval attack RUN_OR_FILE"
    (settings,) = read_flags("python -m llava.eval attack", about, argv, AttackSettings)

    def replies(name: str):
        path = Path(name) / ATTACKS if Path(name).is_dir() else Path(name)
        return collect(*read_attacks(path), path)

    first = replies(settings.run)
    if settings.against is None:
        found = summarise(first)
        shown = report(found, settings.reading)
    else:
        found = compare(first, replies(settings.against), settings.reading)
        shown = comparison(found)
    print(json.dumps(found) if settings.json else shown)


def run_table(argv: list[str]) -> None:
    """Print runs side by side."""
    from llava.eval.show.runs import read_runs_and_flags
    from llava.eval.show.table import TableSettings, join, render

    about = "Put runs side by side: models by benchmarks."
    runs, settings = read_runs_and_flags("table", about, argv, TableSettings)
    print(render(join(runs, settings.reading), settings.format))


def run_plot(argv: list[str]) -> None:
    """Draw runs and say where the pictures are."""
    from llava.eval.show.plot import PlotSettings, draw
    from llava.eval.show.runs import read_runs_and_flags

    about = "Draw Clean against attacked accuracy, and the positions that were chosen."
    runs, settings = read_runs_and_flags("plot", about, argv, PlotSettings)
    print(*draw(runs, settings.reading, Path(settings.out)), sep="\n")


def _notes(answers: Answers, matched: Matched, n_items: int) -> list[str]:
    """What a reader of the numbers has to know about the answer file."""
    notes = {
        "records replaced, because the last one of an id counts": answers.repeated,
        "ids that no item has, left out": matched.unknown,
        f"of {n_items} items, without an answer, scored by the benchmark's rule": matched.missing,
    }
    return [f"{what}: {_some(ids)}" for what, ids in notes.items() if ids]


def _some(ids: Sequence[int | str]) -> str:
    return f"{len(ids)} (the first is {ids[0]!r})"


if __name__ == "__main__":
    process(main)
