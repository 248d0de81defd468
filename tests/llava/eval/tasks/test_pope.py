"""POPE's numbers by hand, and files that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import DataError, UsageError
from llava.eval.tasks import find_task
from llava.eval.tasks.pope import says_yes

FIRST_ID = {"adversarial": 1, "random": 10_000_001, "popular": 20_000_001}
TAIL = "Answer the question using a single word or phrase."
LABELS = ["yes", "no", "yes", "no"]
FIXTURE = Path(__file__).parents[4] / "mini/fixture/eval/pope"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def question(category, place):
    return {
        "question_id": FIRST_ID[category] + place,
        "image": f"{place // 2}.jpg",
        "text": f"Is there a thing{place} in the image?\n{TAIL}",
        "category": category,
    }


def label(place):
    text = f"Is there a thing{place} in the image?"
    return {"question_id": place + 1, "image": f"{place // 2}.jpg", "text": text}


@pytest.fixture
def folder(tmp_path):
    rows = [question(category, place) for category in FIRST_ID for place in range(4)]
    (tmp_path / "llava_pope_test.jsonl").write_text(lines(rows))
    (tmp_path / "coco").mkdir()
    for category in FIRST_ID:
        path = tmp_path / "coco" / f"coco_pope_{category}.json"
        path.write_text(lines(label(i) | {"label": LABELS[i]} for i in range(4)))
    return tmp_path


def change(path, row, **values):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[row] |= values
    path.write_text(lines(rows))


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("No, there is not", False),
        ("There is not.", False),
        ("Yes. No", True),  # the first sentence only
        ("NO", True),  # not one of the three spellings
        ("No!", True),  # commas go, other marks stay
        ("None", True),
        ("There\nno", True),  # words are parted by spaces alone
        ("", True),
    ],
)
def test_reading_rule(text, yes):
    assert says_yes(text) == yes


def test_items_carry_labels_groups_and_ids(folder):
    items = find_task("pope").read(folder)
    assert [item.id for item in items[3:6]] == [4, 10_000_001, 10_000_002]
    assert [item.answers for item in items[:4]] == [("yes",), ("no",), ("yes",), ("no",)]
    assert items[4].group == "random" and items[4].images == ("0.jpg",)
    assert items == find_task("pope").read(folder / "llava_pope_test.jsonl")


def test_hand_computed_numbers(folder):
    task = find_task("pope")
    items = task.read(folder)
    # labels yes no yes no; adversarial: one hit, one false alarm, one miss, one rejection
    answers = ["Yes", "Yes", "No", "No"] + ["Yes", "No", "Yes", "No"] + ["No", "No", "Yes", "No"]
    scores = task.score(items, {i.id: text for i, text in zip(items, answers, strict=True)})
    adversarial = {k.split("/")[1]: v for k, v in scores.items() if k.startswith("adversarial/")}
    assert adversarial == {
        "accuracy": 50,
        "precision": 50,
        "recall": 50,
        "f1": 50,
        "yes_ratio": 50,
    }
    assert scores["random/f1"] == 100
    # popular: one hit, one miss: precision 1, recall 1/2, F1 2/3, a quarter yes
    assert scores["popular/precision"] == 100 and scores["popular/recall"] == 50
    assert scores["popular/f1"] == pytest.approx(200 / 3)
    assert scores["popular/accuracy"] == 75 and scores["popular/yes_ratio"] == 25
    assert scores["f1"] == pytest.approx((50 + 100 + 200 / 3) / 3)


def test_never_yes_has_f1_of_zero(folder):
    task = find_task("pope")
    items = task.read(folder)
    assert task.score(items, {item.id: "no" for item in items})["f1"] == 0


def test_missing_answer_is_yes_and_shifts_nothing(folder):
    task = find_task("pope")
    items = task.read(folder)
    texts = {item.id: item.answers[0] for item in items}
    del texts[2]  # its label is no
    scores = task.score(items, texts)
    assert scores["adversarial/accuracy"] == 75 and scores["popular/f1"] == 100
    assert scores == task.score(items, texts | {2: ""})


def test_misspelt_question_is_paired_all_the_same(folder):
    change(folder / "llava_pope_test.jsonl", 2, text=f"Is there a thing2 in the imange?\n{TAIL}")
    assert len(find_task("pope").read(folder)) == 12


def test_bad_files(folder):
    task = find_task("pope")
    popular = folder / "coco/coco_pope_popular.json"
    good = popular.read_text()
    change(popular, 1, image="9.jpg")
    with pytest.raises(DataError, match=r"popular\.json: row 1: is about 9\.jpg .*\(row 9\)"):
        task.read(folder)
    popular.write_text(good)
    change(popular, 3, text="Is there a thing0 in the image?")
    with pytest.raises(DataError, match=r"row 3: is about 1\.jpg"):
        task.read(folder)
    popular.write_text(good + good)
    with pytest.raises(DataError, match=r"8 labels for 4 questions; take .*e3e3926"):
        task.read(folder)
    popular.write_text(good)
    change(popular, 0, label="maybe")
    with pytest.raises(DataError, match=r"popular\.json: row 0: .*maybe"):
        task.read(folder)
    popular.unlink()
    with pytest.raises(UsageError, match=r"coco_pope_popular\.json: not found; take"):
        task.read(folder)


def test_bad_questions(folder):
    task = find_task("pope")
    path = folder / "llava_pope_test.jsonl"
    good = path.read_text()
    change(path, 5, question_id=1)
    with pytest.raises(DataError, match="row 5: id 1 is there twice"):
        task.read(folder)
    path.write_text(good)
    change(path, 5, category="default")
    with pytest.raises(DataError, match="row 5: category 'default' is none of adversarial"):
        task.read(folder)
    path.write_text("".join(good.splitlines(True)[:8]))
    with pytest.raises(DataError, match="no question of category 'popular'"):
        task.read(folder)
    path.write_text(good + "{broken\n")
    with pytest.raises(DataError, match=r"row 12: .*is this the file"):
        task.read(folder)
    path.unlink()
    with pytest.raises(UsageError, match=r"llava_pope_test\.jsonl: No such file"):
        task.read(folder)


@pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"{FIXTURE} is not there")
def test_small_world_files():
    task = find_task("pope")
    items = task.read(FIXTURE)
    scores = task.score(items, {item.id: item.answers[0].capitalize() for item in items})
    assert len(items) == 12 and scores["f1"] == 100 and scores["random/yes_ratio"] == 50
