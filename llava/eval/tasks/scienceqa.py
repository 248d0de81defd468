"""ScienceQA: school questions with two to five options, half of them with a picture.

    llava_test_CQM-A.json    questions, options and the right letters, as LLaVA publishes them
    pid_splits.json          {"test": [ids], ...}; if present, the questions must be that split's
    images/test/             the image folder

LLaVA's instruction is put after the options, as `model_vqa_science --single-pred-prompt` does.
An answer is read by three rules, the first that holds: it is a bare letter A-E; it begins with
such a letter, a point and a space; "The answer is X." stands in it exactly once (any character
may be in the point's place, but there must be one). Otherwise it could not be read. A letter
that the question does not have is wrong, but was read.

The published number of LLaVA is `image`, not `total`.

Differs from LLaVA's script: `image` counts the items that have a picture, not the recorded prompts
that contain "<image>"; these are the same items. `problems.json` is not needed, because options and
right letters are in the questions.

Sources: Lu et al., "Learn to Explain"; the rules are those of LLaVA's eval_science_qa.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from llava.errors import DataError
from llava.eval.question import LETTERS, Question, parse_question
from llava.eval.tasks.base import Id, Item, Task, check_unique, percent
from llava.eval.tasks.files import folder_of, question_file, read_document, read_rows
from llava.eval.tasks.lettered import LETTER, gold_of

QUESTIONS = "llava_test_CQM-A.json"
SPLITS = "pid_splits.json"
UNREAD = "FAILED"
"""LLaVA's word for an answer that is missing or could not be read"""
_READ = LETTERS[:5]
_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_FILE_NAME = re.compile(r"llava_(\w+)_CQM-A\.json")


class Turn(msgspec.Struct):
    """What one side says."""

    value: str


class Record(msgspec.Struct):
    """One question in LLaVA's training format."""

    id: Id
    conversations: list[Turn]
    image: str | None = None


class ScienceQa(Task):
    """Metrics: `total`, `image` (published; the items with a picture), and `parse_failures`, the
    share of all items whose answer is missing or could not be read.
    """

    name = "sqa"
    title = "ScienceQA"
    folder = "scienceqa"
    place = 10
    attacked = True
    image_folders = ("images/test",)

    def read(self, data: Path) -> list[Item]:
        """Items in the question file's order, `group` is "image" or "text"."""
        path = question_file(data, QUESTIONS)
        items = [_item(r, f"{path}: row {i}") for i, r in enumerate(read_rows(path, Record))]
        check_unique(items, str(path))
        _check_split(items, path)
        return items

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. An item without an answer is wrong, and a parse failure."""
        letters = {item.id: read_letter(texts.get(item.id, "")) for item in items}
        right = [item for item in items if letters[item.id] == _right_letter(item)]
        return {
            "total": percent(len(right), len(items)),
            "image": percent(sum(map(_has_image, right)), sum(map(_has_image, items))),
            "parse_failures": percent(list(letters.values()).count(None), len(items)),
        }

    def submission(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, bytes]:
        """What LLaVA's eval_science_qa writes as --output-file and --output-result."""
        rows = [_analysis(item, texts.get(item.id, UNREAD)) for item in items]
        right = [row["parsed_ans"] == row["ground_truth"] for row in rows]
        parts = {
            "correct": [row for row, is_right in zip(rows, right, strict=True) if is_right],
            "incorrect": [row for row, is_right in zip(rows, right, strict=True) if not is_right],
        }
        result = {
            "acc": percent(sum(right), len(rows)),
            "correct": sum(right),
            "count": len(rows),
            "results": {
                i.id: _position(r["parsed_ans"], i) for i, r in zip(items, rows, strict=True)
            },
            "outputs": {row["question_id"]: row["pred"] for row in rows},
        }
        return {"output.jsonl": _indented(parts), "result.json": _indented(result)}

    def recorded(self, item: Item) -> str:
        """With "<image>" before a question with a picture: LLaVA's script counts those by it."""
        return f"<image>\n{item.prompt}" if item.images else item.prompt

    def counted(self, item: Item) -> bool:
        """Only items with a picture: the subset that papers mean by ScienceQA."""
        return _has_image(item)


def read_letter(text: str) -> str | None:
    """The letter that an answer names by the rules above, None if it could not be read."""
    if text and text[0] in _READ and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    letters = _SENTENCE.findall(text)
    return letters[0] if len(letters) == 1 else None


def _item(record: Record, where: str) -> Item:
    if len(record.conversations) != 2:
        raise DataError(
            f"{where}: {len(record.conversations)} turns, but a question and its letter are two; "
            f"take LLaVA's {QUESTIONS}"
        )
    asked, answer = (turn.value for turn in record.conversations)
    question = _question(asked.replace("<image>", "").strip(), where)
    return Item(
        id=record.id,
        prompt=question.render(),
        question=question,
        gold=gold_of(question, answer, where),
        images=() if record.image is None else (record.image,),
        group="text" if record.image is None else "image",
    )


def _question(text: str, where: str) -> Question:
    question = parse_question(text)
    if question is None:
        raise DataError(
            f"{where}: no options as lines 'A. ...', 'B. ...' (two to ten); take LLaVA's "
            f"{QUESTIONS}, not what convert_sqa_to_llava writes ('Options: (A) ...'), which costs "
            "about 20 points"
        )
    if question.suffix is None:
        question = dataclasses.replace(question, suffix=LETTER)
    return question


def _check_split(items: Sequence[Item], path: Path) -> None:
    """DataError if `pid_splits.json` says that the file's split has other questions."""
    splits, name = folder_of(path) / SPLITS, _FILE_NAME.fullmatch(path.name)
    if name is None or not splits.is_file():
        return
    ids = read_document(splits, dict[str, list[str]]).get(name[1])
    if ids is None:
        raise DataError(f"{splits}: has no split {name[1]!r}; take ScienceQA's own file")
    different = {str(item.id) for item in items} ^ set(ids)
    if different:
        raise DataError(
            f"{path}: has {len(items)} questions, {SPLITS} {len(ids)} in {name[1]!r}; "
            f"{min(different)!r} is in one only; complete it, or give another file a name of its "
            "own"
        )


def _analysis(item: Item, text: str) -> dict:
    """One question in LLaVA's output file."""
    return {
        "question_id": item.id,
        "parsed_ans": read_letter(text) or UNREAD,
        "ground_truth": _right_letter(item),
        "question": "<image>\n" * _has_image(item) + item.prompt,
        "pred": text,
        "is_multimodal": _has_image(item),
    }


def _position(letter: str, item: Item) -> int:
    """The option's number, -1 for a letter that the question does not have."""
    return LETTERS[: len(item.question.options)].find(letter)


def _indented(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()


def _right_letter(item: Item) -> str:
    return LETTERS[item.gold]


def _has_image(item: Item) -> bool:
    return bool(item.images)
