"""Part files: whole lines count, torn ones do not, and every process sees the others' units."""

from __future__ import annotations

import json

import pytest

from llava.eval.records import Head, Parts, Record, Unit, read_attacks, write_answers, write_attacks
from tests.faults import faulty_os, in_child

HEAD = Head("toy", "m", 3, "ABC", "QWE", all_orders=True, until_failure=False)


def unit(number, text="A"):
    record = Record(
        question_id=f"q{number}",
        row=number,
        group="g",
        counted=True,
        symbols="AB",
        order=[0, 1],
        prompt="Which?\nÄ",
        options={"A": 0, "B": 1},
        gold=["B"],
        text=text,
        logits=[0.1, -2.5],
        same=None,
    )
    return Unit(number, 0.5, 10, [record])


def test_units_of_all_processes_are_seen(tmp_path):
    first, second = Parts(tmp_path, 0), Parts(tmp_path, 1)
    assert first.refresh() == set()
    first.add([unit(0)])
    second.add([unit(2)])
    assert first.refresh() == second.refresh() == {0, 2}
    second.add([unit(1)])
    assert first.refresh() == {0, 1, 2} == Parts(tmp_path, 5).refresh()
    assert [first[number] for number in range(3)] == [unit(number) for number in range(3)]


@pytest.mark.parametrize("kept", [0, 1, 30, -2, -1])
def test_a_torn_line_is_dropped_and_does_not_spoil_the_next(tmp_path, kept):
    parts = Parts(tmp_path, 0)
    parts.add([unit(0)])
    size = (tmp_path / "0.jsonl").stat().st_size
    parts.add([unit(1)])
    content = (tmp_path / "0.jsonl").read_bytes()
    (tmp_path / "0.jsonl").write_bytes(content[:size] + content[size:][:kept])
    parts = Parts(tmp_path, 0)
    assert parts.refresh() == {0}
    parts.add([unit(2)])
    parts.add([unit(1)])
    assert parts.refresh() == Parts(tmp_path, 3).refresh() == {0, 1, 2}
    assert parts[1] == unit(1) and parts[2] == unit(2)


@pytest.mark.parametrize("fault", ["kill", "short"])
def test_a_process_that_dies_writing_leaves_whole_units(tmp_path, fault):
    """At every operation of the second of three units."""
    with faulty_os() as calls:
        Parts(tmp_path / "count", 0).add([unit(0)])
    per_unit = len(calls.calls)
    for at in range(per_unit, 2 * per_unit - 1):
        folder = tmp_path / f"at {at}"

        def work(folder=folder, at=at):
            with faulty_os(at, fault):
                parts = Parts(folder, 0)
                for number in range(3):
                    parts.add([unit(number)])

        assert in_child(work) != 0
        parts = Parts(folder, 0)
        done = parts.refresh()
        assert 0 in done and 2 not in done
        assert all(parts[number] == unit(number) for number in done)


def test_of_two_lines_of_a_unit_one_is_used(tmp_path):
    parts = [Parts(tmp_path, rank) for rank in range(2)]
    for part in parts:
        part.add([unit(0)])
    assert parts[0].refresh() == {0} and parts[0][0] == unit(0)


def test_units_of_one_batch(tmp_path):
    Parts(tmp_path, 0).add([unit(0), unit(1)])
    parts = Parts(tmp_path, 0)
    assert parts.refresh() == {0, 1} and [parts[0], parts[1]] == [unit(0), unit(1)]


def test_an_attack_file_gives_its_records_back(tmp_path):
    parts = Parts(tmp_path / "parts", 0)
    for number in (2, 0, 1):
        parts.add([unit(number)])
    parts.refresh()
    write_attacks(tmp_path / "attacks.jsonl", HEAD, parts, 3)
    head, records = read_attacks(tmp_path / "attacks.jsonl")
    assert head == HEAD
    assert list(records) == [unit(number).records[0] for number in range(3)]


def test_answers_are_llavas_lines(tmp_path):
    given = [unit(0, "B").records[0], unit(1).records[0]]
    write_answers(tmp_path / "a.jsonl", zip(given, ("Why?\nÄ", "How?"), strict=True), "llava-7b")
    first, second = map(json.loads, (tmp_path / "a.jsonl").read_text("utf-8").splitlines())
    assert first.pop("answer_id") != second["answer_id"]
    assert first == {
        "question_id": "q0",
        "prompt": "Why?\nÄ",
        "text": "B",
        "model_id": "llava-7b",
        "metadata": {},
    }
