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
from llava.eval.engine import Ask, Reply
from llava.eval.metrics import UNREAD
from llava.eval.question import LETTERS, SYMBOLS, orders
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


@dataclass(frozen=True)
class Plan:
    """What is put to the model."""

    benchmark: str
    symbols: tuple[str, ...]
    """the letters, and the symbols of the attack unless only Clean is wanted; none to ask items as
    they are worded, without options to choose from"""
    all_orders: bool = True
    """every order of the options (`attacks.orders`), not the given one alone"""
    until_failure: bool = False
    """of all orders only as many as Clean and PA need"""

    def orders(self, item: Item) -> list[Order]:
        """Orders of an item's options, the given one first."""
        n = len(item.question.options)
        return orders(n, f"{self.benchmark}|{item.id}") if self.all_orders else [tuple(range(n))]


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


def units(items: Sequence[Item], plan: Plan) -> list[list[int]]:
    """Rows that are one question, by the first of them.

    Where only the given order is asked, they are the rows with the same prompt.
    """
    groups = defaultdict(list)
    for row, item in enumerate(items):
        key = (item.prompt,)
        if plan.all_orders:
            question = item.question
            key = (question.stem, question.suffix, tuple(sorted(question.options)))
        groups[item.images, key].append(row)
    return list(groups.values())


def prompts(item: Item, plan: Plan) -> list[Ask]:
    """Everything that may be asked of an item."""
    if not plan.symbols:
        return [Ask(item.prompt)]
    found = plan.orders(item)
    return [_ask(item, order, symbols) for symbols in plan.symbols for order in found]


def put(item: Item, plan: Plan, reply: Replier) -> Iterator[Asked]:
    """Put an item to the model as planned."""
    if not plan.symbols:
        asks = prompts(item, plan)
        yield Asked(asks[0], (), reply(asks)[0])
        return
    for symbols in plan.symbols:
        step = _until_failure if plan.until_failure else _at_once
        yield from step(item, plan.orders(item), symbols, reply)


def gold_symbols(item: Item, order: Order, symbols: str) -> str:
    """The symbols that are right: several if options have equal texts, none if the gold is hidden.

    `symbols` are those offered, one a position.
    """
    if item.gold is None:
        return ""
    options = item.question.options
    right = options[item.gold]
    return "".join(s for s, option in zip(symbols, order, strict=True) if options[option] == right)


def record(asked: Asked, row: int, item: Item, counted: bool, source: int) -> Record:
    """The line of an attack file for one prompt; `source` is the row as which it was asked."""
    symbols, order = asked.ask.symbols, asked.order
    return Record(
        question_id=item.question_id,
        row=row,
        group=item.group,
        counted=counted,
        symbols=symbols,
        order=list(order),
        prompt=asked.ask.text,
        options=dict(zip(symbols, order, strict=True)),
        gold=list(gold_symbols(item, order, symbols)),
        text=asked.reply.text,
        logits=[_shortest(logit) for logit in asked.reply.logits],
        same=None if source == row else source,
    )


def _shortest(value: float) -> float:
    """A float32 number as the float64 of the fewest digits that give it back."""
    return float(str(np.float32(value)))


def _ask(item: Item, order: Order, symbols: str) -> Ask:
    return Ask(item.question.render(order, symbols), symbols[: len(order)])


def _at_once(item: Item, found: list[Order], symbols: str, reply: Replier) -> Iterator[Asked]:
    asks = [_ask(item, order, symbols) for order in found]
    yield from map(Asked, asks, found, reply(asks))


def _until_failure(item: Item, found: list[Order], symbols: str, reply: Replier) -> Iterator[Asked]:
    wrong: set[str] = set()
    size = 1
    while found and len(wrong) < len(READINGS):
        asked = list(_at_once(item, found[:size], symbols, reply))
        yield from asked
        wrong |= {
            reading for reading in READINGS for one in asked if not _is_right(item, reading, one)
        }
        found = found[size:]
        if size == 1 and item.gold is not None:
            found = _hardest_first(found, item.gold, asked[0].reply.logits)
        size *= 2


def _is_right(item: Item, reading: str, asked: Asked) -> bool:
    symbols, reply = asked.ask.symbols, asked.reply
    position = read(reading, reply.text, reply.logits, symbols)
    return position != UNREAD and symbols[position] in gold_symbols(item, asked.order, symbols)


def _hardest_first(found: list[Order], gold: int, logits: Sequence[float]) -> list[Order]:
    """Orders by what the reply to the given one says of positions.

    The right option where the logits are lowest and the strongest wrong one where they are highest
    come first; ties keep their order.
    """
    rival = max((i for i in range(len(logits)) if i != gold), key=lambda option: logits[option])
    return sorted(found, key=lambda o: logits[o.index(gold)] - logits[o.index(rival)])
