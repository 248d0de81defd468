"""Lettered questions: what the multiple-choice benchmarks have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava.errors import DataError
from llava.eval.question import INSTRUCTIONS, LETTERS, Question
from llava.eval.tasks.base import Id, Item, Task, percent

LETTER = INSTRUCTIONS[0]
"""LLaVA's instruction to answer with a letter, a line of its own after the options"""


class Lettered(Task):
    """Base of the benchmarks that have no script of LLaVA's: an answer must be the bare letter.

    Metrics: `accuracy`, and `parse_failures`, the share of items whose answer is missing or no
    letter of theirs. Options of the same text are right together.
    """

    attacked = True

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. An item without an answer is wrong, and a parse failure."""
        chosen = [item.question.option(texts.get(item.id, "")) for item in items]
        right = [
            option is not None and item.question.options[option] == right_text(item)
            for item, option in zip(items, chosen, strict=True)
        ]
        return {
            "accuracy": percent(sum(right), len(items)),
            "parse_failures": percent(chosen.count(None), len(items)),
        }


def lettered(stem: str, options: Sequence[str], where: str) -> Question:
    """A question with LLaVA's instruction; DataError unless there is a letter for each option."""
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(
            f"{where}: {len(options)} options, but a lettered question has 2 to {len(LETTERS)}; "
            "correct or remove it"
        )
    return Question(stem, tuple(options), LETTER)


def gold_of(question: Question, letter: str, where: str) -> int:
    """Number of the option that the annotated `letter` names; DataError if there is none."""
    gold = LETTERS.find(letter) if len(letter) == 1 else -1
    if not 0 <= gold < len(question.options):
        raise DataError(
            f"{where}: the answer {letter[:40]!r} is none of its {len(question.options)} options; "
            f"give one of {', '.join(LETTERS[: len(question.options)])}"
        )
    return gold


def right_text(item: Item) -> str:
    """The right option's text."""
    return item.question.options[item.gold]
