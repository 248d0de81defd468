"""MMBench: rotations count together, missing options as pandas and LLaVA see them."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path

import pytest
from openpyxl import load_workbook

from llava.errors import DataError, UsageError
from llava.eval.__main__ import main
from llava.eval.tasks import find_task
from llava.eval.tasks.mmbench import workbook

COLUMNS = "index question hint A B C D answer category image".split()
PICTURE = base64.b64encode(b"picture").decode()
TAIL = "\nAnswer with the option's letter from the given choices directly."
FIXTURE = Path(__file__).parents[4] / "mini" / "fixture" / "eval"


def row(index, options="wxyz", answer="A", hint="", image=PICTURE, question="Which?"):
    shown = dict(zip("ABCD", [*options, "", "", ""], strict=False))
    fields = {"index": index, "question": question, "hint": hint, "answer": answer}
    return fields | shown | {"category": "c", "image": image}


@pytest.fixture
def read(tmp_path):
    """Write a table; read it."""

    def run(rows, columns=COLUMNS, name="mmbench"):
        path = tmp_path / "table.tsv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return find_task(name).read(path)

    return run


def test_prompts(read):
    quoted = 'He said "now".\nWhen?'
    items = read([row(1), row(2, "xy", "B", hint="Look:", question=quoted), row(3, hint="NaN")])
    assert items[0].prompt == "Which?\nA. w\nB. x\nC. y\nD. z" + TAIL
    assert items[1].prompt == f"Look:\n{quoted}\nA. x\nB. y{TAIL}"
    assert items[2].prompt == items[0].prompt
    assert [(i.id, i.gold, i.images, i.group) for i in items[:2]] == [
        (1, 0, (b"picture",), "c"),
        (2, 1, (b"picture",), "c"),
    ]
    assert find_task("mmbench").recorded(items[0]) == "Which?\nA. w\nB. x\nC. y\nD. z"
    assert read([row(1)], name="mmbench_cn")[0].prompt.endswith("D. z\n请直接回答选项字母。")


@pytest.mark.parametrize("none", ["", "nan", "None", "NONE", "NA", "N/A", "null"])
def test_options_end_at_the_first_none(read, none):
    items = read([row(1, ["w", "x", none, "z"], "B"), row(2, ["w", "x", "y", none], "A")])
    assert [i.question.options for i in items] == [("w", "x"), ("w", "x", "y")]


def test_none_is_not_every_short_word(read):
    options = ("Na", "no", "None of these", "nil")
    assert read([row(1, options)])[0].question.options == options


def test_a_right_answer_hidden_by_none(read):
    items = read([row(1, ["w", "x", "None", "z"], "D"), row(2, ["w", "x", "y", "None"], "D")])
    assert [(i.gold, i.answers) for i in items] == [(None, ("D",))] * 2
    assert find_task("mmbench").score(items, {1: "A", 2: "D"})["per_row"] == 50


def test_circular_is_strict(read):
    items = read(
        [row(4), row(5), row(1_000_004, answer="B"), row(1_000_005), row(2_000_004, answer="C")]
    )
    texts = {4: "A", 5: "A", 1_000_004: "B", 1_000_005: "A.", 2_000_004: "C"}
    score = find_task("mmbench").score
    assert score(items, texts) == {"circular": 50, "per_row": 80}
    del texts[2_000_004]
    assert score(items, texts) == {"circular": 0, "per_row": 60}


def test_large_pictures_are_shared_and_the_csv_limit_stays(read):
    content = bytes(range(256)) * 4000
    limit = csv.field_size_limit()
    text = base64.b64encode(content).decode()
    items = read([row(1, image=text), row(1_000_001, image=text), row(2_000_001, image="1")])
    assert csv.field_size_limit() == limit
    assert items[0].images == (content,)
    assert items[0].images[0] is items[1].images[0] is items[2].images[0]


def test_options_that_are_letters_or_equal(read):
    item = read([row(1, "CBBA", "C")])[0]
    assert (item.question.options, item.gold) == (tuple("CBBA"), 2)


def test_the_test_split_is_read_but_not_scored(read):
    items = read([row(1)], [c for c in COLUMNS if c != "answer"])
    assert (items[0].gold, items[0].answers) == (None, ())
    with pytest.raises(UsageError, match="no right answers; give mmbench_dev_20230712.tsv"):
        find_task("mmbench").score(items, {1: "A"})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(0), "row 1: id 0 is there twice"),
        (row(1, answer="E"), "row 1: the answer 'E' is none of its 4 options"),
        (row(1, answer=""), "row 1: the answer '' is none of its 4 options"),
        (row(1, "wx", "C"), "row 1: the answer 'C' is none of its 2 options"),
        (row(1, "w"), "row 1: fewer than two options"),
        (row("x"), "row 1: index 'x' is no number"),
        (row(1, image="abc"), "row 1: image is no base64: "),
        (row(1, image="abcd??efgh"), "row 1: image is no base64: "),
        (row(1, image="é"), "row 1: image is no base64: "),
        (row(1, image=""), "row 1: image is empty"),
    ],
)
def test_bad_rows(read, bad, message):
    with pytest.raises(DataError) as caught:
        read([row(0), bad])
    assert "table.tsv: " + message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["\tA", '\t"an open quote\tx\n3\t4\n'])
def test_a_download_that_stopped(tmp_path, end):
    path = tmp_path / "table.tsv"
    path.write_text("\t".join(COLUMNS) + "\n1" + end)
    with pytest.raises(DataError, match="table.tsv: row 0: its number of fields is not .* 10;"):
        find_task("mmbench").read(path)


@pytest.mark.parametrize("content", [b"", b'{"a": 1}\n', b"index,question,A,B,C,D,image\n"])
def test_another_file(tmp_path, content):
    path = tmp_path / "table.tsv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="table.tsv: no column .*; give MMBench's TSV file"):
        find_task("mmbench").read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is this MMBench's TSV file"):
        find_task("mmbench").read(path)
    with pytest.raises(UsageError, match="mmbench_dev_20230712.tsv: No such file"):
        find_task("mmbench").read(tmp_path)


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_the_small_worlds_file(name):
    if not (FIXTURE / name).is_dir():
        pytest.skip(f"the small world is not present: {FIXTURE}")
    items = find_task(name).read(FIXTURE / name)
    right = {i.id: i.question.symbol(i.gold, range(len(i.question.options))) for i in items}
    assert find_task(name).score(items, right) == {"circular": 100, "per_row": 100}
    groups = {i.id % 1_000_000: i.question.options[i.gold] for i in items}
    assert all(i.question.options[i.gold] == groups[i.id % 1_000_000] for i in items)


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_submission(read, name):
    """LLaVA's columns in LLaVA's order; a missing field is an empty cell."""
    columns = "index question hint A B C D answer category image source l2-category comment split"
    rows = [row(1) | {"split": "dev"}, row(1_000_002, "xy", "B", hint="h") | {"split": "dev"}]
    items = read(rows, columns.split(), name)
    content = find_task(name).submission(items, {1: "=A", 7: "B"})[f"{name}.xlsx"]
    sheet = load_workbook(io.BytesIO(content)).active
    assert [[cell.value for cell in line] for line in sheet.rows] == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        [1, "Which?", "w", "x", "y", "z", "=A", "A", "dev"],
        [1_000_002, "Which?", "x", "y", None, None, None, "B", "dev"],
    ]


def test_predictions_for_the_server_are_written_though_nothing_can_be_scored(read, tmp_path):
    read([row(1)], [c for c in COLUMNS if c != "answer"])
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question_id": 1, "text": "B"}\n')
    words = f"score --benchmark mmbench --data {tmp_path}/table.tsv --answers {answers}"
    with pytest.raises(UsageError, match="send the predictions to the benchmark's server"):
        main([*words.split(), "--submission", str(tmp_path / "out")])
    sheet = load_workbook(tmp_path / "out" / "mmbench.xlsx").active
    assert [cell.value for cell in next(sheet.iter_rows(min_row=2))] == [1, "Which?", *"wxyzB"]


def test_cells_come_back():
    rows = [["index", "prediction"], [1, "=1+1"], [2, None], [3, "a\x00b\nc"], [4, "350°F"]]
    sheet = load_workbook(io.BytesIO(workbook(rows))).active
    assert [[cell.value for cell in row] for row in sheet.rows] == [
        ["index", "prediction"],
        [1, "=1+1"],
        [2, None],
        [3, "ab\nc"],
        [4, "350°F"],
    ]
    assert sheet["B2"].data_type == "s" and sheet["A2"].data_type == "n"
