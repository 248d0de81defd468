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
from pathlib import Path

from llava import ranks
from llava.errors import DataError
from llava.eval.answers import Answers, Matched, match, read_answers
from llava.eval.settings import (
    AttackSettings,
    PlotSettings,
    RunSettings,
    ScoreSettings,
    TableSettings,
)
from llava.eval.tasks import EVAL, find_task
from llava.flags import read_flags, run_verb
from llava.launch import process

VERBS = ("run", "score", "attack", "table", "plot")


def main(argv: list[str] | None = None) -> None:
    """Run one verb; UserError is left to `process`."""
    run_verb(argv, __doc__, {verb: globals()[f"run_{verb}"] for verb in VERBS})


def run_run(argv: list[str]) -> None:
    """Ask what is missing and print the numbers; of several processes the first prints."""
    from llava.eval.run import Evaluation
    from llava.eval.show.page import report

    about = "Ask a model a benchmark's questions, as they are and under attack."
    (settings,) = read_flags("python -m llava.eval run", about, argv, RunSettings)
    out = Evaluation(settings, ranks.rank(), ranks.world_size()).execute()
    if ranks.rank() == 0:
        print(report(json.loads((out / "summary.json").read_bytes()), out=out))


def run_score(argv: list[str]) -> None:
    """Print the published numbers of an answer file."""
    from llava.eval.records import write_submission
    from llava.eval.show.page import number_lines

    about = "Compute a benchmark's numbers from an answer file alone."
    (settings,) = read_flags("python -m llava.eval score", about, argv, ScoreSettings)
    task = find_task(settings.benchmark)
    items = task.read(Path(settings.data or EVAL / task.folder))
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
        numbers = summarise(first)
        page = report(numbers, settings.reading)
    else:
        numbers = compare(first, replies(settings.against), settings.reading)
        page = comparison(numbers)
    print(json.dumps(numbers) if settings.json else page)


def run_table(argv: list[str]) -> None:
    """Print runs side by side."""
    from llava.eval.show.runs import read_runs_and_flags
    from llava.eval.show.table import join, render

    about = "Put runs side by side: models by benchmarks."
    runs, settings = read_runs_and_flags("table", about, argv, TableSettings)
    print(render(join(runs, settings.reading), settings.format))


def run_plot(argv: list[str]) -> None:
    """Draw runs and say where the pictures are."""
    from llava.eval.show.runs import read_runs_and_flags

    about = "Draw Clean against attacked accuracy, and the positions that were chosen."
    runs, settings = read_runs_and_flags("plot", about, argv, PlotSettings)

    from llava.eval.show.plot import draw  # with matplotlib: half a second

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
