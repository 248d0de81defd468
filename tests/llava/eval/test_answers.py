"""Answer files as they are found: merged, torn, repeated, with ids of another type."""

from __future__ import annotations

import json

import pytest

from llava.errors import DataError, UsageError
from llava.eval.answers import match, read_answers
from llava.eval.tasks.base import Item, Task


class Asked(Task):
    """Two questions a picture, told apart by the prompt, as in MME."""

    def item_id(self, question_id, prompt):
        if not prompt:
            raise DataError("prompt '' has no known layout; give the question")
        return f"{question_id} {prompt}"


def read(path, task=None):
    return read_answers(path, task or Task())


def record(question_id, text, **other):
    return json.dumps({"question_id": question_id, "prompt": "Which?", "text": text} | other)


@pytest.fixture
def written(tmp_path):
    def write(*lines):
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write


def items(*ids):
    return [Item(id=i, prompt="Which?") for i in ids]


def test_a_line_of_original_llava(written):
    other = {"answer_id": "jwTZ7aUXrj2AkB", "model_id": "llava-v1.5-13b", "metadata": {}}
    answers = read(written(record("4", "A", **other), "", record("5", "", **other)))
    assert answers.texts == {"4": "A", "5": ""}
    assert answers.repeated == ()


def test_shards_put_together_with_items_in_their_own_order(written):
    lines = [record(i, f"text {i}") for i in (4, 5, 1, 2, 3)]
    matched = match(read(written(*lines)), items(1, 2, 3, 4, 5))
    assert matched.texts == {i: f"text {i}" for i in range(1, 6)}
    assert matched.missing == matched.unknown == ()


def test_the_last_record_of_an_id_counts(written):
    """As in `{line['question_id']: line for line in ...}`; SEED has one id twice."""
    answers = read(written(record(1, "A"), record(2, "B"), record("1", "C")))
    assert answers.texts == {"1": "C", "2": "B"}
    assert answers.repeated == ("1",)


def test_questions_that_share_an_id(written):
    lines = [record(1, "yes", prompt="Red?"), record(1, "no", prompt="Big?"), record(2, "no")]
    answers = read(written(*lines), Asked())
    matched = match(answers, items("1 Big?", "1 Red?", "1 Old?"))
    assert matched.texts == {"1 Big?": "no", "1 Red?": "yes"}
    assert (answers.repeated, matched.missing) == ((), ("1 Old?",))


def test_a_prompt_of_no_known_layout(written):
    path = written(record(1, "yes"), record(1, "yes", prompt=""))
    with pytest.raises(DataError, match="row 1: prompt '' has no known layout; give"):
        read(path, Asked())


def test_ids_of_another_type(written):
    answers = read(written(record(12, "A"), record("v0", "B"), record("13", "C")))
    matched = match(answers, items("12", "v0", 13))
    assert matched.texts == {"12": "A", "v0": "B", 13: "C"}
    assert matched.missing == ()


def test_a_number_written_otherwise_is_another_id(written):
    matched = match(read(written(record("012", "A"), record(3, "B"))), items(12, 3))
    assert matched.missing == (12,)
    assert matched.unknown == ("012",)


def test_missing_and_unknown_are_named(written):
    matched = match(read(written(record(2, "A"), record(9, "B"))), items(1, 2, 3))
    assert matched.texts == {2: "A"}
    assert matched.missing == (1, 3)
    assert matched.unknown == ("9",)


def test_another_benchmarks_answers(written):
    answers = read(written(record("a", "A"), record("b", "B")))
    with pytest.raises(DataError, match="no item .* first id is 'a', the benchmark's 7; "):
        match(answers, items(7))


@pytest.mark.parametrize(
    "line",
    [
        '{"question_id": 2, "te',
        record(2, "B") + record(3, "B"),
        '{"question_id": 2}',
        '{"text": "B"}',
        record(2, None),
        record(2, 5),
        record(None, "B"),
        record(True, "B"),
        record(2.5, "B"),
        "[1]",
        "B",
    ],
)
def test_a_bad_line_is_named(written, line):
    with pytest.raises(DataError, match=r"answers\.jsonl: row 1: .*a record is one line") as error:
        read(written(record(1, "A"), line, record(3, "A")))
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"question_id": 1, "text": "A"}\n{"question_id": 2, "text": "\xff"}\n')
    with pytest.raises(DataError, match="row 1: "):
        read(path)


def test_no_file_and_no_records(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "answers.jsonl")
    (tmp_path / "answers.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match="expected a JSON list of records, or one record a line"):
        read(tmp_path / "answers.jsonl")
