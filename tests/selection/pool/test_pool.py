"""Laws of the pool: exact records, position-independent identity, one clear line for bad files."""

from __future__ import annotations

import hashlib
import json
import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import DataError, UsageError
from llava.records import Turn
from selection.pool import pool as pool_module
from selection.pool.pool import MAX_RECORD_BYTES, Pool, source_of


def record(question="What?\n<image>", answer="A cat.", **keys):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": 1, "image": "coco/train2017/1.jpg", "conversations": turns} | keys


def text_only(**keys):
    sample = record(**keys)
    del sample["image"]
    return sample


def write(path, records, **options):
    path.write_text(json.dumps(records, **options), encoding="utf-8")
    return path


def opened(tmp_path, records, **options):
    return Pool.open(write(tmp_path / "pool.json", records, **options))


VARIED = [
    record(id=7),
    record(id="7"),
    record(
        id="000000123456", question="Ünïcödé 🐈\u2028 <image>", extra={"deep": [1, {"a": None}]}
    ),
    text_only(id="wgByO4Y_0", model=""),
    {"conversations": record()["conversations"]},
    record(id=7, answer='quote " and \\ and \n'),
    record(id=None, image=None),
]


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}, {"indent": "\t"}])
def test_raw_is_the_record_as_it_stands_in_the_file(tmp_path, options):
    pool = opened(tmp_path, VARIED, **options)
    text = pool.path.read_bytes()
    assert [json.loads(pool.raw(row)) for row in range(len(pool))] == VARIED
    for row in range(len(pool)):
        assert text[pool.starts[row] : pool.ends[row]] == pool.raw(row)
        assert pool.raw(row)[:1] + pool.raw(row)[-1:] == b"{}"
    assert pool.sha256 == hashlib.sha256(text).hexdigest()


def test_lines_and_list_are_the_same_pool(tmp_path):
    listed = opened(tmp_path, VARIED)
    lines = tmp_path / "pool.txt"  # told apart by content, not by name
    body = "\n\n".join(json.dumps(sample) for sample in VARIED)
    lines.write_text(f"\ufeff  {body}  \r\n\n", encoding="utf-8")
    pool = Pool.open(lines)
    assert [pool.raw(row) for row in range(len(pool))] == [
        json.dumps(sample).encode() for sample in VARIED
    ]
    assert np.array_equal(pool.uids, listed.uids) and list(pool.sources) == list(listed.sources)
    assert pool.duplicate_ids == listed.duplicate_ids and pool.digest() == listed.digest()


def test_uid_depends_on_content_and_not_on_place_or_layout(tmp_path):
    first = opened(tmp_path, VARIED)
    order = [3, 6, 0, 5, 1, 4, 2]
    second = opened(tmp_path, [VARIED[i] for i in order], indent=1)
    assert [second.uid(row) for row in range(7)] == [first.uid(i) for i in order]
    assert second.digest(np.argsort(order)) == first.digest()
    assert second.digest() != first.digest()


def test_every_part_of_the_identity_changes_the_uid(tmp_path):
    variants = [
        record(),
        record(id="1"),
        record(id=2),
        record(image="coco/train2017/2.jpg"),
        text_only(),
        record(question="What?"),
        record(answer="A dog."),
        {"image": record()["image"], "conversations": record()["conversations"]},
    ]
    pool = opened(tmp_path, [*variants, record(source="elsewhere", note=1)])
    assert len({pool.uid(row) for row in range(len(variants))}) == len(variants)
    assert pool.uid(len(variants)) == pool.uid(0)  # keys the model never sees do not count


def test_uid_never_changes_between_versions(tmp_path):
    """Stores and published subsets name samples by uid: this value is frozen."""
    assert opened(tmp_path, [record()]).uid(0) == "6fb52c6081a52e4f4913fe99b5b099a5"


def test_duplicate_ids_are_counted_and_kept(tmp_path):
    ids = [7, "7", 7, "a", "a", "a", None, None, -1, -2, 1, True]
    pool = opened(tmp_path, [record(id=i) for i in ids])
    assert len(pool) == len(ids)
    assert pool.duplicate_ids == 3  # one 7 and two "a"; absent ids are no duplicates
    assert [pool.id(row) for row in range(6)] == ids[:6]


BAD = {
    "image list": record(image=["a.jpg"]),
    "image number": record(image=3),
    "no conversations": {"id": 1},
    "no turns": record(conversations=[]),
    "unknown role": record(conversations=[{"from": "system", "value": "x"}]),
    "twice human": record(conversations=[{"from": "human", "value": "x"}] * 2),
    "turn without text": record(conversations=[{"from": "human"}]),
    "value is a number": record(conversations=[{"from": "human", "value": 1}]),
    "too many turns": record(conversations=record()["conversations"] * 5001),
    "a list": [1, 2],
    "a string": "text",
    "null": None,
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("lines", [False, True])
def test_bad_record_is_listed_and_harms_no_other(tmp_path, kind, lines):
    samples = [record(id=0), record(id=1), BAD[kind], text_only(id=3)]
    path = tmp_path / "pool"
    dumped = [json.dumps(sample) for sample in samples]
    path.write_text("\n".join(dumped) if lines else f"[{','.join(dumped)}]")
    pool = Pool.open(path)
    assert list(pool.bad) == [2] and "\n" not in pool.bad[2] and len(pool.bad[2]) > 10
    assert pool.raw(2) == dumped[2].encode() and len(set(map(pool.uid, range(4)))) == 4
    assert pool.has_image.tolist() == [True, True, False, False]
    with pytest.raises(DataError, match="row 2: "):
        pool.record(2)
    assert [pool.record(row).id for row in (0, 1, 3)] == [0, 1, 3]
    alone = opened(tmp_path, [samples[i] for i in (0, 1, 3)])
    assert np.array_equal(pool.uids[[0, 1, 3]], alone.uids)


def test_invalid_utf8_is_a_bad_record(tmp_path):
    path = write(tmp_path / "pool.json", [record(), record(answer="XY")])
    path.write_bytes(path.read_bytes().replace(b"XY", b"\xff\xfe"))
    assert list(Pool.open(path).bad) == [1]


@pytest.mark.parametrize("lines", [False, True])
def test_record_size_is_bounded(tmp_path, lines):
    """P24: a giant line is listed as bad without being decoded."""
    small, turns = json.dumps(record()), '{"from":"human","value":"x"},' * 10**6
    giants = [
        json.dumps(record(answer="x" * MAX_RECORD_BYTES)),
        json.dumps(record(conversations=["TURNS"])).replace('"TURNS"', turns[:-1]),
    ]
    path = tmp_path / "pool"
    rows = [small, *giants, json.dumps(record(id=3))]
    path.write_text("\n".join(rows) if lines else f"[{','.join(rows)}]")
    pool = Pool.open(path)
    assert list(pool.bad) == [1, 2]
    assert all(f"more than {MAX_RECORD_BYTES}" in reason for reason in pool.bad.values())
    assert pool.id(1) is None and pool.id(3) == 3
    assert pool.uid(1) != pool.uid(2)


FATAL = {
    "empty file": (b"", "empty"),
    "blank file": (b" \n\n", "empty"),
    "empty list": (b"[ ]", "empty"),
    "object": (b'{"data": [{"id": 1}]}', "one JSON object, not a list"),
    "object on several lines": (b'{\n "data": []\n}\n', "one JSON object, not a list"),
    "string": (b'"text"', "one JSON string, not a list"),
    "number": (b"17\n", "one JSON value, not a list"),
    "web page": (b"<!DOCTYPE html><html>", "<!DOCTYPE html>"),
    "gzip": (b"\x1f\x8b\x08\x00", "neither a JSON list nor JSON lines"),
    "cut list": (b'[{"id": 1}, {"id": 2}, {"id": 3, "x": [', "in the middle of row 2"),
    "trailing comma": (b'[{"id": 1},]', "row 1, byte 11"),
    "missing comma": (b'[{"a": ",[{"}, {"id": 1} {"id": 2}]', "row 1, byte 25"),
    "NaN": (b'[{"id": 1}, {"id": NaN}]', "row 1, byte 19"),
    "two lists": (b"[{}][{}]", "trailing characters"),
    "deep nesting": (b'[{}, {"x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}]", "row 1, byte"),
    "no usable record": (b'[{"a": 1}, {"b": 1}]', "no record is usable; row 0: "),
    "line that is no JSON": (b'{"id": 1}\n\n{"id": 2\n', "line 3: not JSON"),
}


@pytest.mark.parametrize("kind", FATAL)
def test_unusable_file_gets_one_clear_line(tmp_path, kind):
    content, expected = FATAL[kind]
    path = tmp_path / "pool.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        Pool.open(path)
    message = str(caught.value)
    assert expected in message and message.startswith(f"{path}: ") and "\n" not in message
    assert caught.value.exit_code == 65 and len(message) < 400


def test_path_that_is_no_file(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UsageError, match=str(path)):
            Pool.open(path)
    with pytest.raises(UsageError, match="limit"):
        Pool.open(write(tmp_path / "pool.json", [record()]), limit=0)


def test_limit_takes_the_first_records(tmp_path):
    path = write(tmp_path / "pool.json", VARIED)
    whole, part = Pool.open(path), Pool.open(path, limit=3)
    assert len(part) == 3 and np.array_equal(part.uids, whole.uids[:3])
    assert part.sha256 == whole.sha256
    assert len(Pool.open(path, limit=100)) == len(VARIED)


def test_chunk_borders_change_nothing(tmp_path, monkeypatch):
    rng = random.Random(0)
    samples = [
        record(id=i, answer="x" * rng.randrange(300), source=f"s{i % 3}") for i in range(200)
    ]
    samples[50] = record(conversations=[])
    whole = opened(tmp_path, samples)
    for size in (1, 97, 5000):
        monkeypatch.setattr(pool_module, "_CHUNK_BYTES", size)
        pool = Pool.open(whole.path)
        assert np.array_equal(pool.uids, whole.uids) and pool.bad == whole.bad
        assert np.array_equal(pool.sources, whole.sources)


SOURCES = {
    "sharegpt": text_only(),
    "ocrvqa": record(image="ocr_vqa/images/1.jpg"),
    "textcaps": record(image="textvqa/train_images/1.jpg"),
    "gqa": record(image="gqa/images/1.jpg"),
    "vg": record(image="vg/VG_100K_2/1.jpg"),
    "aokvqa": record(question="Answer with the option's letter from the given choices directly."),
    "refcoco": record(question="Provide a short description for this region."),
    "vqav2+okvqa": record(question="Answer the question using a single word or phrase."),
    "llava_instruct": record(question="Why is this funny?"),
    "mine": record(image="mine/1.jpg"),
    "unknown": record(image="1.jpg"),
    "named": record(source="named"),
    "named 2": record(dataset="named 2"),
    "named 3": record(meta={"source": "named 3", "x": 1}),
}


def test_source_rule(tmp_path):
    pool = opened(tmp_path, list(SOURCES.values()))
    assert pool.sources.tolist() == list(SOURCES)
    assert np.array(pool.source_names)[pool.source_codes].tolist() == list(SOURCES)
    assert source_of(pool.record(0), "given") == "given"


def test_source_of_an_absolute_path_is_unknown(tmp_path):
    pool = opened(tmp_path, [record(image="/data/1.jpg")])
    assert pool.sources.tolist() == ["unknown"]


def test_first_human_is_the_question(tmp_path):
    greeted = record(
        conversations=[{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Q?"}]
    )
    pool = opened(tmp_path, [record(), greeted])
    assert [pool.record(row).first_human for row in (0, 1)] == ["What?\n<image>", "Q?"]
    assert pool.record(1).conversations[0] == Turn("gpt", "Hi")


def test_pool_travels_to_spawned_workers(tmp_path):
    pool = opened(tmp_path, VARIED)
    copy = pickle.loads(pickle.dumps(pool))  # noqa: S301
    assert copy.raw(5) == pool.raw(5) and np.array_equal(copy.uids, pool.uids)


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)  # fmt: skip


@given(
    st.lists(st.dictionaries(st.text(max_size=8), json_value, max_size=3), max_size=6),
    st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=6),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
)
def test_json_round_trip(tmp_path_factory, extras, texts, indent, ascii_only):
    """P1: whatever a record holds, its bytes come back and parse to the same value."""
    samples = [
        {**extra, **record(id=i, question=text)}
        for i, (extra, text) in enumerate(zip(extras + [{}] * 6, texts, strict=False))
    ]
    folder = tmp_path_factory.mktemp("pool")
    pool = opened(folder, samples, indent=indent, ensure_ascii=ascii_only)
    assert not pool.bad and len(pool) == len(samples)
    assert [json.loads(pool.raw(row)) for row in range(len(pool))] == samples
    assert [pool.record(row).first_human for row in range(len(pool))] == texts[: len(pool)]
