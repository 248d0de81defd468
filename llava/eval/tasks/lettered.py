"""Lettered questions: what the multiple-choice benchmarks have in common."""

from __future__ import annotations

from llava.errors import DataError
from llava.eval.attacks import INSTRUCTIONS, LETTERS, Question

LETTER = INSTRUCTIONS[0]
"""LLaVA's instruction to answer with a letter, a line of its own after the options"""


def gold_of(question: Question, letter: str, where: str) -> int:
    """Number of the option that the annotated `letter` names; DataError if there is none."""
    gold = LETTERS.find(letter) if len(letter) == 1 else -1
    if not 0 <= gold < len(question.options):
        raise DataError(
            f"{where}: the answer {letter[:40]!r} is none of its {len(question.options)} options; "
            f"give one of {', '.join(LETTERS[: len(question.options)])}"
        )
    return gold
