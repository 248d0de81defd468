"""ScienceQA: real items survive reading, answers are read as LLaVA's script reads them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from llava.errors import DataError, UsageError
from llava.eval.tasks import find_task
from llava.eval.tasks.scienceqa import read_letter

SUFFIX = "\nAnswer with the option's letter from the given choices directly."


def record(i, options, gold, image=False):
    text = "Which?\n" + "\n".join(f"{'ABCDE'[k]}. {o}" for k, o in enumerate(options))
    turns = [{"from": "human", "value": "<image>\n" * image + text}, {"from": "gpt", "value": gold}]
    return {"id": i, "conversations": turns} | ({"image": f"{i}/image.png"} if image else {})


@pytest.fixture
def read(tmp_path):
    """Write records and, if given, the ids of the test split; read the folder."""

    def run(records, ids=None):
        (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps(records))
        if ids is not None:
            (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ids}))
        return find_task("sqa").read(tmp_path)

    return run


def test_real_items(shared_data):
    path = shared_data / "llava_val_CQM-A.json"
    records = json.loads(path.read_text())
    items = find_task("sqa").read(path)
    assert Counter(len(i.question.options) for i in items) == {2: 2233, 3: 979, 4: 985, 5: 44}
    assert Counter(i.group for i in items) == {"image": 2097, "text": 2144}
    for item, source in zip(items, records, strict=True):
        asked, answer = (turn["value"] for turn in source["conversations"])
        assert item.prompt == item.question.render() == asked.removeprefix("<image>\n") + SUFFIX
        assert (item.id, "ABCDE"[item.gold]) == (source["id"], answer)
        assert item.images == ((source["image"],) if "image" in source else ())
        assert find_task("sqa").recorded(item) == asked + SUFFIX  # LLaVA counts by its "<image>"
    texts = {i.id: "ABCDE"[i.gold] for i in items}
    assert set(find_task("sqa").score(items, texts).values()) == {100, 0}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", None),
        ("", None),
        ("B. a cat", "B"),
        ("B.", None),
        ("B.a cat", None),
        ("F. a cat", None),
        ("A B", None),
        (" A", None),
        ("b", None),
        ("B is the run-on sentence.", None),
        ("The answer is C.", "C"),
        ("So. The answer is C, I think", "C"),
        ("The answer is C", None),
        ("The answer is Z.", "Z"),
        ("The answer is A. The answer is A.", None),
        ("D. The answer is A.", "D"),
    ],
)
def test_reading_rules(text, letter):
    assert read_letter(text) == letter


def test_metrics(read):
    items = read(
        [
            record("1", ["red", "blue"], "B", image=True),
            record("2", ["red", "blue", "red"], "A", image=True),
            record("3", ["C", "A"], "A"),
            record("4", ["x", "y"], "B"),
        ],
        ids=["4", "3", "2", "1"],
    )
    assert items[1].question.options == ("red", "blue", "red")
    assert items[2].question.options == ("C", "A")
    numbers = find_task("sqa").score(items, {"1": "B. blue", "2": "E", "3": "blue"})
    assert numbers == {"total": 25, "image": 50, "parse_failures": 50}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record("1", "xy", "A"), record("1", "xy", "B")], "row 1: id '1' is there twice"),
        ([record("1", "xy", "C")], "row 0: the answer 'C' is none of its 2 options; give one of A"),
        ([record("1", "xy", "The answer is A.")], "row 0: the answer 'The answer is A.' is none"),
        (
            [
                {
                    "id": "1",
                    "conversations": [
                        {"value": "Context: N/A\nQuestion: Q?\nOptions: (A) x (B) y"},
                        {"value": "The answer is B."},
                    ],
                }
            ],
            "row 0: no options as lines 'A. ...', 'B. ...' (two to ten); take LLaVA's",
        ),
        ([{"id": "1", "conversations": []}], "row 0: 0 turns, but"),
        ([{"question_id": 1, "text": "?"}], "row 0: "),
    ],
)
def test_bad_records(read, records, message):
    with pytest.raises(DataError) as caught:
        read(records)
    assert "llava_test_CQM-A.json: " + message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_split_must_be_whole(read):
    with pytest.raises(DataError, match="has 1 questions, .* 2 in 'test'; '2' is in one only"):
        read([record("1", "xy", "A")], ids=["1", "2"])


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match="llava_test_CQM-A.json: No such file"):
        find_task("sqa").read(tmp_path)


def test_submission_is_what_llavas_script_writes(read):
    task = find_task("sqa")
    items = read(
        [record("1", "xy", "B", image=True), record("2", "xyz", "A"), record("3", "xy", "A")]
    )
    files = task.submission(items, {"1": "B. y", "2": "The answer is D."})
    assert json.loads(files["result.json"]) == {
        "acc": pytest.approx(100 / 3),
        "correct": 1,
        "count": 3,
        "results": {"1": 1, "2": -1, "3": -1},
        "outputs": {"1": "B. y", "2": "The answer is D.", "3": "FAILED"},
    }
    output = json.loads(files["output.jsonl"])
    assert output["correct"] == [
        {
            "question_id": "1",
            "parsed_ans": "B",
            "ground_truth": "B",
            "question": "<image>\nWhich?\nA. x\nB. y" + SUFFIX,
            "pred": "B. y",
            "is_multimodal": True,
        }
    ]
    assert [row["parsed_ans"] for row in output["incorrect"]] == ["D", "FAILED"]
    assert output["incorrect"][0]["question"] == "Which?\nA. x\nB. y\nC. z" + SUFFIX
