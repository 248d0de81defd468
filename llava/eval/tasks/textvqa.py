"""TextVQA: reading text in pictures, ten annotators' answers a question.

    llava_textvqa_val_v051_ocr.jsonl     what is asked; `question_id` is the picture's, so questions
                                         are told apart by (question_id, question in lower case)
    TextVQA_0.5.1_val.json               {"data": [{"image_id", "question", "answers"}, ...]}

An answer scores min(1, matches / 3) against each nine of the ten annotated answers, averaged; it is
normalised as on the EvalAI server first (llava/eval/vqa_normalise.py), as the annotated ones are.

Sources: Singh et al., "Towards VQA Models That Can Read"; LLaVA's eval_textvqa and the M4C
evaluator that it takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from llava.errors import DataError, UsageError
from llava.eval.tasks.base import Id, Item, Task, check_unique, percent
from llava.eval.tasks.rows import (
    QuestionRow,
    find_file,
    folder_of,
    question_file,
    read_json,
    read_rows,
)
from llava.eval.vqa_normalise import normalise

QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANSWERS = "TextVQA_0.5.1_val.json"
N_ANNOTATORS = 10
_OCR = "Reference OCR token: "
_OCR_FIRST = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


class Annotation(msgspec.Struct):
    """One question with its annotators' answers."""

    image_id: Id
    question: str
    answers: list[str]


class Annotations(msgspec.Struct):
    """TextVQA_0.5.1_val.json."""

    data: list[Annotation]


class TextVqa(Task):
    """Metric: `accuracy`, the mean soft accuracy."""

    name = "textvqa"
    image_folders = ("train_images",)

    def read(self, data: Path) -> list[Item]:
        """Items in the question file's order; `id` is "<question_id> <question>"."""
        path = question_file(data, QUESTIONS)
        rows = read_rows(path, QuestionRow)
        answers = _answers(folder_of(data))
        items = [self._item(row, answers, f"{path}: row {i}") for i, row in enumerate(rows)]
        check_unique(items, str(path))
        return items

    def item_id(self, question_id: Id, prompt: str) -> Id:
        """The item of an answer-file row; DataError for a prompt of no known layout."""
        return _key(question_id, question_in(prompt))

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. An item without an answer scores 0."""
        total = sum(soft_accuracy(texts[i.id], i.answers) for i in items if i.id in texts)
        return {"accuracy": percent(total, len(items))}

    def _item(self, row: QuestionRow, answers: Mapping[str, Sequence[str]], where: str) -> Item:
        try:
            key = self.item_id(row.question_id, row.text)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if key not in answers:
            raise DataError(f"{where}: {key!r} is not in {ANSWERS}; take both of version 0.5.1")
        return Item(
            id=key,
            prompt=row.text,
            answers=tuple(answers[key]),
            images=(row.image,),
            extra={"question_id": row.question_id},
        )


def question_in(prompt: str) -> str:
    """The question inside a prompt, lower-case. Three layouts are known:

    "OCR tokens: ... Question: <question> Short answer:"; three lines, one of them the OCR tokens,
    first or after the question; two lines, the question and the instruction.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = _OCR_FIRST.search(prompt)
        if found:
            return found[1].lower()
    elif _OCR in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_OCR.rstrip()) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise DataError(
        f"prompt {prompt[:60]!r} has no known layout; give question, OCR tokens and instruction "
        "a line each"
    )


def soft_accuracy(text: str, annotated: Sequence[str]) -> float:
    """Mean of min(1, matches / 3) of `text` over leaving out each one of `annotated`, in [0, 1]."""
    answer = normalise(text)
    matches = [normalise(other) == answer for other in annotated]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def _answers(folder: Path) -> dict[str, list[str]]:
    """The annotated answers by item id; of two entries for one question the last counts."""
    path = find_file(folder, ANSWERS, ())
    if path is None:
        raise UsageError(f"{folder / ANSWERS}: not found; take it from textvqa.org")
    entries = read_json(path, Annotations).data
    for i, entry in enumerate(entries):
        if len(entry.answers) != N_ANNOTATORS:
            raise DataError(
                f"{path}: row {i}: {len(entry.answers)} answers, but each question has "
                f"{N_ANNOTATORS}; take the released file"
            )
    return {_key(entry.image_id, entry.question.lower()): entry.answers for entry in entries}


def _key(question_id: Id, question: str) -> str:
    return f"{question_id} {question}"
