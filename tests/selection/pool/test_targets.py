"""Target tasks: what the YAML may say, and every mistake in one line."""

import json

import pytest

from llava.errors import DataError, UsageError
from selection.pool.targets import read_targets, title_of


def record(i, **more):
    turns = [{"from": "human", "value": f"question {i}"}, {"from": "gpt", "value": "yes"}]
    return {"id": i, "conversations": turns, **more}


@pytest.fixture
def folder(tmp_path):
    kinds = ["count", "colour", "count", "text"]
    (tmp_path / "a.json").write_text(json.dumps([record(i) for i in range(3)]))
    (tmp_path / "b.json").write_text(json.dumps([record(i, kind=k) for i, k in enumerate(kinds)]))
    meta = [record(i, meta={"kind": k}) for i, k in enumerate(kinds)]
    (tmp_path / "meta.jsonl").write_text("\n".join(json.dumps(r) for r in meta))
    return tmp_path


def read(folder, text):
    (folder / "targets.yaml").write_text(text)
    return read_targets(folder / "targets.yaml")


def rows(target):
    return {subtask.name: subtask.rows.tolist() for subtask in target.subtasks}


def test_a_task_is_a_name_and_a_file(folder):
    (target,) = read(folder, "- {name: a, data: a.json}")
    assert (target.name, target.weight, target.images) == ("a", 1.0, None)
    assert rows(target) == {"a": [0, 1, 2]}


def test_tasks_keep_their_order_and_places_are_relative_to_the_file(folder):
    text = "- {name: b, data: b.json, images: pictures, weight: 2}\n- {name: a, data: a.json}"
    first, second = read(folder, text)
    assert (first.name, first.weight, first.images) == ("b", 2.0, str(folder / "pictures"))
    assert second.name == "a"


@pytest.mark.parametrize("file", ["b.json", "meta.jsonl"])
def test_sub_tasks_follow_from_a_key_of_the_records_or_of_their_meta(folder, file):
    (target,) = read(folder, f"- {{name: b, data: {file}, subtasks: kind}}")
    assert rows(target) == {"count": [0, 2], "colour": [1], "text": [3]}


def test_sub_tasks_are_files(folder):
    (target,) = read(folder, "- {name: both, data: [a.json, b.json]}")
    assert rows(target) == {"a": [0, 1, 2], "b": [0, 1, 2, 3]}
    assert [subtask.pool.path.name for subtask in target.subtasks] == ["a.json", "b.json"]


def test_files_divided_by_a_key(folder):
    (target,) = read(folder, "- {name: both, data: [b.json, meta.jsonl], subtasks: kind}")
    assert list(rows(target)) == [
        f"{file}/{kind}" for file in ("b", "meta") for kind in ("count", "colour", "text")
    ]


def test_identity_follows_content_name_and_weight_but_no_place(folder, tmp_path_factory):
    (target,) = read(folder, "- {name: a, data: a.json}")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "other.json").write_bytes((folder / "a.json").read_bytes())
    (moved,) = read(elsewhere, "- {name: a, data: other.json, images: pictures}")
    assert target.identity() == moved.identity()
    (heavier,) = read(folder, "- {name: a, data: a.json, weight: 3}")
    (longer,) = read(folder, "- {name: a, data: b.json}")
    identities = [json.dumps(t.identity()) for t in (target, heavier, longer)]
    assert len(set(identities)) == 3


def test_titles():
    assert title_of("mme", "count") == "mme/count" and title_of("pope", "pope") == "pope"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected `array`"),
        ("[]", "names no task"),
        ("name: a", "Expected `array`"),
        ("- {name: a}", "missing required field `data`"),
        ("- {name: a, data: a.json, wieght: 2}", "unknown field `wieght`"),
        ("- {name: a, data: a.json, weight: heavy}", "Expected `float`"),
        ("- {name: a, data: a.json, weight: 0}", "weight 0: give one above 0"),
        ("- {name: a, data: a.json, weight: .nan}", "weight nan"),
        ("- {name: a, data: []}", "data names no file"),
        ("- {name: a, data: c.json}", "a: no such file"),
        ("- {name: a, data: a.json}\n- {name: a, data: b.json}", "two tasks are called 'a'"),
        ("- {name: [", "while parsing"),
    ],
)
def test_mistakes_are_one_line_with_the_file(folder, text, message):
    with pytest.raises(UsageError) as raised:
        read(folder, text)
    line = str(raised.value)
    assert line.startswith(f"--targets {folder / 'targets.yaml'}: ") and "\n" not in line
    assert message in line


def test_no_such_file(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_targets(tmp_path / "nothing.yaml")


def test_a_record_without_the_key_is_named(folder):
    with pytest.raises(DataError, match="a.json: row 0: has no 'kind'"):
        read(folder, "- {name: a, data: a.json, subtasks: kind}")


def test_unusable_data_is_told_as_for_pools(folder):
    (folder / "c.json").write_text("[]")
    with pytest.raises(DataError, match="c.json"):
        read(folder, "- {name: c, data: c.json}")
