"""What is asked of a benchmark: which items are one question, in which orders, under which symbols.

Rows with the same pictures, stem, suffix and set of options are one *unit*: MMBench's rotations are
the same question when all orders are asked. Each distinct prompt of a unit is put to the model
once; every row takes its replies from there.

`until_failure` asks for no more than Clean and PA need: the given order first, then those that look
hardest by the reply to it, until every reading has been wrong once. What an item is asked depends
on its own replies alone, so it is the same for any number of processes and after a restart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llava.errors import UsageError
from llava.eval.metrics import UNREAD
from llava.eval.question import LETTERS, SYMBOLS, Ask, Reply, orders
from llava.eval.reading import READINGS, read
from llava.eval.records import Record
from llava.eval.tasks.base import Item

Order = tuple[int, ...]
Replier = Callable[[Sequence[Ask]], Sequence[Reply]]


class Asked(NamedTuple):
    """One prompt put to the model."""

    ask: Ask
    order: Order
    """of the options; empty for an open question"""
    reply: Reply

    def is_right(self, item: Item, reading: str) -> bool:
        """Whether the reply, read so, names a right option."""
        symbols, reply = self.ask.symbols, self.reply
        position = read(reading, reply.text, reply.logits, symbols)
        return position != UNREAD and symbols[position] in gold_symbols(item, self.order, symbols)

    def record(self, row: int, item: Item, counted: bool, source: int) -> Record:
        """The line of an attack file; `source` is the row as which this was really asked."""
        symbols, order = self.ask.symbols, self.order
        return Record(
            question_id=item.question_id,
            row=row,
            group=item.group,
            counted=counted,
            symbols=symbols,
            order=list(order),
            prompt=self.ask.text,
            options=dict(zip(symbols, order, strict=True)),
            gold=list(gold_symbols(item, order, symbols)),
            text=self.reply.text,
            # Each float32 as the float64 of the fewest digits that give it back: short in JSON.
            logits=[float(str(np.float32(logit))) for logit in self.reply.logits],
            same=None if source == row else source,
        )


@dataclass(frozen=True)
class Schedule:
    """What is put to the model, and in which order."""

    benchmark: str
    symbols: tuple[str, ...]
    """the letters, and the symbols of the attack unless only Clean is asked for; none to ask items
    as they are worded, without options to choose from"""
    all_orders: bool = True
    """every order of the options (`question.orders`), not the given one alone"""
    until_failure: bool = False
    """of all orders only as many as Clean and PA need"""

    def orders(self, item: Item) -> list[Order]:
        """Orders of an item's options, the given one first."""
        n = len(item.question.options)
        return orders(n, f"{self.benchmark}|{item.id}") if self.all_orders else [tuple(range(n))]

    def asks(self, item: Item) -> list[Ask]:
        """Everything that may be asked of an item."""
        if not self.symbols:
            return [Ask(item.prompt)]
        item_orders = self.orders(item)
        return [_ask(item, order, symbols) for symbols in self.symbols for order in item_orders]

    def units(self, items: Sequence[Item]) -> list[list[int]]:
        """Rows that are one question, by the first of them.

        Where only the given order is asked, they are the rows with the same prompts.
        """
        units = defaultdict(list)
        for row, item in enumerate(items):
            if self.all_orders:
                question = item.question
                wording = question.stem, question.suffix, tuple(sorted(question.options))
            else:
                wording = tuple(self.asks(item))
            units[item.images, wording].append(row)
        return list(units.values())

    def sources(self, items: Sequence[Item], unit: Sequence[int]) -> dict[Ask, int]:
        """The distinct prompts of a unit, each with the first of its rows that asks it."""
        sources: dict[Ask, int] = {}
        for row in unit:
            for ask in self.asks(items[row]):
                sources.setdefault(ask, row)
        return sources

    def put(self, item: Item, reply: Replier) -> Iterator[Asked]:
        """Put an item to the model."""
        if not self.symbols:
            asks = self.asks(item)
            yield Asked(asks[0], (), reply(asks)[0])
            return
        for symbols in self.symbols:
            step = _until_failure if self.until_failure else _at_once
            yield from step(item, self.orders(item), symbols, reply)


def pick_symbols(name: str, n_options: int) -> str:
    """The symbols called `name`, or `name` itself, for questions of up to `n_options` options.

    Raises UsageError for too few, repeated or unprintable ones, and for those that are the letters.
    """
    symbols = SYMBOLS.get(name, name)
    wrong = None
    if len(set(symbols)) < len(symbols):
        wrong = "a symbol is there twice"
    elif not symbols.isprintable() or any(symbol.isspace() for symbol in symbols):
        wrong = "a symbol cannot be seen"
    elif len(symbols) < n_options:
        wrong = f"{len(symbols)} symbols, but a question has {n_options} options"
    elif symbols[:2] == LETTERS[:2]:
        wrong = f"begins as {LETTERS} does, so nothing would be attacked"
    if wrong:
        known = ", ".join(known for known in SYMBOLS if known != "abcd")
        raise UsageError(f"--symbols {name}: {wrong}; give {known} or other distinct characters")
    return symbols


def gold_symbols(item: Item, order: Order, symbols: str) -> str:
    """The symbols that are right: several if options have equal texts, none if the gold is hidden.

    `symbols` are those offered, one a position.
    """
    if item.gold is None:
        return ""
    options = item.question.options
    right = options[item.gold]
    return "".join(s for s, option in zip(symbols, order, strict=True) if options[option] == right)


def _ask(item: Item, order: Order, symbols: str) -> Ask:
    return Ask(item.question.render(order, symbols), symbols[: len(order)])


def _at_once(item: Item, orders: list[Order], symbols: str, reply: Replier) -> Iterator[Asked]:
    asks = [_ask(item, order, symbols) for order in orders]
    yield from map(Asked, asks, orders, reply(asks))


def _until_failure(
    item: Item, orders: list[Order], symbols: str, reply: Replier
) -> Iterator[Asked]:
    """The given order, then one, two, four, ... of the hardest, until all readings were wrong."""
    failed: set[str] = set()
    size = 1
    while orders and len(failed) < len(READINGS):
        asked = list(_at_once(item, orders[:size], symbols, reply))
        yield from asked
        failed |= {r for r in READINGS if not all(one.is_right(item, r) for one in asked)}
        orders = orders[size:]
        if size == 1 and item.gold is not None:
            orders = _hardest_first(orders, item.gold, asked[0].reply.logits)
        size *= 2


def _hardest_first(orders: list[Order], gold: int, logits: Sequence[float]) -> list[Order]:
    """Orders by what the reply to the given one says of positions.

    The right option where the logits are lowest and the strongest wrong one where they are highest
    come first; ties keep their order.
    """
    rival = max((i for i in range(len(logits)) if i != gold), key=lambda option: logits[option])
    return sorted(orders, key=lambda o: logits[o.index(gold)] - logits[o.index(rival)])
