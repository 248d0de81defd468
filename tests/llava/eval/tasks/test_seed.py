"""SEED-Bench: exact letters, per type; the id that the real files have twice."""

from __future__ import annotations

import json

import pytest

from llava.errors import DataError, UsageError
from llava.eval.tasks import find_task

TAIL = "\nAnswer with the option's letter from the given choices directly."


def row(i, options="wxyz"):
    text = "Which?\n" + "\n".join(f"{'ABCD'[k]}. {o}" for k, o in enumerate(options)) + TAIL
    return {"image": f"SEED-Bench-image/{i}", "text": text, "category": "c", "question_id": i}


def entry(i, answer="A", kind=1, data_type="image"):
    return {"question_id": i, "answer": answer, "question_type_id": kind, "data_type": data_type}


@pytest.fixture
def read(tmp_path):
    """Write question rows and annotations; read the folder."""

    def run(rows, entries):
        (tmp_path / "llava-seed-bench.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows)
        )
        annotated = {"questions": entries, "question_type": {"Scene": 1, "Action": 10}}
        (tmp_path / "SEED-Bench.json").write_text(json.dumps(annotated))
        return find_task("seed").read(tmp_path)

    return run


def test_metrics(read):
    items = read(
        [row(7), row(8), row("v0"), row(9)],
        [entry("8", "B"), entry("7", "D"), entry("9"), entry("v0", "C", 10, "video")],
    )
    assert [(i.id, i.gold, i.group) for i in items] == [
        (7, 3, "Scene"),
        (8, 1, "Scene"),
        ("v0", 2, "Action"),
        (9, 0, "Scene"),
    ]
    assert all(i.prompt == i.question.render() for i in items)
    numbers = find_task("seed").score(items, {7: "D", 8: "B. x", "v0": "C"})
    assert list(numbers) == ["total", "image", "video", "type/Scene", "type/Action"]
    third = pytest.approx(100 / 3)
    assert list(numbers.values()) == [50, third, 100, third, 100]


def test_an_id_twice_in_both_files_counts_twice_with_one_answer(read):
    items = read([row(5, "abcd"), row(6), row(5)], [entry("5", "A"), entry("6"), entry("5", "B")])
    assert [i.id for i in items] == [5, 6]
    assert (items[0].question.options, items[0].gold) == (tuple("wxyz"), 1)
    numbers = find_task("seed").score(items, {5: "B", 6: "A"})
    assert numbers["total"] == pytest.approx(200 / 3)


def test_pictures_alone(read):
    items = read([row(1)], [entry("1"), entry("v0", "C", 10, "video")])
    numbers = find_task("seed").score(items, {1: "A"})
    assert numbers == {"total": 100, "image": 100, "type/Scene": 100}


def test_options_that_are_letters_or_equal(read):
    items = read([row(1, "BAAC")], [entry("1", "C")])
    assert (items[0].question.options, items[0].gold) == (tuple("BAAC"), 2)


@pytest.mark.parametrize(
    ("rows", "entries", "message"),
    [
        ([row(1), row(1)], [entry("1")], "id 1 is there 2 times, but 1 times in SEED-Bench.json"),
        ([row(1)], [entry("1"), entry("1")], "id 1 is there 1 times, but 2 times"),
        ([row(1), row(2)], [entry("1")], "id 2 is there 1 times, but 0 times"),
        ([row(1)], [entry("1"), entry("2")], "id 2 is there 0 times, but 1 times"),
        ([row(1)], [entry("1", "E")], "row 0: the answer 'E' is none of its 4 options"),
        ([row(1)], [entry("1", kind=3)], "row 0: SEED-Bench.json has no name for its type 3"),
        ([row(1) | {"text": "Which?"}], [entry("1")], "row 0: no options as lines"),
        ([{"id": 1}], [entry("1")], "row 0: "),
    ],
)
def test_bad_input(read, rows, entries, message):
    with pytest.raises(DataError) as caught:
        read(rows, entries)
    assert "llava-seed-bench.jsonl: " + message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_annotations(tmp_path):
    (tmp_path / "llava-seed-bench.jsonl").write_text(json.dumps(row(1)) + "\n")
    with pytest.raises(UsageError, match="SEED-Bench.json: No such file"):
        find_task("seed").read(tmp_path)


def test_submission(read):
    """Ids as in SEED-Bench.json; of the one that is there twice, two lines."""
    items = read(
        [row(5), row("v0"), row(5)], [entry("5"), entry("v0", data_type="video"), entry("5")]
    )
    content = find_task("seed").submission(items, {5: "A"})["answers_upload.jsonl"]
    assert [json.loads(line) for line in content.splitlines()] == [
        {"question_id": "5", "prediction": "A"},
        {"question_id": "5", "prediction": "A"},
        {"question_id": "v0", "prediction": ""},
    ]
