"""MMMU: questions with options of all subjects, with their pictures."""

from __future__ import annotations

import json

import pytest

from llava.errors import DataError
from llava.eval.tasks import find_task
from tests.llava.eval.tasks.hub import picture, write

IMAGES = tuple(f"image_{number}" for number in range(1, 8))


def question(number, options=("x", "y"), answer="A", pictures=1, **more):
    images = {
        name: picture(b"png%d" % i if i < pictures else None) for i, name in enumerate(IMAGES)
    }
    return {
        "id": f"validation_Art_Theory_{number}",
        "question": "Which of <image 1> is\nolder?",
        "options": str(list(options)),
        "explanation": "",
        "img_type": "['Paintings']",
        "answer": answer,
        "question_type": "multiple-choice",
        "subfield": "f",
        **images,
    } | more


def subject(folder, name, rows):
    write(folder / name / "validation-00000-of-00001.parquet", rows, IMAGES)
    write(folder / name / "dev-00000-of-00001.parquet", rows, IMAGES)


def test_reading(tmp_path):
    nine = [f"o{i}" for i in range(9)]
    subject(tmp_path, "Math", [question(1, nine, "I", 2, id="validation_Math_1")])
    subject(
        tmp_path,
        "Art_Theory",
        [
            question(1, ["<image 2>", 'it\'s "x"'], "B", 7),
            question(2, [], "12", question_type="open"),
            question(3, ["B", "A"], "A", 0),
        ],
    )
    items = find_task("mmmu").read(tmp_path)
    assert [item.id for item in items] == [
        "validation_Art_Theory_1",
        "validation_Art_Theory_3",
        "validation_Math_1",
    ]
    assert [item.group for item in items] == ["Art_Theory", "Art_Theory", "Math"]
    assert [item.gold for item in items] == [1, 0, 8]
    assert items[0].images == tuple(b"png%d" % i for i in range(7))
    assert [len(item.images) for item in items] == [7, 0, 2]
    assert items[0].prompt == (
        'Which of <image 1> is\nolder?\nA. <image 2>\nB. it\'s "x"\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert items[1].question.options == ("B", "A")


def test_one_file_for_all_subjects(tmp_path):
    path = write(tmp_path / "data" / "validation-00000-of-00001.parquet", [question(1)], IMAGES)
    for data in (tmp_path, path):
        assert [item.group for item in find_task("mmmu").read(data)] == ["Art_Theory"]


def test_scores_and_submission(tmp_path):
    subject(tmp_path, "Math", [question(i, ["x", "y", "x"], "A") for i in range(4)])
    task = find_task("mmmu")
    items = task.read(tmp_path)
    texts = dict(zip((item.id for item in items), ("C", "B", "x"), strict=False))
    assert task.score(items, texts) == {"accuracy": 25, "parse_failures": 50}
    files = task.submission(items, texts)
    assert list(json.loads(files["total_val_output.json"]).values()) == ["C", "B", "x", ""]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (question(1, answer="C"), "row 1: the answer 'C' is none of its 2 options; give one of A"),
        (question(1, answer="['A', 'B']"), "row 1: the answer \"['A', 'B']\" is none of its 2"),
        (question(1, map(str, range(11))), "row 1: 11 options, but a lettered question has 2 to"),
        (question(1) | {"options": "['x',"}, "row 1: options \"['x',\" are no"),
        (question(1) | {"options": "[1, 2]"}, "row 1: options '[1, 2]' are no list of texts"),
        (question(1) | {"options": "open('x')"}, "row 1: options \"open('x')\" are no list"),
        (question(1) | {"options": "(" * 9999}, "row 1: options '(((("),
        (question(0), "row 1: id 'validation_Art_Theory_0' is there twice"),
    ],
)
def test_bad_rows(tmp_path, bad, message):
    subject(tmp_path, "Art_Theory", [question(0), bad])
    with pytest.raises(DataError) as caught:
        find_task("mmmu").read(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
