"""Numbers under attack: against a script of a few lines, and refused over a part."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import msgspec
import numpy as np
import pytest

from llava.errors import DataError, UsageError
from llava.eval.__main__ import main
from llava.eval.numbers import collect, compare, summarise
from llava.eval.question import LETTERS, orders
from llava.eval.reading import READINGS
from llava.eval.records import Head, Record, read_attacks

QWER = "QWERTYUIOP"
HEAD = Head("toy", "m", 0, LETTERS, QWER, all_orders=True, until_failure=False)


def draw_records(n, seed=0, accuracy=0.8, all_orders=True):
    """Random replies to `n` questions of two to four options, one of them with equal options."""
    draw = random.Random(seed)
    records = []
    for row in range(n):
        size = 2 + row % 3
        options = ["same" if row == 4 and i < 2 else f"option {i}" for i in range(size)]
        gold = {4: 0, 5: None}.get(row, draw.randrange(size))
        for letters in (LETTERS, QWER):
            symbols = letters[:size]
            for order in orders(size, str(row)) if all_orders else [tuple(range(size))]:
                right = [
                    symbol
                    for symbol, o in zip(symbols, order, strict=True)
                    if gold is not None and options[o] == options[gold]
                ]
                known = right and draw.random() < accuracy
                said = draw.choice(right) if known else draw.choice([*symbols, "A. so", "hm"])
                records.append(
                    Record(
                        question_id=f"q{row}",
                        row=row,
                        group="ab"[row % 2],
                        counted=row % 4 != 3,
                        symbols=symbols,
                        order=list(order),
                        prompt="...",
                        options=dict(zip(symbols, order, strict=True)),
                        gold=right,
                        text=said,
                        logits=[draw.gauss(0, 1) + 3 * (s in right) for s in symbols],
                        same=None,
                    )
                )
    return records


def head(n, **changes):
    return msgspec.structs.replace(HEAD, n_items=n, **changes)


def save(path, head, records):
    lines = [msgspec.json.encode(line) for line in (head, *records)]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def by_hand(path, counted_only, reading):
    """The paper's row from the file alone, by a stranger."""
    with open(path) as file:
        first, *lines = map(json.loads, file)
    right = {}
    for line in lines:
        symbols = line["symbols"]
        if line["counted"] or not counted_only:
            said = line["text"].strip()
            if reading == "logit":
                said = symbols[line["logits"].index(max(line["logits"]))]
            if reading == "parse" and said[0] in symbols and said[1:3] == ". ":
                said = said[0]
            key = line["row"], first["letters"].startswith(symbols)
            given = line["order"] == sorted(line["order"])
            right.setdefault(key, []).append((given, said in line["gold"]))
    row = {}
    for letters, given, all_orders in ((True, "clean", "pa"), (False, "sa", "sa_pa")):
        rows = [oks for (_, under), oks in right.items() if under == letters]
        row[given] = 100 * sum(dict(oks)[True] for oks in rows) / len(rows)
        row[all_orders] = 100 * sum(all(ok for _, ok in oks) for oks in rows) / len(rows)
    return row


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("seed", range(5))
def test_the_row_is_what_a_stranger_computes_from_the_file(tmp_path, reading, seed):
    path = save(tmp_path / "attacks.jsonl", head(30), draw_records(30, seed, 0.9))
    blocks = summarise(collect(*read_attacks(path), path))["readings"][reading]
    for part, counted in (("counted", True), ("total", False)):
        expected = by_hand(path, counted, reading)
        assert {name: blocks[part][name] for name in expected} == pytest.approx(expected)
        assert blocks[part]["avg"] == pytest.approx(sum(expected.values()) / 4)
        assert expected["pa"] <= expected["clean"] and expected["sa_pa"] <= expected["sa"]


def right_one(record):
    """The symbol of the right option; of several the one chosen, else the first."""
    return record.text if record.text in record.gold else next(iter(record.gold), None)


def test_the_other_numbers():
    records = draw_records(30)
    summary = summarise(collect(head(30), records, "here"))
    assert (summary["n_items"], summary["n_counted"], summary["pa_mode"]) == (30, 23, "exhaustive")
    block = summary["readings"]["exact"]["total"]
    for name, letters in (("clean", LETTERS), ("sa", QWER)):
        under = [r for r in records if letters.startswith(r.symbols)]
        there = block["orders"][name]
        assert there["symbols"] == letters[:4]
        assert there["chosen"] == [sum(r.text == s for r in under) for s in letters[:4]]
        unread = [r for r in under if len(r.text) > 1 or r.text not in r.symbols]
        assert there["parse_failures"] == pytest.approx(100 * len(unread) / len(under))
        shares = [np.mean([r.text in r.gold for r in under if r.row == row]) for row in range(30)]
        assert there["mean"] == pytest.approx(100 * np.mean(shares))
        for place, symbol in enumerate(letters[:4]):  # of several right ones the one chosen
            stood = [r.text in r.gold for r in under if symbol == right_one(r)]
            assert there["recall"][place] == pytest.approx(100 * np.mean(stood))
        assert there["rstd"] == pytest.approx(np.std(there["recall"]))
        assert sum(there["right"]) == sum(bool(r.gold) for r in under)
    assert block["attack_success"] == {
        "pa": block["clean"] - block["pa"],
        "sa_pa": block["sa"] - block["sa_pa"],
    }
    low, high = block["intervals"]["avg"]
    assert low < block["avg"] < high


def test_groups_are_parts_of_the_whole():
    blocks = summarise(collect(head(30), draw_records(30), "here"))["readings"]["parse"]
    a, b = blocks["groups"]["a"], blocks["groups"]["b"]
    for name in ("clean", "pa", "sa", "sa_pa", "avg"):
        whole = (a["n"] * a[name] + b["n"] * b[name]) / (a["n"] + b["n"])
        assert blocks["total"][name] == pytest.approx(whole)


def test_the_order_of_the_lines_does_not_matter():
    records = draw_records(12)
    mixed = random.Random(1).sample(records, len(records))
    assert summarise(collect(head(12), records, "")) == summarise(collect(head(12), mixed, ""))


def test_where_no_item_counts_all_do():
    records = [msgspec.structs.replace(r, counted=False) for r in draw_records(6)]
    assert summarise(collect(head(6), records, ""))["n_counted"] == 6


def test_clean_alone():
    records = [r for r in draw_records(9, all_orders=False) if LETTERS.startswith(r.symbols)]
    summary = summarise(collect(head(9, symbols="", all_orders=False), records, ""))
    block = summary["readings"]["exact"]["total"]
    assert block.keys() == {"n", "clean", "intervals", "attack_success", "orders"}
    assert block["attack_success"] == {} and block["orders"].keys() == {"clean"}


def test_means_over_orders_are_left_out_of_a_run_that_stopped_early():
    summary = summarise(collect(head(9, until_failure=True), draw_records(9), ""))
    assert "orders" not in summary["readings"]["exact"]["total"]


PARTS = {
    "an order": lambda records: records[:7] + records[8:],
    "the given order": lambda records: records[:2] + records[3:],
    "an item": lambda records: [r for r in records if r.row != 3],
    "the end": lambda records: records[:-1],
    "one kind of symbols": lambda records: [r for r in records if r.symbols[0] == "A"],
    "everything": lambda records: [],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_refused(part):
    with pytest.raises(DataError, match=r"^here: of 6 items, not or not wholly asked under .*row"):
        collect(head(6), PARTS[part](draw_records(6)), "here")


def test_a_run_that_stopped_early_must_have_had_a_reason():
    """Without its last order, item 1 is whole only once all readings have been wrong."""
    records = [r for r in draw_records(2) if r.order != [2, 1, 0]]
    early = head(2, until_failure=True)
    wrong = [msgspec.structs.replace(r, gold=[]) for r in records]
    collect(early, wrong, "here")
    right = [msgspec.structs.replace(r, text=r.gold[0]) for r in records]
    with pytest.raises(DataError, match="not wholly asked"):
        collect(early, right, "here")


@pytest.mark.parametrize(
    "change",
    [{"row": 6}, {"row": -1}, {"symbols": "XY"}, {"logits": [1.0]}, {"order": [0, 0]}],
    ids=str,
)
def test_a_strange_line_is_refused(change):
    first, *others = draw_records(6)
    with pytest.raises(DataError, match="^here: row .* is no question of this run"):
        collect(head(6), [msgspec.structs.replace(first, **change), *others], "here")


@pytest.mark.parametrize("instead", [0, 1])
def test_a_prompt_twice_is_refused(instead):
    """Besides all others, or instead of another order of its item."""
    records = draw_records(6)
    assert records[5].row == records[6].row == 1
    twice = [*records[:5], records[6], *records[5 + instead :]]
    with pytest.raises(DataError, match="not wholly asked"):
        collect(head(6), twice, "here")


# ---- two runs


def test_a_run_against_itself_and_against_a_better_one():
    runs = [collect(head(60), draw_records(60, 1, accuracy), "") for accuracy in (0.6, 0.99)]
    same = compare(runs[0], runs[0], "exact")
    assert all(entry["value"] == 0 and entry.get("p", 1) == 1 for entry in same.values())
    differences = compare(*runs, "exact")
    assert list(differences) == ["clean", "pa", "sa", "sa_pa", "avg"]
    blocks = [summarise(run)["readings"]["exact"]["counted"] for run in runs]
    for name, entry in differences.items():
        assert entry["value"] == pytest.approx(blocks[1][name] - blocks[0][name])
        assert entry["interval"][0] <= entry["value"] <= entry["interval"][1]
    pa = differences["pa"]
    assert pa["p"] < 1e-3 and pa["only_second"] > pa["only_first"]
    assert pa["value"] == pytest.approx(100 * (pa["only_second"] - pa["only_first"]) / 45)


def test_runs_over_other_items_are_not_compared():
    first = collect(head(6), draw_records(6), "")
    for second in (
        collect(head(5), draw_records(5), ""),
        dataclasses.replace(first, head=head(6, benchmark="other")),
        dataclasses.replace(first, ids=tuple("abcdef")),
    ):
        with pytest.raises(DataError, match="give a run over the same items"):
            compare(first, second, "exact")


# ---- the verb


def test_attack_prints_the_row(tmp_path, capsys):
    path = save(tmp_path / "attacks.jsonl", head(30), draw_records(30))
    main(["attack", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.startswith("toy: m, 23 of 30 items, symbols QWERT..., exhaustive orders\n")
    expected = by_hand(path, True, "exact")
    (line,) = [line for line in out.splitlines() if line.startswith("exact")]
    assert [float(cell) for cell in line.split()[1:5]] == [round(v, 2) for v in expected.values()]
    main(["attack", str(path), "--reading", "logit", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["readings"]["exact"]["counted"]["pa"] == pytest.approx(expected["pa"])


def test_attack_against(tmp_path, capsys):
    paths = [save(tmp_path / f"{s}.jsonl", head(30), draw_records(30, s)) for s in range(2)]
    main(["attack", str(paths[0]), "--against", str(paths[1])])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["Clean", "PA", "SA", "SA+PA", "Avg."]


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (None, UsageError, "No such file"),
        (b"", DataError, "line 1: .*give the attacks.jsonl of a finished run"),
        (b'{"question_id": 1}\n', DataError, "line 1: .*begins with what `run` asked"),
        (msgspec.json.encode(head(1)) + b"\n{\n", DataError, "line 2: .*damaged"),
        (msgspec.json.encode(head(0)) + b"\n", DataError, "line 1: .*n_items"),
    ],
)
def test_attack_of_another_file(tmp_path, content, error, told):
    path = tmp_path / "attacks.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=told):
        main(["attack", str(path)])


def test_bounds_of_a_random_model():
    """Guessing two options: Clean 1/2, PA 1/4; three standard errors over 300 items."""
    records = []
    for record in draw_records(900, 3, 0.0):
        if len(record.symbols) == 2:
            records.append(msgspec.structs.replace(record, row=record.row // 3))
    draw = random.Random(0)
    records = [msgspec.structs.replace(r, text=draw.choice(r.symbols)) for r in records]
    block = summarise(collect(head(300), records, ""))["readings"]["exact"]["total"]
    for name, share in (("clean", 0.5), ("pa", 0.25), ("sa", 0.5), ("sa_pa", 0.25)):
        error = 100 * math.sqrt(share * (1 - share) / 300)
        assert abs(block[name] - 100 * share) < 3 * error
