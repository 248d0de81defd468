"""Questions are data: parsing is exact, orders are complete, the gold answer follows its text."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import pytest

from llava.eval.question import INSTRUCTIONS, LETTERS, SYMBOLS, Question, orders, parse_question

EN, CN = INSTRUCTIONS[0], "请直接回答选项字母。"


def test_every_scienceqa_item_round_trips(shared_data):
    items = json.loads((shared_data / "llava_val_CQM-A.json").read_text())
    counts = Counter()
    for item in items:
        text, answer = (turn["value"] for turn in item["conversations"])
        question = parse_question(text)
        assert question is not None and question.suffix is None
        assert question.render() == text
        assert question.option(answer) is not None
        gold = question.options[question.option(answer)]
        assert f"\n{answer}. {gold}" in text
        counts[len(question.options)] += 1
    assert counts == {2: 2233, 3: 979, 4: 985, 5: 44}


@pytest.mark.parametrize(
    "suffix", [None, EN, CN, f"{EN}\n<image>", f"\n{EN}", "Answer:", "<image>", ""]
)
@pytest.mark.parametrize(
    "options", [("red", "blue"), ("C", "A.", "B", "A. x"), tuple("abcdefghij")]
)
def test_parts_survive_the_round_trip(options, suffix):
    question = Question("<image>\nContext: A. B.\nWhich?", options, suffix)
    assert parse_question(question.render()) == question


def test_options_may_have_several_lines():
    text = f"Which closing is right?\nA. With love,\nDana\nB. with love,\nDana\n{EN}"
    assert parse_question(text).options == ("With love,\nDana", "with love,\nDana")
    assert parse_question(text.removesuffix("\n" + EN)).options[1] == "with love,\nDana"
    one_line = parse_question("Q?\nA. yes\nB. no\nReply with one letter, please.")
    assert one_line.options == ("yes", "no")


def test_the_last_list_is_the_question():
    question = parse_question(
        "Facts:\nA. Iron rusts.\nB. Gold does not.\nWhich rusts?\nA. Iron\nB. Gold"
    )
    assert question.options == ("Iron", "Gold")
    assert question.stem.endswith("Which rusts?")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is this?",
        "Q?\nA. only one option",
        "A. no\nB. stem",
        "Q?\nA. one\nC. three",
        "Q?\nA. one\nB. two\nD. four",
        "Q?\nA. one\nB. two\nC. three\nB. again",
        "Q?\nA. one\n\nB. two",
        "Q?\nA) one\nB) two",
        "Q?\nA.one\nB.two",
        "Q?\n" + "\n".join(f"{letter}. {letter}" for letter in "ABCDEFGHIJK"),
    ],
)
def test_what_is_not_understood_is_left_alone(text):
    assert parse_question(text) is None


def test_gold_symbol_follows_the_gold_text():
    question = Question("Q?", ("same", "same", "other", "C"), EN)
    for symbols, order in itertools.product(SYMBOLS.values(), orders(4, "")):
        text = question.render(order, symbols)
        for option in range(4):
            symbol = question.symbol(option, order, symbols)
            assert f"\n{symbol}. {question.options[option]}\n" in text
        if symbols == LETTERS:
            again = parse_question(text)
            shown = [again.option(question.symbol(option, order)) for option in order]
            assert shown == [0, 1, 2, 3]  # by index, so equal texts stay distinct options


def test_an_answer_is_a_bare_symbol():
    question = Question("Q?", ("a", "b"))
    assert question.option(" B\n") == 1
    for answer in ("C", "b", "B.", "AB", "", " ", "The answer is B."):
        assert question.option(answer) is None


def test_render_refuses_what_it_cannot_show():
    question = Question("Q?", tuple("abcdefgh"))
    with pytest.raises(ValueError, match="8 options"):
        question.render(symbols="SNVFIGH")
    with pytest.raises(ValueError, match="order"):
        question.render(order=(0, 0, 1, 2, 3, 4, 5, 6))


@pytest.mark.parametrize("n", range(1, 6))
def test_up_to_five_options_are_exhausted_in_lexicographic_order(n):
    assert orders(n, "any") == sorted(itertools.permutations(range(n)))


@pytest.mark.parametrize(
    "n,limit", [(4, 1), (4, 3), (4, 23), (5, 24), (6, 120), (9, 120), (6, 719)]
)
def test_a_sample_of_orders(n, limit):
    sample = orders(n, "item", limit)
    assert len(set(sample)) == len(sample) == limit < math.factorial(n)
    assert all(sorted(order) == list(range(n)) for order in sample)
    assert sample[0] == tuple(range(n))
    shifts = {tuple((i + k) % n for i in range(n)) for k in range(n)}
    assert set(sample[:n]) <= shifts
    assert sample == orders(n, "item", limit)
    if limit > n + 10:
        assert sample != orders(n, "other item", limit)


def test_sampled_orders_never_change():
    """The draws are part of published results: pinned, so that a change of generator is seen."""
    assert orders(6, "mmmu|7")[5:8] == [(5, 0, 1, 2, 3, 4), (2, 1, 4, 0, 3, 5), (5, 4, 3, 1, 0, 2)]


def test_drawn_orders_are_uniform():
    """Chi-square of first-position counts over many keys: 5 degrees of freedom, 20.5 is p=0.001."""
    drawn = [order for key in range(40) for order in orders(6, str(key))[6:]]
    counts = Counter(order[0] for order in drawn)
    expected = len(drawn) / 6
    assert sum((counts[i] - expected) ** 2 / expected for i in range(6)) < 20.5


def test_symbol_sets_are_distinct_and_long_enough():
    assert SYMBOLS["qwer"] == "QWERTYUIOP" and SYMBOLS["snvf"].startswith("SNVFIGH")
    assert all(len(set(symbols)) == len(symbols) == len(LETTERS) for symbols in SYMBOLS.values())
