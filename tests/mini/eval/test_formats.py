"""The benchmarks' files, read back as their own tools would."""

from __future__ import annotations

import base64
import csv
import io
import json

import pytest
from PIL import Image

from mini.eval.formats import MMBENCH_COPY, evaluation_files
from mini.eval.items import Choice, EvalSets, Open, Probe
from mini.render import SIZE, open_png, png


def _picture(n: int) -> bytes:
    return png(Image.new("RGB", (SIZE, SIZE), (n, 50, 90)))


@pytest.fixture(scope="module")
def sets() -> EvalSets:
    zh = ("问？", ("甲", "乙", "丙", "丁"))
    options = ("w", "x", "y", "z")
    mcq = [
        Choice(f"mcq_{i}", "c" if i < 3 else "d", f"Q{i}?", options, i % 4, _picture(i), "", zh)
        for i in range(6)
    ]
    mixed = [
        Choice("1", "language science", "W?", ("a", "b", "c"), 2, None, "So it is."),
        Choice("2", "social science", "K?", options, 1, _picture(9)),
    ]
    yesno = [
        Probe("random", "apple", True, _picture(1)),
        Probe("random", "dog", False, _picture(1)),
    ]
    yesno += [Probe("popular", "cat", False, _picture(2))]
    open_ended = [Open("open_0", "word", "Read.", "ox", _picture(3))]
    return EvalSets(
        mcq, mixed, yesno, open_ended, [Choice("u", "unseen", "G?", options, 3, _picture(4))]
    )


@pytest.fixture(scope="module")
def files(sets) -> dict[str, bytes]:
    return evaluation_files(sets)


def _jsonl(raw: bytes) -> list[dict]:
    return [json.loads(line) for line in raw.splitlines()]


def test_scienceqa(files):
    records = json.loads(files["scienceqa/llava_test_CQM-A.json"])
    assert records[0] == {
        "id": "1",
        "conversations": [
            {"from": "human", "value": "Context: So it is.\nW?\nA. a\nB. b\nC. c"},
            {"from": "gpt", "value": "C"},
        ],
    }
    assert records[1]["image"] == "2/image.png"
    assert records[1]["conversations"][0]["value"] == "<image>\nK?\nA. w\nB. x\nC. y\nD. z"
    assert files["scienceqa/images/test/2/image.png"] == _picture(9)
    problems = json.loads(files["scienceqa/problems.json"])
    assert json.loads(files["scienceqa/pid_splits.json"])["test"] == ["1", "2"] == list(problems)
    assert problems["1"]["choices"][problems["1"]["answer"]] == "c"
    assert problems["1"]["image"] is None and problems["2"]["image"] == "image.png"


def test_seed_bench(files):
    asked = _jsonl(files["seed_bench/llava-seed-bench.jsonl"])
    notes = json.loads(files["seed_bench/SEED-Bench.json"])
    assert asked[1]["text"] == (
        "Q1?\nA. w\nB. x\nC. y\nD. z\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [type(entry["question_id"]) for entry in asked] == [int] * 6
    assert all(f"seed_bench/{entry['image']}" in files for entry in asked)
    assert "." not in asked[0]["image"]
    names = {number: name for name, number in notes["question_type"].items()}
    for entry, note in zip(asked, notes["questions"], strict=True):
        assert note["question_id"] == str(entry["question_id"]) and note["data_type"] == "image"
        assert names[note["question_type_id"]] == entry["category"]
        assert note["answer"] == "ABCD"[entry["question_id"] % 4]
        assert f"\nC. {note['choice_c']}\n" in entry["text"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mmbench/mmbench_dev_20230712.tsv", {"w", "x", "y", "z"}),
        ("mmbench_cn/mmbench_dev_cn_20231003.tsv", {"甲", "乙", "丙", "丁"}),
    ],
)
def test_mmbench_copies_are_circular(name, options, files, sets):
    rows = list(csv.DictReader(io.StringIO(files[name].decode()), delimiter="\t"))
    assert list(rows[0])[:2] == ["index", "question"] and list(rows[0])[-1] == "split"
    indices = [int(row["index"]) for row in rows]
    assert indices == sorted(indices) and len(rows) == 12
    for row in rows:
        base, turn = int(row["index"]) % MMBENCH_COPY, int(row["index"]) // MMBENCH_COPY
        first = rows[base]
        assert {row[letter] for letter in "ABCD"} == options
        assert row[row["answer"]] == first[first["answer"]]  # the text stays, the letter moves
        assert row["A"] == first["ABCD"[turn]]
        assert row["image"] == first["image"]
    image = open_png(base64.b64decode(rows[1]["image"]))
    assert abs(image.getpixel((40, 40))[0] - 2) <= 2  # JPEG of the third question's picture


def test_pope_pairs_by_order_within_a_category(files):
    asked = _jsonl(files["pope/llava_pope_test.jsonl"])
    assert [entry["question_id"] for entry in asked] == [10_000_001, 10_000_002, 20_000_001]
    assert asked[0]["text"] == (
        "Is there an apple in the image?\nAnswer the question using a single word or phrase."
    )
    for category in ("adversarial", "random", "popular"):
        labels = _jsonl(files[f"pope/coco/coco_pope_{category}.json"])
        questions = [entry for entry in asked if entry["category"] == category]
        for label, question in zip(labels, questions, strict=True):
            assert label["image"] == question["image"]
            assert question["text"].startswith(label["text"])
    assert [x["label"] for x in _jsonl(files["pope/coco/coco_pope_random.json"])] == ["yes", "no"]
    assert len([name for name in files if name.startswith("pope/val2014/")]) == 2


def test_llava_json_of_the_choices_in_both_languages(files):
    en, zh = (json.loads(files[f"mcq_{language}.json"]) for language in ("en", "cn"))
    for record, twin in zip(en, zh, strict=True):
        assert record["id"] == twin["id"] and record["image"] == twin["image"]
        assert record["conversations"][1] == twin["conversations"][1]
        assert record["image"] in files
    assert en[5]["conversations"][0]["value"] == "<image>\nQ5?\nA. w\nB. x\nC. y\nD. z"
    assert zh[0]["conversations"][0]["value"].endswith("\nD. 丁")
    for name in ("unseen/unseen.json", "open_vqa/open_vqa.json"):
        assert all(record["image"] in files for record in json.loads(files[name]))
