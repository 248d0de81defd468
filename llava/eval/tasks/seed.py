"""SEED-Bench: what is in pictures and in videos, four options, twelve types of question.

    llava-seed-bench.jsonl    what is asked: `question_id`, `text`, `image`
    SEED-Bench.json           {"questions": [{"question_id", "answer", "data_type",
                              "question_type_id", ...}], "question_type": {name: id}}

An answer must be the bare letter. Ids of both files are numbers where they can be.

The real files have one id twice ("49914"). As in LLaVA's script, both of its annotated questions
are scored with the last answer of that id: so 19,242 questions, but 19,241 items, and of the two
lines the last one is asked. An id repeated in one file only is an error.

A question file without videos may go with the whole SEED-Bench.json. `total` is then `image`;
LLaVA's script would count all videos wrong.

Sources: Li et al., "SEED-Bench"; the rules are those of LLaVA's convert_seed_for_submission.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from llava.errors import DataError
from llava.eval.question import parse_question
from llava.eval.tasks.base import Id, Item, Task, percent
from llava.eval.tasks.files import QuestionRow, folder_of, question_file, read_document, read_rows
from llava.eval.tasks.lettered import gold_of

QUESTIONS = "llava-seed-bench.jsonl"
ANNOTATIONS = "SEED-Bench.json"
_REMEDY = f"take {QUESTIONS} and {ANNOTATIONS} of one release"


class Annotation(msgspec.Struct):
    """One question of SEED-Bench.json."""

    question_id: Id
    answer: str
    data_type: Literal["image", "video"]
    question_type_id: int


class Annotations(msgspec.Struct):
    """SEED-Bench.json."""

    questions: list[Annotation]
    question_type: dict[str, int]


class Seed(Task):
    """Metrics: `total` (published for LLaVA-1.5), `image`, `video`, and `type/<name>` for each
    type of question; `image` or `video` is left out if there is no such question.
    """

    name = "seed"
    title = "SEED-Bench"
    folder = "seed_bench"
    place = 20
    attacked = True

    def read(self, data: Path) -> list[Item]:
        """Items in the question file's order; `extra["annotations"]` are what an item counts as."""
        path = question_file(data, QUESTIONS)
        rows = read_rows(path, QuestionRow)
        annotated = read_document(folder_of(data) / ANNOTATIONS, Annotations)
        by_id = defaultdict(list)
        for entry in annotated.questions:
            by_id[_number(entry.question_id)].append(entry)
        _check_ids(rows, by_id, str(path))
        types = {number: name for name, number in annotated.question_type.items()}
        items = {
            _number(row.question_id): _item(
                row, by_id[_number(row.question_id)], types, f"{path}: row {i}"
            )
            for i, row in enumerate(rows)
        }
        return list(items.values())

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. An item without an answer is wrong."""
        right, count = Counter(), Counter()
        for item in items:
            for group, data_type, letter in item.extra["annotations"]:
                for name in ("total", data_type, f"type/{group}"):
                    count[name] += 1
                    right[name] += texts.get(item.id) == letter
        names = [name for name in ("total", "image", "video") if name in count]
        names += [name for name in count if name not in names]
        return {name: percent(right[name], count[name]) for name in names}

    def submission(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, bytes]:
        """The leaderboard's upload: a line for each question of SEED-Bench.json that was asked."""
        lines = [
            json.dumps({"question_id": upload_id, "prediction": texts.get(item.id, "")})
            for item in items
            for upload_id in item.extra["upload_ids"]
        ]
        return {"answers_upload.jsonl": ("\n".join(lines) + "\n").encode()}


def _item(
    row: QuestionRow, entries: Sequence[Annotation], types: Mapping[int, str], where: str
) -> Item:
    question = parse_question(row.text)
    if question is None:
        raise DataError(
            f"{where}: no options as lines 'A. ...', 'B. ...' (two to ten); take LLaVA's "
            f"{QUESTIONS}"
        )
    unknown = [e.question_type_id for e in entries if e.question_type_id not in types]
    if unknown:
        raise DataError(f"{where}: {ANNOTATIONS} has no name for its type {unknown[0]}; {_REMEDY}")
    golds = [gold_of(question, entry.answer, where) for entry in entries]
    return Item(
        id=_number(row.question_id),
        prompt=row.text,
        question=question,
        gold=golds[-1],
        images=(row.image,),
        group=types[entries[-1].question_type_id],
        extra={
            "annotations": [(types[e.question_type_id], e.data_type, e.answer) for e in entries],
            "upload_ids": [entry.question_id for entry in entries],
        },
    )


def _check_ids(
    rows: Sequence[QuestionRow], by_id: Mapping[Id, Sequence[Annotation]], where: str
) -> None:
    """DataError unless each id is asked as often as it is annotated, for the data types asked."""
    asked = Counter(_number(row.question_id) for row in rows)
    data_types = {e.data_type for i in asked for e in by_id.get(i, ())}
    annotated = Counter(
        {i: sum(e.data_type in data_types for e in entries) for i, entries in by_id.items()}
    )
    for i in [*asked, *annotated]:
        if asked[i] != annotated[i]:
            raise DataError(
                f"{where}: id {i!r} is there {asked[i]} times, but {annotated[i]} times in "
                f"{ANNOTATIONS}; {_REMEDY}"
            )


def _number(question_id: Id) -> Id:
    """An id as a number if it is one, as LLaVA's script has it."""
    try:
        return int(question_id)
    except ValueError:
        return question_id
