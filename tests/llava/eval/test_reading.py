"""Answers read in three ways: a table of texts, and what must hold for any text."""

from __future__ import annotations

import pytest

from llava.eval.metrics import UNREAD
from llava.eval.reading import READINGS, read

CASES = [  # text, exact, parse
    ("A", 0, 0),
    (" C\n", 2, 2),
    ("c", UNREAD, UNREAD),
    ("E", UNREAD, UNREAD),
    ("", UNREAD, UNREAD),
    ("B.", UNREAD, UNREAD),
    ("B. blue", UNREAD, 1),
    ("E. blue", UNREAD, UNREAD),
    ("B blue", UNREAD, UNREAD),
    ("AB", UNREAD, UNREAD),
    ("The answer is D.", UNREAD, 3),
    ("So: The answer is D. Yes.", UNREAD, 3),
    ("B. blue. The answer is D.", UNREAD, 1),
    ("The answer is D", UNREAD, UNREAD),
    ("The answer is E.", UNREAD, UNREAD),
    ("The answer is A. The answer is A.", UNREAD, UNREAD),
    ("The answer is blue.", UNREAD, UNREAD),
]


@pytest.mark.parametrize(("text", "exact", "parse"), CASES)
def test_letters(text, exact, parse):
    assert read("exact", text, (), "ABCD") == exact
    assert read("parse", text, (), "ABCD") == parse


@pytest.mark.parametrize(("text", "exact", "parse"), CASES)
def test_other_symbols_are_read_by_the_same_rules(text, exact, parse):
    text = text.translate(str.maketrans("ABCDE", "1234Z"))
    assert read("exact", text, (), "1234") == exact
    assert read("parse", text, (), "1234") == parse


def test_a_letter_that_is_not_offered_cannot_be_read():
    assert read("exact", "A", (), "QWER") == UNREAD
    assert read("exact", "C", (), "AB") == UNREAD
    assert read("parse", "The answer is C.", (), "AB") == UNREAD


def test_the_likeliest_symbol_and_ties():
    assert read("logit", "no matter", (0.5, -1.0, 2.5), "ABC") == 2
    assert read("logit", "", (1.0, 3.0, 3.0, 0.0), "ABCD") == 1
    assert read("logit", "", (-1.0, -1.0), "AB") == 0


@pytest.mark.parametrize("reading", READINGS)
def test_the_bare_symbol_is_read_by_all(reading):
    for symbols in ("ABCDEFGHIJ", "QWERTYUIOP", "12", "甲乙丙"):
        for place, symbol in enumerate(symbols):
            logits = [float(i == place) for i in range(len(symbols))]
            assert read(reading, symbol, logits, symbols) == place
