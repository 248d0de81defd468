"""A-OKVQA: the owners' JSON and Hugging Face's parquet are the same questions."""

from __future__ import annotations

import json

import pytest

from llava.errors import DataError, UsageError
from llava.eval.tasks import find_task
from tests.llava.eval.tasks.hub import picture, write

OPTIONS = ["cab", "train", "C", "cab"]
PROMPT = (
    "What does he await?\nA. cab\nB. train\nC. C\nD. cab\n"
    "Answer with the option's letter from the given choices directly."
)


def question(number, options=OPTIONS, gold=0, **more):
    return {
        "question_id": f"q{number}",
        "question": "What does he await?",
        "choices": options,
        "correct_choice_idx": gold,
        "difficult_direct_answer": False,
    } | more


def owners(folder, questions):
    rows = [
        q
        | {
            "split": "val",
            "image_id": 299207 + i,
            "direct_answers": ["cab"] * 10,
            "rationales": ["r"],
        }
        for i, q in enumerate(questions)
    ]
    (folder / "aokvqa_v1p0_val.json").write_text(json.dumps(rows))
    return folder


def hub(folder, questions):
    rows = [
        q | {"image": picture(b"jpeg%d" % i), "direct_answers": "['cab']", "rationales": ["r"]}
        for i, q in enumerate(questions)
    ]
    write(folder / "data" / "validation-00000-of-00001-0b2f.parquet", rows, ("image",))
    return folder


@pytest.mark.parametrize(
    ("make", "images"),
    [
        (owners, [("000000299207.jpg",), ("000000299208.jpg",)]),
        (hub, [(b"jpeg0",), (b"jpeg1",)]),
    ],
)
def test_reading(tmp_path, make, images):
    items = find_task("aokvqa").read(make(tmp_path, [question(0), question(1, gold=2)]))
    assert [item.id for item in items] == ["q0", "q1"]
    assert [item.gold for item in items] == [0, 2]
    assert [item.images for item in items] == images
    assert items[0].prompt == items[0].question.render() == PROMPT


def test_scores_and_submission(tmp_path):
    """Options of equal text are right together; an option that is a letter is an option."""
    task = find_task("aokvqa")
    items = task.read(owners(tmp_path, [question(i, gold=g) for i, g in enumerate((0, 2, 1, 1))]))
    texts = {"q0": "D", "q1": " C\n", "q2": "B. train"}
    assert task.score(items, texts) == {"accuracy": 50, "parse_failures": 50}
    files = task.submission(items, texts)
    assert json.loads(files["predictions_val-mc.json"]) == {"q0": "cab", "q1": "C"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (question(0, gold=4), "row 1: correct_choice_idx 4 is none of its 4 options; give 0 to 3"),
        (question(0, gold=-1), "row 1: correct_choice_idx -1 is none of its 4 options"),
        (question(0, options=["x"]), "row 1: 1 options, but a lettered question has 2 to 10"),
        (question(0, options=list("abcdefghijk")), "row 1: 11 options, but a lettered question"),
        (question(9), "row 1: id 'q9' is there twice"),
    ],
)
@pytest.mark.parametrize("make", [owners, hub])
def test_bad_rows(tmp_path, make, bad, message):
    with pytest.raises(DataError) as caught:
        find_task("aokvqa").read(make(tmp_path, [question(9), bad]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_picture(tmp_path):
    write(
        tmp_path / "validation-00000-of-00001.parquet",
        [question(0) | {"image": picture(None)}],
        ("image",),
    )
    with pytest.raises(DataError, match="row 0: neither image_id nor a picture"):
        find_task("aokvqa").read(tmp_path)


def test_the_test_split_has_no_answers(tmp_path):
    row = question(0)
    del row["correct_choice_idx"]
    owners(tmp_path, [row])
    with pytest.raises(DataError, match="row 0: .*`correct_choice_idx`.*; is this the file"):
        find_task("aokvqa").read(tmp_path)
    with pytest.raises(UsageError, match="no aokvqa_v1p0_val.json nor validation-"):
        find_task("aokvqa").read(tmp_path / "..")
