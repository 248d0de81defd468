"""MME: where answers are found, how they are read, and the sums by hand."""

from __future__ import annotations

import json

import pytest

from llava.errors import DataError, UsageError
from llava.eval.tasks import find_task
from llava.eval.tasks.mme import reading

TAIL = "Answer the question using a single word or phrase."
# picture: its questions with their answers; artwork has images/ apart, as in the release
PICTURES = {
    "count/1.jpg": [("One cat?", "Yes"), ("Two cats?", "No")],
    "count/2.jpg": [("One dog?", "Yes"), ("Two dogs?", "No")],
    "artwork/images/3.jpg": [("By Goya?", "Yes"), ("By Ernst?", "No")],
    "code_reasoning/4.png": [("Prints 1?", "Yes"), ("Prints 2?", "No")],
}


@pytest.fixture
def folder(tmp_path):
    rows = []
    for picture, questions in PICTURES.items():
        category, name = picture.split("/")[0], picture.split("/")[-1].split(".")[0]
        place = tmp_path / "MME_Benchmark_release_version" / category
        if "images" in picture:
            (place / "images").mkdir(parents=True)
            place = place / "questions_answers_YN"
        place.mkdir(parents=True, exist_ok=True)
        # one space before the instruction for the first question, two for the second
        text = "".join(
            f"{q}{' ' * (i + 1)}Please answer yes or no.\t{a}\n"
            for i, (q, a) in enumerate(questions)
        )
        (place / f"{name}.txt").write_text(text)
        rows += [
            {"question_id": picture, "image": picture, "text": f"{q}\n{TAIL}", "category": category}
            for q, _ in questions
        ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "llava_mme.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("Yes, it is", "yes"),
        ("no.", "no"),
        (" yes", "yes"),
        ("  yes", "other"),  # only four characters are looked at
        ("none", "no"),
        ("Nope", "no"),
        ("I know", "other"),
        ("", "other"),
    ],
)
def test_reading_rule(text, read):
    assert reading(text) == read


def test_items(folder):
    items = find_task("mme").read(folder)
    assert [item.answers[0] for item in items] == ["yes", "no"] * 4
    assert items[0].id == "count/1.jpg One cat?" and items[0].question_id == "count/1.jpg"
    assert items[4].group == "artwork" and items[4].images == ("artwork/images/3.jpg",)
    assert items == find_task("mme").read(folder / "llava_mme.jsonl")


def test_hand_computed_sums(folder):
    task = find_task("mme")
    items = task.read(folder)
    # count: both right; one right. artwork: both right. code_reasoning: one "other", one missing.
    answers = ["Yes", "No", "Yes", "Yes", "Yes", "no", "Maybe"]
    pairs = zip(items[:7], answers, strict=True)
    texts = {task.item_id(item.question_id, item.prompt): text for item, text in pairs}
    assert task.score(items, texts) == {
        "perception": 75 + 50 + 200,
        "cognition": 0,
        "count": 75 + 50,
        "count/accuracy": 75,
        "count/accuracy_plus": 50,
        "artwork": 200,
        "artwork/accuracy": 100,
        "artwork/accuracy_plus": 100,
        "code_reasoning": 0,
        "code_reasoning/accuracy": 0,
        "code_reasoning/accuracy_plus": 0,
    }


def test_pairs_meet_by_picture_not_by_place(folder):
    task = find_task("mme")
    items = task.read(folder)
    texts = {item.id: item.answers[0] for item in items[:3]}
    shuffled = [items[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert task.score(shuffled, texts) == task.score(items, texts)


def test_no_sum_for_a_kind_without_items(folder):
    task = find_task("mme")
    assert "cognition" not in task.score(task.read(folder)[:6], {})


def test_bad_answer_files(folder):
    task = find_task("mme")
    path = folder / "MME_Benchmark_release_version/count/2.txt"
    good = path.read_text()
    path.write_text(good.replace("Two dogs", "Three dogs"))
    with pytest.raises(
        DataError, match=r"mme\.jsonl: row 3: question 'Two dogs\?' is not in .*2\.txt"
    ):
        task.read(folder)
    path.write_text(good.replace("\tNo", "\tMaybe"))
    with pytest.raises(
        DataError, match=r"2\.txt: row 1: .* is not a question, a tab and Yes or No"
    ):
        task.read(folder)
    path.unlink()
    with pytest.raises(UsageError, match=r"2\.txt: .*unpack MME's"):
        task.read(folder)
    (folder / "MME_Benchmark_release_version").rename(folder / "elsewhere")
    with pytest.raises(UsageError, match="MME_Benchmark_release_version: not found; unpack"):
        task.read(folder)


def test_bad_questions(folder):
    task = find_task("mme")
    path = folder / "llava_mme.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:3]))
    with pytest.raises(DataError, match=r"row 2: count/2\.jpg has 1 questions"):
        task.read(folder)
    path.write_text("".join(rows + rows[:1]))
    with pytest.raises(DataError, match=r"row 8: id 'count/1\.jpg One cat\?' is there twice"):
        task.read(folder)
    for wrong in ("12", "counts/1.jpg", "count/../1.jpg"):
        path.write_text(rows[0].replace("count/1.jpg", wrong))
        with pytest.raises(DataError, match="row 0: question_id .* give MME's llava_mme.jsonl"):
            task.read(folder)


def test_submission_keeps_pairs_together(folder):
    """Lines of the official script: file, its question, its answer, what was said."""
    task = find_task("mme")
    items = task.read(folder)
    shuffled = [items[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    texts = {item.id: "Yes,\tit\nis." for item in items[:7]}
    files = task.submission(shuffled, texts)
    assert sorted(files) == ["artwork.txt", "code_reasoning.txt", "count.txt"]
    assert files["count.txt"].decode().splitlines() == [
        "1.txt\tOne cat? Please answer yes or no.\tYes\tYes, it is.",
        "1.txt\tTwo cats?  Please answer yes or no.\tNo\tYes, it is.",
        "2.txt\tOne dog? Please answer yes or no.\tYes\tYes, it is.",
        "2.txt\tTwo dogs?  Please answer yes or no.\tNo\tYes, it is.",
    ]
    assert files["code_reasoning.txt"].endswith(b"Prints 2?  Please answer yes or no.\tNo\t\n")
    assert files["artwork.txt"].startswith(b"3.txt\tBy Goya?")
