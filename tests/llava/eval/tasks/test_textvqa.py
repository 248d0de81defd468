"""TextVQA: prompt layouts, keys and soft accuracy by hand."""

from __future__ import annotations

import json

import pytest

from llava.errors import DataError, UsageError
from llava.eval.tasks import find_task
from llava.eval.tasks.textvqa import question_in, soft_accuracy

TAIL = "Answer the question using a single word or phrase."
NOKIA = ["nokia"] * 4 + ["Nokia 3"] * 2 + ["samsung"] + ["the phone"] * 3
FIVE = ["5"] * 10


def prompt(question, ocr="A, B"):
    return f"{question}\nReference OCR token: {ocr}\n{TAIL}"


@pytest.fixture
def folder(tmp_path):
    """Two questions of one picture, one of another."""
    asked = [("p1", "What Brand?"), ("p1", "How many?"), ("p2", "What brand?")]
    rows = [{"question_id": i, "image": f"{i}.jpg", "text": prompt(q)} for i, q in asked]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").write_text(text)
    data = [
        {"image_id": i, "question": q.upper(), "answers": FIVE if "How" in q else NOKIA}
        for i, q in asked
    ]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        prompt("What IS it?"),
        prompt("What IS it?", ocr=""),
        f"Reference OCR token: A, B\nWhat IS it?\n{TAIL}",
        f"What IS it?\n{TAIL}",
        "OCR tokens: A, B. Question: What IS it? Short answer:",
    ],
)
def test_question_in_every_layout(text):
    assert question_in(text) == "what is it?"


@pytest.mark.parametrize("text", ["What is it?", f"What\nis it?\n{TAIL}", "OCR tokens: A\nWhat?"])
def test_unknown_layout(text):
    with pytest.raises(DataError, match="has no known layout; give"):
        question_in(text)


@pytest.mark.parametrize(
    ("matches", "expected"),
    # m of 10 match: leaving out a match leaves m - 1, else m:
    # (m min(1, (m-1)/3) + (10-m) min(1, m/3)) / 10
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_leave_one_out_accuracy(matches, expected):
    annotated = ["cat"] * matches + [f"other{i}" for i in range(10 - matches)]
    assert soft_accuracy("Cat", annotated) == pytest.approx(expected)


def test_both_sides_are_normalised():
    assert soft_accuracy("The phone.", NOKIA) == pytest.approx(0.9)
    assert soft_accuracy("nokia three", NOKIA) == pytest.approx(0.6)


def test_scores_of_a_file(folder):
    task = find_task("textvqa")
    items = task.read(folder)
    assert [item.id for item in items] == ["p1 what brand?", "p1 how many?", "p2 what brand?"]
    assert [item.question_id for item in items] == ["p1", "p1", "p2"]
    assert items[1].images == ("p1.jpg",) and items[1].answers == tuple(FIVE)
    rows = [("p1", items[0].prompt, "samsung"), ("p1", items[1].prompt, "five")]
    texts = {task.item_id(question_id, asked): text for question_id, asked, text in rows}
    # 0.3, 1 and a missing one
    assert task.score(items, texts) == pytest.approx({"accuracy": 130 / 3})


def test_bad_files(folder):
    task = find_task("textvqa")
    questions, answers = folder / "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
    good, annotated = questions.read_text(), json.loads((folder / answers).read_text())
    questions.write_text(good + good)
    with pytest.raises(DataError, match="row 3: id 'p1 what brand\\?' is there twice"):
        task.read(folder)
    questions.write_text(good + '{"question_id": "p3", "image": "p3.jpg", "text": "What?"}\n')
    with pytest.raises(DataError, match=r"ocr\.jsonl: row 3: prompt 'What\?' has no known layout"):
        task.read(folder)
    questions.write_text(good.replace("p2", "p9"))
    with pytest.raises(DataError, match="row 2: 'p9 what brand\\?' is not in TextVQA_0.5.1_val"):
        task.read(folder)
    questions.write_text(good)
    annotated["data"][1]["answers"].pop()
    (folder / answers).write_text(json.dumps(annotated))
    with pytest.raises(DataError, match=r"val\.json: row 1: 9 answers, but each question has 10"):
        task.read(folder)
    (folder / answers).unlink()
    with pytest.raises(UsageError, match=r"TextVQA_0\.5\.1_val\.json: not found; take"):
        task.read(folder)
