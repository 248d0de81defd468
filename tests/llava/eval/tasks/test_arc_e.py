"""ARC-Easy: both formats, and which questions the published tables count."""

from __future__ import annotations

import json

import pytest

from llava.errors import DataError
from llava.eval.tasks import find_task
from tests.llava.eval.tasks.hub import write


def question(number, texts=("x", "y", "z"), labels="ABC", answer="B"):
    return {"id": f"Mercury_{number}", "texts": texts, "labels": labels, "answer": answer}


def owners(folder, questions):
    rows = [
        {
            "id": q["id"],
            "question": {
                "stem": "Why?",
                "choices": [
                    {"text": t, "label": label}
                    for t, label in zip(q["texts"], q["labels"], strict=True)
                ],
            },
            "answerKey": q["answer"],
        }
        for q in questions
    ]
    (folder / "ARC-Easy-Test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def hub(folder, questions):
    rows = [
        {
            "id": q["id"],
            "question": "Why?",
            "choices": {"text": list(q["texts"]), "label": list(q["labels"])},
            "answerKey": q["answer"],
        }
        for q in questions
    ]
    write(folder / "ARC-Easy" / "test-00000-of-00001.parquet", rows)
    write(folder / "ARC-Challenge" / "test-00000-of-00001.parquet", rows[:1])
    return folder


FOUR = [
    question(1),
    question(2, labels="123", answer="3"),
    question(3, texts=("x", "C", "z"), answer="A"),
    question(4, texts=("x", "F", "x"), answer="C"),
]


@pytest.mark.parametrize("make", [owners, hub])
def test_reading(tmp_path, make):
    task = find_task("arc_e")
    items = task.read(make(tmp_path, FOUR))
    assert [item.id for item in items] == [f"Mercury_{n}" for n in (1, 2, 3, 4)]
    assert [item.gold for item in items] == [1, 2, 0, 2]
    assert [item.group for item in items] == ["letters", "numbers", "letters", "letters"]
    assert [task.counted(item) for item in items] == [True, False, False, True]
    assert items[1].images == () and items[1].prompt == (
        "Why?\nA. x\nB. y\nC. z\nAnswer with the option's letter from the given choices directly."
    )


def test_scores(tmp_path):
    task = find_task("arc_e")
    items = task.read(owners(tmp_path, FOUR))
    texts = {"Mercury_1": "C", "Mercury_2": "C", "Mercury_3": "A", "Mercury_4": "A"}
    assert task.score(items, texts) == {"accuracy": 50, "parse_failures": 0, "total": 75}
    assert task.submission(items, texts) == {}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (question(2, answer="D"), "row 1: the answer 'D' is none of its 3 options; give one of A"),
        (question(2, ("x",), "A", "A"), "row 1: 1 options, but a lettered question has 2 to 10"),
        (question(1), "row 1: id 'Mercury_1' is there twice"),
    ],
)
@pytest.mark.parametrize("make", [owners, hub])
def test_bad_rows(tmp_path, make, bad, message):
    with pytest.raises(DataError) as caught:
        find_task("arc_e").read(make(tmp_path, [question(1), bad]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_without_labels(tmp_path):
    row = {"id": "1", "question": "Why?", "choices": {"text": ["x", "y"], "label": ["A"]}}
    write(tmp_path / "test-00000-of-00001.parquet", [row | {"answerKey": "A"}])
    with pytest.raises(DataError, match="row 0: options and labels are not as many"):
        find_task("arc_e").read(tmp_path)
