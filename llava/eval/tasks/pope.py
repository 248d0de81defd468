"""POPE: does a model see objects that are not there? Yes-or-no questions in three categories.

    llava_pope_test.jsonl                                what is asked, with `category`
    coco/coco_pope_{adversarial,popular,random}.json     JSON lines with `label`, by order

Questions and labels meet by their order within a category; pictures and objects are compared, so
that files of two versions are not paired. (LLaVA's questions go with POPE's files of commit
e3e3926, 2,910 random ones; the later files have 3,000 and would shift silently. Objects and not
whole questions are compared, because LLaVA's file keeps a misspelling that POPE corrected.)

An answer is "no" if its first sentence has one of the words No, not, no, else "yes". So an empty
answer is "yes", and a missing one counts the same; LLaVA's script would shift all answers after it.

Sources: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models"; the rules are
those of LLaVA's eval_pope.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from llava.errors import DataError, UsageError
from llava.eval.tasks.base import Id, Item, Task, check_unique, percent
from llava.eval.tasks.files import QuestionRow, find_file, folder_of, question_file, read_rows

CATEGORIES = ("adversarial", "popular", "random")
QUESTIONS = "llava_pope_test.jsonl"
_REMEDY = "take the coco folder of POPE's commit e3e3926, to which LLaVA's questions belong"


class LabelRow(msgspec.Struct):
    """One line of coco_pope_<category>.json."""

    image: str
    text: str
    label: Literal["yes", "no"]


class Pope(Task):
    """Metrics: `f1` (published, mean of the three), then for each category `<category>/...`
    accuracy, precision, recall, f1 and yes_ratio, "yes" being the positive class.
    """

    name = "pope"
    title = "POPE"
    place = 110
    image_folders = ("val2014",)

    def read(self, data: Path) -> list[Item]:
        """Items in the question file's order, the category as `group`, the label as answer."""
        path = question_file(data, QUESTIONS)
        rows = read_rows(path, QuestionRow)
        _check_categories(rows, path)
        labels = {name: _labels(rows, name, folder_of(data)) for name in CATEGORIES}
        items = [
            Item(
                id=row.question_id,
                prompt=row.text,
                answers=(next(labels[row.category]).label,),
                images=(row.image,),
                group=row.category,
            )
            for row in rows
        ]
        check_unique(items, str(path))
        return items

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. A missing answer counts as "yes"."""
        groups = [name for name in CATEGORIES if any(item.group == name for item in items)]
        scores = {}
        for name in groups:
            group = [item for item in items if item.group == name]
            pairs = Counter((says_yes(texts.get(i.id, "")), i.answers[0] == "yes") for i in group)
            scores |= {f"{name}/{key}": value for key, value in _measures(pairs).items()}
        total = sum(scores[f"{name}/f1"] for name in groups)
        return {"f1": total / max(1, len(groups))} | scores


def says_yes(text: str) -> bool:
    """Whether an answer is read as "yes": no No, not or no in its first sentence."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _measures(pairs: Mapping[tuple[bool, bool], int]) -> dict[str, float]:
    """Percentages from how often (answered yes, is yes) occurred; 0 where undefined."""
    hits, false_alarms = pairs[True, True], pairs[True, False]
    misses, rejections = pairs[False, True], pairs[False, False]
    n = hits + false_alarms + misses + rejections
    return {
        "accuracy": percent(hits + rejections, n),
        "precision": percent(hits, hits + false_alarms),
        "recall": percent(hits, hits + misses),
        "f1": percent(2 * hits, 2 * hits + false_alarms + misses),
        "yes_ratio": percent(hits + false_alarms, n),
    }


def _check_categories(rows: Sequence[QuestionRow], path: Path) -> None:
    for i, row in enumerate(rows):
        if row.category not in CATEGORIES:
            raise DataError(
                f"{path}: row {i}: category {row.category!r} is none of {', '.join(CATEGORIES)}; "
                f"give POPE's {QUESTIONS}"
            )


def _labels(rows: Sequence[QuestionRow], category: str, folder: Path) -> Iterator[LabelRow]:
    """The labels of a category's questions in their order, checked against them."""
    asked = [(i, row) for i, row in enumerate(rows) if row.category == category]
    if not asked:
        raise DataError(
            f"{folder}: no question of category {category!r}; give the whole {QUESTIONS}"
        )
    name = f"coco_pope_{category}.json"
    path = find_file(folder, name, ["coco"])
    if path is None:
        raise UsageError(f"{folder / 'coco' / name}: not found; {_REMEDY}")
    labels = read_rows(path, LabelRow)
    if len(labels) != len(asked):
        raise DataError(f"{path}: {len(labels)} labels for {len(asked)} questions; {_REMEDY}")
    for number, ((i, row), label) in enumerate(zip(asked, labels, strict=True)):
        if (row.image, _object(row.text)) != (label.image, _object(label.text)):
            raise DataError(
                f"{path}: row {number}: is about {label.image} and {label.text!r}, but its question"
                f" (row {i}) about {row.image} and {row.text!r}; {_REMEDY}"
            )
    return iter(labels)


def _object(question: str) -> str:
    return question.partition(" in the ")[0]
