"""Answer files: what a model said, one JSON object a line, as LLaVA's evaluation modules write it.

    {"question_id": 12, "prompt": "...", "text": "B", "answer_id": ..., "model_id": ..., ...}

`text` is read, `question_id`, and `prompt` where several questions share an id (TextVQA, MME:
`Task.item_id`). Shards (`3_0.jsonl`, `3_1.jsonl`, ...) are put together by
`cat`; their order does not matter. Two rules are LLaVA's scripts' own: of several records of one id
the last counts, and 12 and "12" are one id. That items lack an answer is never passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llava.errors import DataError
from llava.eval.tasks.base import Id, Item, Task
from llava.records import raw_records


class Answer(msgspec.Struct, gc=False):
    """One line of an answer file. Unknown keys are ignored."""

    question_id: Id
    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Answers:
    """An answer file, one text an id."""

    path: Path
    texts: dict[str, str]
    """last text of each id, by the id as a string"""
    repeated: tuple[Id, ...]
    """ids of records that an id before them has already; each such record replaced a text"""


@dataclass(frozen=True)
class Matched:
    """Answers brought together with the items of a benchmark."""

    texts: dict[Id, str]
    """by the items' own ids; an item without an answer is not in it"""
    missing: tuple[Id, ...]
    """items without an answer"""
    unknown: tuple[str, ...]
    """answered ids that no item has"""


_DECODER = msgspec.json.Decoder(Answer)


def read_answers(path: str | Path, task: Task) -> Answers:
    """The answers in a file, to items of `task`.

    Raises UsageError if it cannot be read, DataError naming the row of the first bad record.
    """
    path = Path(path)
    texts: dict[str, str] = {}
    repeated = []
    for row, raw in enumerate(raw_records(path)):
        item_id, text = _decode(raw, task, f"{path}: row {row}")
        if str(item_id) in texts:
            repeated.append(item_id)
        texts[str(item_id)] = text
    return Answers(path, texts, tuple(repeated))


def _decode(raw: msgspec.Raw, task: Task, where: str) -> tuple[Id, str]:
    try:
        answer = _DECODER.decode(raw)
        return task.item_id(answer.question_id, answer.prompt), answer.text
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f'{where}: {error}; a record is one line {{"question_id", "text", ...}}. '
            "Remove it and run the items that then lack an answer"
        ) from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def match(answers: Answers, items: Sequence[Item]) -> Matched:
    """Texts by the ids of `items`; DataError if not one item is answered."""
    texts = {i.id: answers.texts[str(i.id)] for i in items if str(i.id) in answers.texts}
    if not texts:
        first = next(iter(answers.texts))
        raise DataError(
            f"{answers.path}: answers no item of the benchmark; its first id is {first!r}, the "
            f"benchmark's {items[0].id if items else None!r}; give the answers to these questions"
        )
    asked = {str(item.id) for item in items}
    return Matched(
        texts=texts,
        missing=tuple(item.id for item in items if item.id not in texts),
        unknown=tuple(key for key in answers.texts if key not in asked),
    )
