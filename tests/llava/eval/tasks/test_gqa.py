"""GQA's conversion and accuracy, GQA-OOD's splits, by hand."""

from __future__ import annotations

import json

import pytest

from llava.errors import DataError, UsageError
from llava.eval.tasks import find_task
from llava.eval.tasks.gqa import convert

TAIL = "Answer the question using a single word or phrase."
GOLD = {"11": "yes", "12": "couch", "13": "red", "14": "left"}


def annotations(*ids):
    return {i: {"answer": GOLD[i], "question": f"Q{i}?", "imageId": f"n{i}"} for i in ids}


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    """Four balanced questions of which 12 is in head and 13, 14 are in tail."""
    rows = [
        {"question_id": i, "image": f"n{i}.jpg", "text": f"Q{i}?\n{TAIL}", "category": "default"}
        for i in GOLD
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "llava_gqa_testdev_balanced.jsonl").write_text(text)
    write(tmp_path / "data/testdev_balanced_questions.json", annotations(*GOLD))
    write(tmp_path / "data/ood_testdev_head.json", annotations("12"))
    write(tmp_path / "data/ood_testdev_tail.json", annotations("13", "14"))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "converted"),
    [("Yes.", "yes"), ("Red...", "red"), ("a.b", "a.b"), ("Yes. ", "yes. "), ("", "")],
)
def test_conversion(text, converted):
    assert convert(text) == converted


def test_gqa_accuracy(folder):
    task = find_task("gqa")
    items = task.read(folder)
    assert [item.id for item in items] == list(GOLD) and items[1].answers == ("couch",)
    assert items[0].prompt == f"Q11?\n{TAIL}" and items[0].images == ("n11.jpg",)
    # right, right, wrong (a word more), missing
    assert task.score(items, {"11": "Yes.", "12": "COUCH", "13": "red one"}) == {"accuracy": 50}
    assert items == task.read(folder / "llava_gqa_testdev_balanced.jsonl")


def test_ood_splits(folder):
    task = find_task("gqa_ood")
    items = task.read(folder)
    assert [item.id for item in items] == list(GOLD)
    assert [item.group for item in items] == ["", "head", "tail", "tail"]
    assert items[1].extra["splits"] == ["original", "head", "all"]
    scores = task.score(items, {"11": "no", "12": "couch", "13": "Red.", "14": "right"})
    assert scores == pytest.approx(
        {"original": 50, "all": 200 / 3, "head": 100, "tail": 50}, abs=1e-9
    )


def test_ood_alone_has_the_same_prompts_and_no_original(folder):
    with_gqa = {item.id: item for item in find_task("gqa_ood").read(folder)}
    (folder / "llava_gqa_testdev_balanced.jsonl").unlink()
    items = find_task("gqa_ood").read(folder)
    assert [item.id for item in items] == ["12", "13", "14"]
    for item in items:
        assert (item.prompt, item.images, item.answers) == (
            with_gqa[item.id].prompt,
            with_gqa[item.id].images,
            with_gqa[item.id].answers,
        )
    scores = find_task("gqa_ood").score(items, {"12": "couch"})
    assert scores == pytest.approx({"all": 100 / 3, "head": 100, "tail": 0})


def test_ood_all_from_its_own_file(folder):
    write(folder / "data/ood_testdev_all.json", annotations("11", "12", "13", "14"))
    (folder / "llava_gqa_testdev_balanced.jsonl").unlink()
    task = find_task("gqa_ood")
    items = task.read(folder)
    assert len(items) == 4
    assert task.score(items, {"11": "yes"}) == {"all": 25, "head": 0, "tail": 0}


def test_bad_files(folder):
    answers = folder / "data/testdev_balanced_questions.json"
    write(answers, annotations("11", "12", "13"))
    with pytest.raises(DataError, match=r"balanced\.jsonl: row 3: question '14' is not in testdev"):
        find_task("gqa").read(folder)
    answers.write_text("[1")
    with pytest.raises(DataError, match=r"testdev_balanced_questions\.json: .*is this the file"):
        find_task("gqa").read(folder)
    answers.unlink()
    with pytest.raises(UsageError, match=r"testdev_balanced_questions\.json: not found; unpack"):
        find_task("gqa").read(folder)
    write(folder / "data/ood_testdev_tail.json", annotations("12", "13"))
    with pytest.raises(DataError, match=r"tail\.json: question '12' is in head too"):
        find_task("gqa_ood").read(folder)
    (folder / "data/ood_testdev_head.json").unlink()
    with pytest.raises(UsageError, match=r"ood_testdev_head\.json: not found; take"):
        find_task("gqa_ood").read(folder)


def test_duplicated_question(folder):
    path = folder / "llava_gqa_testdev_balanced.jsonl"
    path.write_text(path.read_text() + path.read_text())
    with pytest.raises(DataError, match="row 4: id '11' is there twice"):
        find_task("gqa").read(folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gqa", "testdev_balanced_predictions.json"),
        ("gqa_ood", "ood_testdev_predictions.json"),
    ],
)
def test_submission(folder, name, file):
    task = find_task(name)
    files = task.submission(task.read(folder), {"11": "Yes.", "13": "red"})
    assert list(files) == [file]
    assert json.loads(files[file]) == [
        {"questionId": "11", "prediction": "yes"},
        {"questionId": "12", "prediction": ""},
        {"questionId": "13", "prediction": "red"},
        {"questionId": "14", "prediction": ""},
    ]
