"""A-OKVQA, MMMU, ARC-Easy and BoolQ: the readers read what was meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.tasks import find_task
from mini.eval.choice import ARC_NUMBERED, aokvqa, arc, boolq, mmmu
from mini.eval.items import Choice, Exam, Passage
from mini.render import SIZE, png

OPTIONS = ("w", "x", "y", "z")


def picture(n):
    return png(Image.new("RGB", (SIZE, SIZE), (n, 50, 90)))


@pytest.fixture
def read(tmp_path):
    """Write files and read them as benchmark `name`."""

    def run(files, name):
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
        return find_task(name).read(Path(tmp_path / name))

    return run


def test_aokvqa(read, tmp_path):
    choices = [Choice("", "c", f"Q{i}?", OPTIONS, i, picture(i)) for i in range(4)]
    items = read(aokvqa(choices), "aokvqa")
    assert [(i.question.stem, i.question.options, i.gold) for i in items] == [
        (c.question, c.options, c.answer) for c in choices
    ]
    assert all((tmp_path / "aokvqa/val2017" / item.images[0]).is_file() for item in items)
    row = json.loads((tmp_path / "aokvqa/aokvqa_v1p0_val.json").read_text())[1]
    assert row["direct_answers"] == ["x"] * 10 and len(row["question_id"]) == 22


def test_mmmu(read, tmp_path):
    exams = [
        Exam("Math", "Q?", (), "12", (picture(1),)),
        Exam("Art", "Which?", ("<image 1>", "it's"), "B", tuple(map(picture, range(7)))),
        Exam("Math", "R?", OPTIONS, "D", (picture(1), picture(2))),
    ]
    items = read(mmmu(exams), "mmmu")
    assert [item.id for item in items] == ["validation_Art_1", "validation_Math_2"]
    assert [item.images for item in items] == [exams[1].pictures, exams[2].pictures]
    assert [(item.question.options, item.gold) for item in items] == [
        (("<image 1>", "it's"), 1),
        (OPTIONS, 3),
    ]


def test_arc_has_numbers_for_some(read):
    choices = [Choice("", "c", f"Q{i}?", OPTIONS, i % 4) for i in range(ARC_NUMBERED + 1)]
    items = read(arc(choices), "arc_e")
    assert [item.gold for item in items] == [choice.answer for choice in choices]
    assert [i for i, item in enumerate(items) if item.group == "numbers"] == [ARC_NUMBERED - 1]


def test_boolq(read):
    items = read(boolq([Passage("Ice is cold.", "is ice cold", True)]), "boolq")
    assert items[0].question.stem == "Ice is cold.\nis ice cold?" and items[0].gold == 0
