"""BoolQ: a passage, a question and two options."""

from __future__ import annotations

import json

import pytest

from llava.errors import DataError, UsageError
from llava.eval.tasks import find_task
from tests.llava.eval.tasks.hub import write

ROWS = [
    {"question": "is ice cold", "title": "Ice", "answer": True, "passage": "Ice\nis cold."},
    {"question": "is ice cold?", "title": "Ice", "answer": False, "passage": "Ice is hot."},
]


def owners(folder, rows):
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def hub(folder, rows):
    rows = [{key: row[key] for key in ("question", "answer", "passage")} for row in rows]
    write(folder / "data" / "validation-00000-of-00001.parquet", rows)
    return folder


@pytest.mark.parametrize("make", [owners, hub])
def test_reading(tmp_path, make):
    items = find_task("boolq").read(make(tmp_path, ROWS))
    assert [(item.id, item.gold, item.images) for item in items] == [(0, 0, ()), (1, 1, ())]
    assert items[0].question.stem == "Ice\nis cold.\nis ice cold?"
    assert items[1].prompt == (
        "Ice is hot.\nis ice cold?\nA. yes\nB. no\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_an_answer_in_words_is_not_read(tmp_path):
    items = find_task("boolq").read(owners(tmp_path, ROWS))
    numbers = find_task("boolq").score(items, {0: "yes", 1: "B"})
    assert numbers == {"accuracy": 50, "parse_failures": 50}


def test_bad_files(tmp_path):
    with pytest.raises(UsageError, match="no dev.jsonl nor validation-"):
        find_task("boolq").read(tmp_path)
    with pytest.raises(DataError, match="row 1: Expected `bool`, got `str`.*answer"):
        find_task("boolq").read(owners(tmp_path, [ROWS[0], ROWS[1] | {"answer": "no"}]))
