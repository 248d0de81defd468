"""Numbers under attack, from the records of a run alone.

    Clean, PA, SA, SA+PA   given order and all orders, under letters and under other symbols;
                           Avg. is their mean
    attack success         Clean - PA and SA - (SA+PA), in points
    mean over orders       of the share of an item's orders answered right
    positions              how often each was chosen, its recall, and RStd

Every number is a percentage over the items that count (`Record.counted`) and once more over all of
them, for each reading. Means over orders, positions and parse failures are left out when orders
were skipped after a failure: they would be those of the hard orders.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from llava.errors import DataError
from llava.eval import metrics
from llava.eval.metrics import UNREAD, Bools, Ints
from llava.eval.question import MAX_ORDERS
from llava.eval.reading import READINGS, read
from llava.eval.records import Head, Record
from llava.eval.tasks.base import Id

FOUR = ("clean", "pa", "sa", "sa_pa")
COLUMNS = (*FOUR, "avg")
_NO_GOLD = -2


@dataclass(frozen=True)
class Sheet:
    """Every reply under one set of symbols, items by orders; order 0 is the given one."""

    asked: Bools
    """(I, O)"""
    chosen: Mapping[str, Ints]
    """position read from the reply, (I, O) for each reading"""
    correct: Mapping[str, Bools]
    """(I, O) for each reading"""
    gold: Ints
    """first position of a right option, (I, O); _NO_GOLD if there is none"""
    n_options: Ints
    """(I,)"""

    def part(self, rows: Bools) -> Sheet:
        """The items that `rows` (I,) names."""
        return Sheet(
            self.asked[rows],
            {reading: chosen[rows] for reading, chosen in self.chosen.items()},
            {reading: correct[rows] for reading, correct in self.correct.items()},
            self.gold[rows],
            self.n_options[rows],
        )


@dataclass(frozen=True)
class Replies:
    """All replies of a run, items in the benchmark's order."""

    head: Head
    ids: tuple[Id, ...]
    groups: tuple[str, ...]
    counted: Bools
    """(I,); all true if no item counts: then every item does"""
    sheets: tuple[Sheet, ...]
    """under the letters, and under the other symbols if they were asked"""


class _Cell(NamedTuple):
    """One reply: `chosen` and `correct` by reading."""

    order: tuple[int, ...]
    chosen: tuple[int, ...]
    correct: tuple[bool, ...]
    gold: int

    @property
    def is_given(self) -> bool:
        return self.order == tuple(range(len(self.order)))


def collect(head: Head, records: Iterable[Record], where: str | Path) -> Replies:
    """Records as arrays.

    Raises DataError, beginning with `where`, unless every item of the benchmark was asked as `head`
    says: no number is ever computed over a part.
    """
    # By set of symbols, then item: as little of a record as the arrays take, for SEED-Bench has
    # nearly a million.
    sets = [symbols for symbols in (head.letters, head.symbols) if symbols]
    cells: list[dict[int, list[_Cell]]] = [defaultdict(list) for _ in sets]
    items: dict[int, tuple[Id, str, bool]] = {}
    for record in records:
        under = [i for i, symbols in enumerate(sets) if symbols.startswith(record.symbols)]
        n = len(record.symbols)
        fits = n > 0 and len(record.logits) == n and sorted(record.order) == list(range(n))
        if not (under and 0 <= record.row < head.n_items and fits):
            raise DataError(
                f"{where}: row {record.row} under {record.symbols!r} is no question of this run; "
                "give the file as it was written"
            )
        cells[under[0]][record.row].append(_cell(record))
        items[record.row] = record.question_id, record.group, record.counted

    # Every item of the benchmark has to be there before anything is counted.
    for symbols, by_row in zip(sets, cells, strict=True):
        missing = [row for row in range(head.n_items) if not _is_whole(head, by_row.get(row, ()))]
        if missing:
            raise DataError(
                f"{where}: of {head.n_items} items, not or not wholly asked under {symbols}: "
                f"{len(missing)} (the first is row {missing[0]}); run the same command again to "
                "ask what is missing"
            )
    ids, groups, counted = zip(*(items[row] for row in range(head.n_items)), strict=True)
    counts = np.array(counted)
    return Replies(
        head, ids, groups, counts if counts.any() else ~counts, tuple(map(_sheet, cells))
    )


def _cell(record: Record) -> _Cell:
    symbols = record.symbols
    chosen = tuple(read(reading, record.text, record.logits, symbols) for reading in READINGS)
    right = [symbols.index(symbol) for symbol in record.gold]
    gold = right[0] if right else _NO_GOLD
    return _Cell(tuple(record.order), chosen, tuple(c in right for c in chosen), gold)


def _is_whole(head: Head, cells: Sequence[_Cell]) -> bool:
    """Whether an item was asked once in each order that `head` says, the given one among them."""
    if not any(cell.is_given for cell in cells):
        return False
    n = min(math.factorial(len(cells[0].order)), MAX_ORDERS) if head.all_orders else 1
    if len({cell.order for cell in cells}) < len(cells):
        return False
    failed = all(not all(one) for one in zip(*(cell.correct for cell in cells), strict=True))
    return len(cells) == n or (head.until_failure and failed)


def _sheet(cells: Mapping[int, Sequence[_Cell]]) -> Sheet:
    """The cells of each item as arrays, the given order first."""
    rows = [sorted(cells[row], key=lambda cell: cell.order) for row in range(len(cells))]
    shape = len(rows), max(map(len, rows))
    asked = np.zeros(shape, bool)
    chosen = np.full((len(READINGS), *shape), UNREAD, np.int8)
    correct = np.zeros((len(READINGS), *shape), bool)
    gold = np.full(shape, _NO_GOLD, np.int8)
    for i, row in enumerate(rows):
        n = len(row)
        asked[i, :n] = True
        chosen[:, i, :n] = np.array([cell.chosen for cell in row]).T
        correct[:, i, :n] = np.array([cell.correct for cell in row]).T
        gold[i, :n] = [cell.gold for cell in row]
    return Sheet(
        asked,
        dict(zip(READINGS, chosen, strict=True)),
        dict(zip(READINGS, correct, strict=True)),
        gold,
        np.array([len(row[0].order) for row in rows]),
    )


def four(replies: Replies, reading: str) -> dict[str, Bools]:
    """Clean, PA, SA and SA+PA of every item, (I,) each; those that were asked."""
    right = {}
    for sheet, names in zip(replies.sheets, (FOUR[:2], FOUR[2:]), strict=False):
        given, worst = names
        right[given] = metrics.clean(sheet.correct[reading], sheet.asked)
        if replies.head.all_orders:
            right[worst] = metrics.worst(sheet.correct[reading], sheet.asked)
    return right


def summarise(replies: Replies) -> dict[str, Any]:
    """Every number of a run under attack, JSON-serialisable; see docs/Evaluation.md."""
    head = replies.head
    sampled = any(math.factorial(n) > MAX_ORDERS for n in replies.sheets[0].n_options)
    return {
        **msgspec.to_builtins(head),
        "n_counted": int(replies.counted.sum()),
        "pa_mode": f"sampled{MAX_ORDERS}" if sampled else "exhaustive",
        "readings": {reading: _reading(replies, reading) for reading in READINGS},
    }


def compare(first: Replies, second: Replies, reading: str) -> dict[str, dict[str, Any]]:
    """Second minus first in each of the numbers, in points, over the items that count.

    `p` is McNemar's exact test of the items that only one of them has right. Raises DataError if
    the runs are not of the same items.
    """
    if first.ids != second.ids or first.head.benchmark != second.head.benchmark:
        raise DataError(
            f"--against: {len(second.ids)} items of {second.head.benchmark}, but "
            f"{len(first.ids)} of {first.head.benchmark}: give a run over the same items"
        )
    a, b = (
        {name: right[first.counted] for name, right in four(replies, reading).items()}
        for replies in (first, second)
    )
    differences = {}
    for name in [name for name in a if name in b]:
        only_first, only_second, p = metrics.mcnemar(a[name], b[name])
        differences[name] = {
            **_mean(b[name].astype(float) - a[name]),
            "only_first": only_first,
            "only_second": only_second,
            "p": p,
        }
    if len(differences) == len(FOUR):
        total = sum(b[name].astype(float) - a[name] for name in FOUR)
        differences["avg"] = _mean(total / len(FOUR))
    return differences


def _reading(replies: Replies, reading: str) -> dict[str, Any]:
    """The items that count, all items, and each group where there are several."""
    right, groups = four(replies, reading), np.array(replies.groups)
    names = sorted(set(replies.groups))
    return {
        "counted": _block(replies, reading, right, replies.counted),
        "total": _block(replies, reading, right, np.ones(len(groups), bool)),
        "groups": {name: _row(right, groups == name) for name in names if len(names) > 1},
    }


def _row(right: Mapping[str, Bools], rows: Bools) -> dict[str, Any]:
    """Number of items in `rows` (I,), and the means of the paper's row over them."""
    means = {name: 100 * float(values[rows].mean()) for name, values in right.items()}
    if len(means) == len(FOUR):
        means["avg"] = sum(means.values()) / len(means)
    return {"n": int(rows.sum()), **means}


def _block(
    replies: Replies, reading: str, right: Mapping[str, Bools], rows: Bools
) -> dict[str, Any]:
    """The row with intervals, and what else is known of the items in `rows` (I,)."""
    block = _row(right, rows)
    values = {name: each[rows] for name, each in right.items()}
    if len(values) == len(FOUR):
        values["avg"] = sum(each.astype(float) for each in values.values()) / len(values)
    block["intervals"] = {name: _interval(each) for name, each in values.items()}
    pairs = (("pa", "clean"), ("sa_pa", "sa"))
    block["attack_success"] = {hit: block[of] - block[hit] for hit, of in pairs if hit in block}

    # Orders that were skipped after a failure were the easy ones: no means over the others.
    if not replies.head.until_failure:
        sets = (("clean", replies.head.letters), ("sa", replies.head.symbols))
        block["orders"] = {
            name: _over_orders(sheet.part(rows), reading, symbols)
            for sheet, (name, symbols) in zip(replies.sheets, sets, strict=False)
        }
    return block


def _over_orders(sheet: Sheet, reading: str, symbols: str) -> dict[str, Any]:
    """What all replies under one set of symbols say, chosen positions among them."""
    has_gold = sheet.asked & (sheet.gold != _NO_GOLD)
    n = int(sheet.n_options.max())
    chosen, correct = sheet.chosen[reading], sheet.correct[reading]
    gold = np.where(correct, chosen, sheet.gold)  # of several right positions the one chosen
    recall = metrics.position_recall(chosen[has_gold], gold[has_gold], n)
    shares = metrics.mean_over_orders(correct, sheet.asked)
    return {
        "mean": 100 * float(shares.mean()),
        "parse_failures": 100 * metrics.failure_rate(chosen[sheet.asked]),
        "symbols": symbols[:n],
        "chosen": metrics.position_counts(chosen[sheet.asked], n).tolist(),
        "right": metrics.position_counts(gold[has_gold], n).tolist(),
        "recall": [None if math.isnan(value) else 100 * float(value) for value in recall],
        "rstd": 100 * metrics.recall_std(recall),
    }


def _mean(values: np.ndarray) -> dict[str, Any]:
    return {"value": 100 * float(values.mean()), "interval": _interval(values)}


def _interval(values: np.ndarray) -> list[float]:
    """95 % interval of the mean of `values` (I,), in percent; the draws are always the same."""
    return [100 * end for end in metrics.bootstrap(values, np.random.default_rng(0))]
