"""`python -m llava.eval`: what answers to a benchmark are worth."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.errors import DataError, run_main

from .answers import Answers, Matched, match, read_answers
from .tasks import find_task, task_names

EXAMPLES = """\
examples:
  python -m llava.eval score --benchmark sqa --data playground/data/eval/scienceqa \\
      --answers playground/data/eval/scienceqa/answers/llava-v1.5-13b.jsonl

docs/Evaluation.md lists the benchmarks, their files and what each number means.
Exit codes: 0 scored, 2 a file or a name is wrong, 65 a record cannot be used or items have no
answer.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="python -m llava.eval",
        description="Say what answers to a benchmark are worth.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = root.add_subparsers(dest="verb", required=True, metavar="{score}")
    about = "compute a benchmark's numbers from an answer file alone"
    score = verbs.add_parser("score", help=about, description=about)
    score.add_argument("--benchmark", required=True, help=f"one of {', '.join(task_names())}")
    score.add_argument("--data", required=True, type=Path, help="its folder, or its question file")
    score.add_argument("--answers", required=True, type=Path, help="JSON lines, as LLaVA writes")
    score.add_argument("--json", action="store_true", help="print one JSON object: name to number")
    score.add_argument(
        "--allow-missing",
        action="store_true",
        help="score although items have no answer: by the rule of the benchmark's own script, "
        "which mostly is that they are wrong (default: exit 65)",
    )
    return root


def main(argv: list[str] | None = None) -> None:
    """Run one verb; UserError is left to `run_main`."""
    arguments = parser().parse_args(argv)
    task = find_task(arguments.benchmark)
    items = task.read(arguments.data)
    answers = read_answers(arguments.answers, task)
    matched = match(answers, items)
    if matched.missing and not arguments.allow_missing:
        raise DataError(
            f"{answers.path}: of {len(items)} items, without an answer: {_some(matched.missing)}; "
            "finish the run, or score them by the benchmark's own rule with --allow-missing"
        )
    for note in _notes(answers, matched, len(items)):
        print(f"note: {answers.path}: {note}", file=sys.stderr)
    numbers = task.score(items, matched.texts)
    print(json.dumps(numbers) if arguments.json else _table(numbers))


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


def _table(numbers: dict[str, float]) -> str:
    """One line a metric, with two decimals."""
    width = max(map(len, numbers))
    return "\n".join(f"{name:<{width}}  {value:6.2f}" for name, value in numbers.items())


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends quietly
    run_main(main)
