"""MMMU: college exams of thirty subjects, up to seven pictures a question.

    <Subject>/validation-*.parquet    a folder a subject, as on Hugging Face; or one file for all

Of the 900 questions of the validation split the 847 with options are read (two to nine each); the
53 open ones have no options to attack. Text and options refer to pictures as `<image 1>`,
`<image 2>`, ...: these marks stay in the text, and pictures are in the order of their numbers.

Differs from the owners' prompt: options are lines "A. ...", not "(A) ...".

Source: Yue et al., "MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning
Benchmark for Expert AGI".
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from llava.errors import DataError
from llava.eval.tasks.base import Id, Item, check_unique
from llava.eval.tasks.files import Picture, read_questions
from llava.eval.tasks.lettered import Lettered, gold_of, lettered

CHOICE = "multiple-choice"


class Row(msgspec.Struct):
    """One question."""

    id: str
    question: str
    options: str
    """a list of texts as Python writes it"""
    answer: str
    question_type: str
    image_1: Picture | None = None
    image_2: Picture | None = None
    image_3: Picture | None = None
    image_4: Picture | None = None
    image_5: Picture | None = None
    image_6: Picture | None = None
    image_7: Picture | None = None

    @property
    def pictures(self) -> tuple[bytes, ...]:
        """Encoded pictures, by number."""
        cells = (getattr(self, f"image_{number}") for number in range(1, 8))
        return tuple(cell.content for cell in cells if cell is not None and cell.content)


class Mmmu(Lettered):
    """Metrics: `accuracy` and `parse_failures`, over the questions with options."""

    name = "mmmu"
    title = "MMMU"
    place = 60

    def read(self, data: Path) -> list[Item]:
        """Items by subject, in their files' order; the subject is the group."""
        rows = read_questions(data, Row, "validation", below=("*",))
        items = [_item(row, where) for where, row in rows if row.question_type == CHOICE]
        check_unique(items, str(data))
        return items

    def submission(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, bytes]:
        """The owners' file for evaluation without parsing: letter by id."""
        said = {item.id: texts.get(item.id, "") for item in items}
        return {"total_val_output.json": json.dumps(said, ensure_ascii=False, indent=1).encode()}


def _item(row: Row, where: str) -> Item:
    question = lettered(row.question, _options(row.options, where), where)
    return Item(
        id=row.id,
        prompt=question.render(),
        question=question,
        gold=gold_of(question, row.answer, where),
        images=row.pictures,
        group="_".join(row.id.split("_")[1:-1]),
    )


def _options(text: str, where: str) -> list[str]:
    """The texts in a list as Python writes it."""
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"{where}: options {text[:60]!r} are no list; download it again") from error
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{where}: options {text[:60]!r} are no list of texts; download it again")
    return options
