"""ARC-Easy: school questions on nature, text alone, three to five options.

    ARC-Easy-Test.jsonl             the owners' file, {"id", "question": {"stem", "choices":
                                    [{"text", "label"}]}, "answerKey"}
    ARC-Easy/test-*.parquet         or the same on Hugging Face, choices as two lists

All 2,376 questions of the test split are read and lettered by position. The published tables count
2,277 of them: they leave out the 97 whose options are numbered in the file, and two that have a
bare letter for an option, which the authors' attack by regular expressions damages. `accuracy`
is over these, `total` over all.

Sources: Clark et al., "Think you have Solved Question Answering? Try ARC"; the denominator is that
of the tables of ARDS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from llava.errors import DataError
from llava.eval.question import LETTERS
from llava.eval.tasks.base import Id, Item, check_unique
from llava.eval.tasks.files import read_questions
from llava.eval.tasks.lettered import Lettered, lettered

QUESTIONS = "ARC-Easy-Test.jsonl"
ATTACKED = LETTERS[:5]
"""the letters that the authors' attack looks for"""


class Choice(msgspec.Struct):
    """An option of the owners' file."""

    text: str
    label: str


class Stem(msgspec.Struct):
    """The question of the owners' file."""

    stem: str
    choices: list[Choice]


class Choices(msgspec.Struct):
    """The options of the parquet file."""

    text: list[str]
    label: list[str]


class Row(msgspec.Struct):
    """One question, of either file."""

    id: str
    question: str | Stem
    answerKey: str
    choices: Choices | None = None


class ArcEasy(Lettered):
    """Metrics: `accuracy` and `parse_failures` of the items that are counted, `total` of all."""

    name = "arc_e"
    title = "ARC-e"
    place = 70

    def read(self, data: Path) -> list[Item]:
        """Items in the file's order; `group` is "letters" or "numbers", as the file labels them."""
        places = ("ARC-Easy", "ARC-V1-Feb2018-2/ARC-Easy")
        items = [_item(row, at) for at, row in read_questions(data, Row, "test", QUESTIONS, places)]
        check_unique(items, str(data))
        return items

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class."""
        total = super().score(items, texts)["accuracy"]
        return super().score([i for i in items if self.counted(i)], texts) | {"total": total}

    def counted(self, item: Item) -> bool:
        """Lettered in the file, and no option is a bare letter."""
        return item.group == "letters" and not set(item.question.options) & set(ATTACKED)


def _item(row: Row, where: str) -> Item:
    stem, texts, labels = _parts(row, where)
    question = lettered(stem, texts, where)
    if row.answerKey not in labels:
        raise DataError(
            f"{where}: the answer {row.answerKey[:40]!r} is none of its {len(labels)} options; "
            f"give one of {', '.join(labels)}"
        )
    return Item(
        id=row.id,
        prompt=question.render(),
        question=question,
        gold=labels.index(row.answerKey),
        group="letters" if LETTERS.startswith("".join(labels)) else "numbers",
    )


def _parts(row: Row, where: str) -> tuple[str, list[str], list[str]]:
    """Stem, option texts and their labels."""
    if isinstance(row.question, Stem):
        choices = row.question.choices
        return row.question.stem, [c.text for c in choices], [c.label for c in choices]
    if row.choices is None or len(row.choices.text) != len(row.choices.label):
        raise DataError(f"{where}: options and labels are not as many; download the file again")
    return row.question, row.choices.text, row.choices.label
