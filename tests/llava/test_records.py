"""Records one by one and as files: what is read, and one clear line for what cannot be."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from llava.errors import DataError, UsageError
from llava.records import MAX_CHARACTERS, decode_record, load_records, raw_records

ANSWER, TEXT = {"from": "gpt", "value": "no"}, {"from": "human", "value": "red?"}


def raw(**keys: object) -> bytes:
    return json.dumps({"conversations": [TEXT, ANSWER], **keys}).encode()


def test_record_keeps_what_matters() -> None:
    record = decode_record(raw(id=7, image="a/b.jpg", model="", score=[{}]), "f: row 0")
    assert (record.id, record.image, record.has_image) == (7, "a/b.jpg", True)
    assert record.turns == [("human", "red?"), ("gpt", "no")]
    for keys in ({"id": "140031996X"}, {"id": None}, {}, {"image": None}):
        assert not decode_record(raw(**keys), "f: row 0").has_image
    assert decode_record(raw(image=""), "f: row 0").has_image  # a key is there; opening it fails


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (raw(image=["a.jpg"]), "got `array` - at `$.image`; image is one relative path"),
        (raw(image=3), "got `int` - at `$.image`"),
        (raw(image=True), "got `bool` - at `$.image`"),
        (raw(conversations=[]), "no question"),
        (raw(conversations=[ANSWER]), "no question"),
        (raw(conversations="x"), "`$.conversations`; a record is"),
        (raw(conversations=[TEXT, TEXT]), "turn 1 is from 'human' where 'gpt' belongs"),
        (raw(conversations=[{"from": "user", "value": "x"}]), "turn 0 is from 'user'"),
        (raw(conversations=[{"from": "human"}]), "missing required field `value`"),
        (raw(conversations=[{"from": "human", "value": None}]), "`$.conversations[0].value`"),
        (b'{"id": 1}', "missing required field `conversations`"),
        (b"[1, 2]", "Expected `object`, got `array`"),
        (b'{"conversations": [', "truncated"),
        (b'{"conversations": [], "x": ' + b"[" * 100_000, "recursion"),
        (raw().replace(b"red?", b"\xff"), "can't decode byte 0xff"),
        (raw(conversations=[{"from": "human", "value": "x" * (MAX_CHARACTERS + 1)}]), "split it"),
    ],
)
def test_bad_records_are_one_clear_line(content: bytes, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        decode_record(content, "pool.json: row 3")
    message = str(caught.value)
    assert message.startswith("pool.json: row 3: ") and reason in message
    assert "\n" not in message and len(message) < 400


def test_files_as_list_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    rows = [raw(id=1), raw(id="é🙂", image="x.png")]
    path.write_bytes(b"\xef\xbb\xbf [" + b",\n ".join(rows) + b"]\n")
    assert [r.id for r in load_records(path)] == [1, "é🙂"]
    path.write_bytes(b"\n".join(rows) + b"\n\n")
    assert [r.id for r in load_records(path)] == [1, "é🙂"]
    path.write_bytes(rows[0] + b"\n{broken\n")
    with pytest.raises(DataError, match="pool: row 1: JSON is malformed"):
        load_records(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"not json", b'"x"', b"[{}", b"[1,", b"[" * 100_000]
)
def test_unusable_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pool.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="pool.json: "):
        load_records(path)
    with pytest.raises(UsageError, match="No such file"):
        raw_records(tmp_path / "none.json")


def test_a_damaged_list_is_named_with_row_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    path.write_bytes(b"[" + raw(id=1) + b", " + raw(id=2)[:-1] + b"]")
    with pytest.raises(DataError, match=r"pool.json: row 1, byte \d+: not JSON"):
        load_records(path)


def test_records_come_as_they_stand_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "questions"
    rows = [b'{"a":  1}', b'{ "b" : [1, {"c": "],[{"}]}', b"[3]", '"é, \\""'.encode()]
    path.write_bytes(b"\xef\xbb\xbf [" + b" ,\n".join(rows) + b" ]\n")
    assert list(raw_records(path)) == rows
    path.write_bytes(b"\n" + b"\r\n\n".join(rows) + b"  ")
    assert list(raw_records(path)) == rows


def test_one_object_alone_is_a_record_or_another_layout(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b'{"question_id": 1}\n')
    assert list(raw_records(path)) == [b'{"question_id": 1}']
    with pytest.raises(DataError, match="is one JSON object, not a list of records"):
        load_records(path)
    path.write_bytes(raw(id=3) + b"\n")
    assert [record.id for record in load_records(path)] == [3]


def test_a_pipe_is_read_as_a_file(tmp_path: Path) -> None:
    """`--data <(zcat pool.json.gz)`: nothing that can be mapped into memory."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(raw(id=1) + b"\n" + raw(id=2),))
    writer.start()
    assert [record.id for record in load_records(path)] == [1, 2]
    writer.join()
