"""Question files in parquet: found, complete, every bad one a clear line."""

from __future__ import annotations

import msgspec
import pytest

from llava.errors import DataError, UsageError
from llava.eval.tasks.files import BATCH, Picture, read_questions
from tests.llava.eval.tasks.hub import picture, write


class Row(msgspec.Struct):
    """A question of an invented benchmark."""

    id: int
    text: str = ""
    image: Picture | None = None


def rows(n, start=0):
    return [
        {"id": i, "text": f"t{i}", "image": picture(b"x" * i), "unused": i}
        for i in range(start, start + n)
    ]


def test_rows_of_all_parts_in_order_with_their_pictures(tmp_path):
    n = BATCH + 7
    write(tmp_path / "data" / "test-00000-of-00002.parquet", rows(n), ("image",), groups=10)
    write(tmp_path / "data" / "test-00001-of-00002.parquet", rows(3, n), ("image",))
    write(tmp_path / "data" / "train-00000-of-00001.parquet", rows(1), ("image",))
    read = [row for _, row in read_questions(tmp_path, Row, "test")]
    assert [row.id for row in read] == list(range(n + 3))
    assert [row.image.content for row in read] == [b"x" * i for i in range(n + 3)]
    assert read[5].text == "t5"


def test_places_name_file_and_row(tmp_path):
    path = write(tmp_path / "test-00000-of-00001-0a1b2c.parquet", rows(2), ("image",))
    assert [where for where, _ in read_questions(tmp_path, Row, "test")] == [
        f"{path}: row 0",
        f"{path}: row 1",
    ]
    assert len(list(read_questions(path, Row, "another split"))) == 2


def test_json_is_read_where_it_is_there(tmp_path):
    write(tmp_path / "test-00000-of-00001.parquet", rows(2), ("image",))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "q.jsonl").write_text('{"id": 7}\n{"id": 8}\n')
    read = read_questions(tmp_path, Row, "test", "q.jsonl", below=("sub",))
    assert [row.id for _, row in read] == [7, 8]


def test_a_missing_part(tmp_path):
    write(tmp_path / "test-00001-of-00003.parquet", rows(1), ("image",))
    write(tmp_path / "test-00002-of-00003.parquet", rows(1), ("image",))
    with pytest.raises(DataError, match="part 0 of 00003 is missing; download it"):
        list(read_questions(tmp_path, Row, "test"))


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match="no q.jsonl nor test-.*.parquet; give the folder"):
        list(read_questions(tmp_path, Row, "test", "q.jsonl"))
    with pytest.raises(UsageError, match="none.parquet: No such file"):
        list(read_questions(tmp_path / "none.parquet", Row, "test"))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b""])
def test_not_parquet(tmp_path, content):
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(DataError, match="parquet: .*; download it again") as caught:
        list(read_questions(tmp_path, Row, "test"))
    assert "\n" not in str(caught.value)


def test_cut_parquet(tmp_path):
    path = write(tmp_path / "test-00000-of-00001.parquet", rows(90), ("image",), groups=10)
    content = bytearray(path.read_bytes())
    content[40:1200] = bytes(1160)
    path.write_bytes(content)
    with pytest.raises(DataError, match="download it again") as caught:
        list(read_questions(tmp_path, Row, "test"))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_another_table(tmp_path):
    path = write(tmp_path / "test-00000-of-00001.parquet", [{"text": "a", "x": 1}])
    with pytest.raises(UsageError, match="no column id; give the benchmark's own"):
        list(read_questions(path, Row, "test"))
    write(path, [{"id": 1, "text": "a"}, {"id": None, "text": "b"}])
    with pytest.raises(DataError, match="row 1: Expected `int`, got `null`"):
        list(read_questions(path, Row, "test"))
