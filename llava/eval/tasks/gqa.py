"""GQA and GQA-OOD: one-word questions about real pictures; OOD splits them by how usual they are.

    llava_gqa_testdev_balanced.jsonl           what is asked (LLaVA), and in the folder, in data/,
    data/testdev_balanced_questions.json       questions1.2/ or data/questions1.2/ the answers (GQA)
    data/ood_testdev_{head,tail}.json          usual and unusual answers (GQA-OOD); its third file,
    data/ood_testdev_all.json                  both together, need not be there

An answer is right if it equals the annotated one after LLaVA's conversion: dots at the end removed,
lower-case, nothing else.

Sources: Hudson and Manning, "GQA"; Kervadec et al., "Roses Are Red, Violets Are Blue... but Should
VQA Expect Them To?"; LLaVA's convert_gqa_for_eval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from llava.errors import DataError, UsageError
from llava.eval.tasks.base import Id, Item, Task, check_unique, percent
from llava.eval.tasks.files import (
    SHORT,
    QuestionRow,
    find_file,
    folder_of,
    question_file,
    read_document,
    read_rows,
)

QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
ANSWERS = "testdev_balanced_questions.json"
_PLACES = ("data", "questions1.2", "data/questions1.2", "ood")


class Annotation(msgspec.Struct):
    """What GQA's owners say about one question."""

    answer: str
    question: str
    imageId: str


class Gqa(Task):
    """Metric: `accuracy` over testdev_balanced."""

    name = "gqa"
    title = "GQA"
    place = 90
    image_folders = ("data/images", "images")

    def read(self, data: Path) -> list[Item]:
        """Items in the question file's order."""
        path = question_file(data, QUESTIONS)
        rows = read_rows(path, QuestionRow)
        source = _need(folder_of(data), ANSWERS, "unpack GQA's questions1.2.zip there")
        annotations = read_document(source, dict[str, Annotation])
        items = [_item(row, annotations, f"{path}: row {i}") for i, row in enumerate(rows)]
        check_unique(items, str(path))
        return items

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. An item without an answer is wrong."""
        return {"accuracy": _accuracy(items, texts)}

    def submission(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, bytes]:
        """Predictions for GQA's eval.py."""
        return {"testdev_balanced_predictions.json": _predictions(items, texts)}


class GqaOod(Task):
    """Metrics: `original` (GQA's testdev_balanced, when its two files are there), `all`, `head`
    and `tail`, each the accuracy over that split. A question of several splits is asked once.
    The published file has 2,796 questions: head 1,733, tail 1,063.
    """

    name = "gqa_ood"
    title = "GQA-OOD"
    folder = "gqa"
    place = 100
    image_folders = Gqa.image_folders

    def read(self, data: Path) -> list[Item]:
        """GQA's items if it is there, then those that only GQA-OOD has.

        `group` is head, tail or empty; `extra["splits"]` names every split that counts the item.
        """
        folder = folder_of(data)
        splits = _ood_splits(folder)
        has_gqa = (folder / QUESTIONS).is_file() and find_file(folder, ANSWERS, _PLACES)
        items = {str(item.id): item for item in (Gqa().read(folder) if has_gqa else ())}
        n_original = len(items)
        for split in splits.values():
            for key, annotation in split.items():
                items.setdefault(key, _ood_item(key, annotation))
        return [
            _placed(item, splits, key, original=i < n_original)
            for i, (key, item) in enumerate(items.items())
        ]

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. An item without an answer is wrong."""
        members = {
            split: [item for item in items if split in item.extra["splits"]]
            for split in ("original", "all", "head", "tail")
        }
        return {split: _accuracy(group, texts) for split, group in members.items() if group}

    def headline(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """All splits, and their mean."""
        return {**numbers, "avg": sum(numbers.values()) / len(numbers)}

    def submission(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, bytes]:
        """Predictions for GQA-OOD's evaluation.py, and so for GQA's eval.py."""
        return {"ood_testdev_predictions.json": _predictions(items, texts)}


def convert(text: str) -> str:
    """An answer as LLaVA hands it to GQA's evaluation."""
    return text.rstrip(".").lower()


def _predictions(items: Sequence[Item], texts: Mapping[Id, str]) -> bytes:
    """As LLaVA's convert_gqa_for_eval writes them."""
    pairs = [{"questionId": i.id, "prediction": convert(texts.get(i.id, ""))} for i in items]
    return json.dumps(pairs, ensure_ascii=False).encode()


def _accuracy(items: Sequence[Item], texts: Mapping[Id, str]) -> float:
    right = sum(i.id in texts and convert(texts[i.id]) == i.answers[0] for i in items)
    return percent(right, len(items))


def _item(row: QuestionRow, annotations: Mapping[str, Annotation], where: str) -> Item:
    annotation = annotations.get(str(row.question_id))
    if annotation is None:
        raise DataError(
            f"{where}: question {row.question_id!r} is not in {ANSWERS}; take both files of "
            "testdev_balanced"
        )
    return Item(row.question_id, row.text, answers=(annotation.answer,), images=(row.image,))


def _need(folder: Path, name: str, remedy: str) -> Path:
    path = find_file(folder, name, _PLACES)
    if path is None:
        raise UsageError(f"{folder / 'data' / name}: not found; {remedy}")
    return path


def _ood_splits(folder: Path) -> dict[str, dict[str, Annotation]]:
    """Annotations of `head`, `tail` and `all`; the last is both where it has no file."""
    paths = {
        split: _need(folder, f"ood_testdev_{split}.json", "take it from the data of GQA-OOD")
        for split in ("head", "tail")
    }
    splits = {name: read_document(path, dict[str, Annotation]) for name, path in paths.items()}
    shared = splits["head"].keys() & splits["tail"].keys()
    if shared:
        raise DataError(
            f"{paths['tail']}: question {min(shared)!r} is in head too; take both of one release"
        )
    path = find_file(folder, "ood_testdev_all.json", _PLACES)
    both = read_document(path, dict[str, Annotation]) if path else splits["head"] | splits["tail"]
    return splits | {"all": both}


def _ood_item(key: str, annotation: Annotation) -> Item:
    return Item(
        key,
        f"{annotation.question}\n{SHORT}",
        answers=(annotation.answer,),
        images=(f"{annotation.imageId}.jpg",),
    )


def _placed(item: Item, splits: Mapping[str, Mapping], key: str, original: bool) -> Item:
    names = [split for split in splits if key in splits[split]]
    group = next((split for split in names if split != "all"), "")
    return replace(item, group=group, extra={"splits": (["original"] if original else []) + names})
