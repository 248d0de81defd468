"""BoolQ: yes-or-no questions about a passage, text alone, asked with two options.

    dev.jsonl                       the owners' file, {"question", "passage", "answer": true, ...}
    data/validation-*.parquet       or the same on Hugging Face

3,270 questions (validation). They have no ids: an item's is its row, from 0. The question, with a
question mark, stands on the line after its passage; options are "yes" and "no", in this order.
How the published tables word them is not known.

Source: Clark et al., "BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions".
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from llava.eval.tasks.base import Item
from llava.eval.tasks.files import read_questions
from llava.eval.tasks.lettered import Lettered, lettered

QUESTIONS = "dev.jsonl"
OPTIONS = ("yes", "no")


class Row(msgspec.Struct):
    """One question."""

    question: str
    passage: str
    answer: bool


class BoolQ(Lettered):
    """Metrics: `accuracy` and `parse_failures`."""

    name = "boolq"
    title = "BoolQ"
    place = 80

    def read(self, data: Path) -> list[Item]:
        """Items in the file's order."""
        rows = read_questions(data, Row, "validation", QUESTIONS)
        return [_item(number, row, where) for number, (where, row) in enumerate(rows)]


def _item(number: int, row: Row, where: str) -> Item:
    question = lettered(f"{row.passage}\n{row.question.rstrip('?')}?", OPTIONS, where)
    return Item(number, question.render(), question, gold=0 if row.answer else 1)
