"""A-OKVQA: questions about COCO pictures that need knowledge of the world; four options.

    aokvqa_v1p0_val.json             the owners' file, pictures in val2017/<image_id, 12 digits>.jpg
    data/validation-*.parquet        or the same on Hugging Face, with the pictures inside

1,145 questions (validation). The question is asked as it stands, options lettered in their order.

Differs from the owners' script: all questions count. It leaves out those that are hard to answer
without options (`difficult_direct_answer`), in the setting with options too.

Source: Schwenk et al., "A-OKVQA: A Benchmark for Visual Question Answering using World Knowledge".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from llava.errors import DataError
from llava.eval.tasks.base import Id, Item, check_unique
from llava.eval.tasks.files import Picture, read_questions
from llava.eval.tasks.lettered import Lettered, lettered

QUESTIONS = "aokvqa_v1p0_val.json"


class Row(msgspec.Struct):
    """One question, of either file."""

    question_id: str
    question: str
    choices: list[str]
    correct_choice_idx: int
    image_id: int | None = None
    image: Picture | None = None


class Aokvqa(Lettered):
    """Metrics: `accuracy` and `parse_failures`."""

    name = "aokvqa"
    title = "A-OKVQA"
    place = 50
    image_folders = ("val2017", "images")

    def read(self, data: Path) -> list[Item]:
        """Items in the file's order."""
        items = [_item(row, at) for at, row in read_questions(data, Row, "validation", QUESTIONS)]
        check_unique(items, str(data))
        return items

    def submission(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, bytes]:
        """The owners' predictions: the text of the option that each answer names.

        An answer that names none is left out, which their script counts as wrong.
        """
        chosen = {item.id: item.question.option(texts.get(item.id, "")) for item in items}
        named = {i.id: i.question.options[n] for i in items if (n := chosen[i.id]) is not None}
        return {"predictions_val-mc.json": json.dumps(named, ensure_ascii=False).encode()}


def _item(row: Row, where: str) -> Item:
    question = lettered(row.question, row.choices, where)
    if not 0 <= row.correct_choice_idx < len(row.choices):
        raise DataError(
            f"{where}: correct_choice_idx {row.correct_choice_idx} is none of its "
            f"{len(row.choices)} options; give 0 to {len(row.choices) - 1}"
        )
    return Item(
        id=row.question_id,
        prompt=question.render(),
        question=question,
        gold=row.correct_choice_idx,
        images=(_picture(row, where),),
    )


def _picture(row: Row, where: str) -> str | bytes:
    if row.image is not None and row.image.content:
        return row.image.content
    if row.image_id is None:
        raise DataError(f"{where}: neither image_id nor a picture; download the file again")
    return f"{row.image_id:012}.jpg"
