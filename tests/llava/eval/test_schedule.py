"""What is asked: units, symbols, and that stopping early changes no worst case."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from llava.errors import UsageError
from llava.eval.numbers import collect, four, summarise
from llava.eval.question import LETTERS, SYMBOLS, Question, Reply
from llava.eval.reading import READINGS
from llava.eval.records import Head
from llava.eval.schedule import Schedule, gold_symbols, pick_symbols
from llava.eval.tasks.base import Item

ALL = Schedule("toy", (LETTERS, SYMBOLS["qwer"]))
EARLY = dataclasses.replace(ALL, until_failure=True)


def item(number=0, options=("w", "x", "y"), gold=0, **values):
    question = Question("Which?", tuple(options), "Say.")
    return Item(number, question.render(), question, gold=gold, **values)


def answers(seed, accuracy):
    """A model that knows the right symbol with some probability and babbles otherwise."""

    def reply(asks, item):
        replies = []
        for ask in asks:
            draw = random.Random(f"{seed} {ask.text}")
            shown = [line[3:] for line in ask.text.split("\n")[1:-1]]
            right = shown.index(item.question.options[item.gold])
            logits = [
                draw.gauss(0, 1) + 4 * (accuracy - 0.5) * (i == right) for i in range(len(shown))
            ]
            place = right if draw.random() < accuracy else draw.randrange(len(shown))
            forms = (ask.symbols[place], f"{ask.symbols[place]}. so", "what?")
            replies.append(Reply(draw.choices(forms, (8, 1, 1))[0], tuple(logits)))
        return replies

    return reply


def ask_all(items, schedule, model):
    """Records of all items, and the arrays made of them."""
    head = Head("toy", "m", len(items), LETTERS, SYMBOLS["qwer"], True, schedule.until_failure)
    records = [
        asked.record(row, item, True, row)
        for row, item in enumerate(items)
        for asked in schedule.put(item, lambda asks, item=item: model(asks, item))
    ]
    return records, collect(head, records, "here")


def test_rotations_are_one_unit_when_all_orders_are_asked():
    items = [
        item(0),
        item(1, ("x", "w", "y")),
        item(2, ("w", "x", "z")),
        item(3, ("y", "w", "x"), images=("a.png",)),
        item(4, ("w", "x", "y"), gold=2),
        item(5, ("w", "w", "x")),
        item(6, ("w", "x", "x")),
    ]
    assert ALL.units(items) == [[0, 1, 4], [2], [3], [5], [6]]
    asked = {ask.text for ask in ALL.asks(items[0])}
    assert asked == {ask.text for ask in ALL.asks(items[1])} and len(asked) == 12
    assert dataclasses.replace(ALL, all_orders=False).units(items) == [
        [0, 4],
        [1],
        [2],
        [3],
        [5],
        [6],
    ]


def test_open_questions_with_the_same_words_and_picture_are_one_unit():
    items = [Item(i, text, images=(p,)) for i, (text, p) in enumerate(["aX", "bX", "aX", "aY"])]
    assert Schedule("toy", (), all_orders=False).units(items) == [[0, 2], [1], [3]]


def test_without_symbols_items_are_asked_as_they_are_worded():
    """Also those of a benchmark that has options but is not attacked."""
    schedule = Schedule("toy", (), all_orders=False)
    for one in (Item(0, "Why?"), dataclasses.replace(item(), prompt="Why?")):
        (asked,) = schedule.put(one, lambda asks: [Reply("because")] * len(asks))
        record = asked.record(0, one, True, 0)
        assert (record.prompt, record.text, record.symbols, record.gold) == (
            "Why?",
            "because",
            "",
            [],
        )


def test_all_orders_under_both_symbols():
    asks = ALL.asks(item())
    assert [ask.symbols for ask in asks] == ["ABC"] * 6 + ["QWE"] * 6
    assert asks[0].text == "Which?\nA. w\nB. x\nC. y\nSay."
    assert asks[11].text == "Which?\nQ. y\nW. x\nE. w\nSay."
    assert len(ALL.asks(item(options="abcdefg"))) == 240


def test_sampled_orders_belong_to_the_item():
    asks = [[ask.text for ask in ALL.asks(item(i, "abcdefg"))] for i in (0, 0, 1)]
    assert asks[0] == asks[1] != asks[2]


def test_equal_options_are_right_together_and_a_hidden_one_never():
    twice = item(options=("w", "x", "w"), gold=2)
    assert gold_symbols(twice, (0, 1, 2), "ABC") == "AC"
    assert gold_symbols(twice, (1, 2, 0), "QWE") == "WE"
    assert gold_symbols(item(gold=None), (0, 1, 2), "ABC") == ""


def test_a_record_says_everything_of_a_prompt():
    reply = lambda asks: [Reply("E", (0.1, 0.2, 0.3))] * len(asks)  # noqa: E731
    *_, last = ALL.put(item(7, gold=1, group="g"), reply)
    record = last.record(4, item(7, gold=1, group="g"), False, 2)
    assert (record.question_id, record.row, record.group, record.counted) == (7, 4, "g", False)
    assert (record.symbols, record.order, record.gold) == ("QWE", [2, 1, 0], ["W"])
    assert record.options == {"Q": 2, "W": 1, "E": 0}
    assert (record.text, record.logits, record.same) == ("E", [0.1, 0.2, 0.3], 2)
    assert last.record(2, item(7), True, 2).same is None


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.9, 0.99, 1.0])
def test_stopping_early_gives_the_same_worst_cases(accuracy):
    """For every reading, with no more prompts, and with far fewer to a model that knows little."""
    items = [item(i, "wxyz"[: 2 + i % 3], gold=i % 2) for i in range(40)]
    everything, whole = ask_all(items, ALL, answers(0, accuracy))
    asked, early = ask_all(items, EARLY, answers(0, accuracy))
    for reading in READINGS:
        a, b = four(whole, reading), four(early, reading)
        assert all((a[name] == b[name]).all() for name in ("clean", "pa", "sa", "sa_pa"))
        assert (a["pa"] <= a["clean"]).all() and (a["sa_pa"] <= a["sa"]).all()
    assert len(asked) <= len(everything) / (3 if accuracy < 0.5 else 1)


def test_six_options_are_sampled_and_the_summary_says_so():
    asked, replies = ask_all([item(0, "uvwxyz"), item(1)], ALL, answers(0, 1.0))
    assert len(asked) == 2 * (120 + 6)
    summary = summarise(replies)
    assert summary["pa_mode"] == "sampled120"
    assert summary["readings"]["logit"]["total"]["n"] == 2


def test_nothing_more_is_asked_after_a_wrong_given_order():
    wrong = lambda asks: [Reply("B", (0.0, 1.0, 0.0))] * len(asks)  # noqa: E731
    assert [asked.order for asked in EARLY.put(item(), wrong)] == [(0, 1, 2)] * 2


def test_the_hardest_order_is_asked_second():
    """A model that likes the last position: the right option goes where it is liked least."""
    asked = []

    def reply(asks):
        asked.extend(asks)
        shown = [[line[3:] for line in ask.text.split("\n")[1:-1]] for ask in asks]
        right = ["ABC"["w x y".split().index("w") if not s else s.index("w")] for s in shown]
        return [Reply(symbol, (2.0, 1.0, 1.5)) for symbol in right]

    list(dataclasses.replace(EARLY, symbols=(LETTERS,)).put(item(gold=0), reply))
    # the right option w at B (1.0), its strongest rival y (1.5) at A (2.0)
    assert asked[1].text.split("\n")[1:-1] == ["A. y", "B. w", "C. x"]


def test_symbols():
    assert pick_symbols("qwer", 4) == "QWERTYUIOP" and pick_symbols("12345", 5) == "12345"
    for name, problem in {
        "qwe": "3 symbols, but a question has 4 options",
        "QQWE": "a symbol is there twice",
        "a bc": "cannot be seen",
        "abcd": "nothing would be attacked",
        "ABDC": "nothing would be attacked",
    }.items():
        with pytest.raises(UsageError, match=f"^--symbols {name}: .*{problem}.*qwer, snvf"):
            pick_symbols(name, 4)


def test_up_to_five_options_are_asked_in_every_order():
    for n in range(2, 6):
        assert len(ALL.orders(item(options="vwxyz"[:n]))) == math.factorial(n)
