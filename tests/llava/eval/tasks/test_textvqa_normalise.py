"""The EvalAI normaliser, quirk by quirk; results worked out by hand from its published rules."""

from __future__ import annotations

import pytest

from llava.eval.tasks.textvqa import normalise


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog", "dog"),
        ("A cat and an owl", "cat and owl"),
        ("Three", "3"),
        ("none", "0"),
        ("ten men", "10 men"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("what?", "what"),
        ("two\nlines\tand tab", "2 lines and tab"),
        ("  spaces   inside ", "spaces inside"),
        ("", ""),
    ],
)
def test_words_and_numbers(answer, expected):
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("3.5", "3.5"),  # a digit follows: the dot stays
        (".5", ".5"),
        ("3.", "3"),  # the mistyped look-behind lets this one go too
        ("e.g. this", "eg this"),
        ("." * 40, "." * 8),  # 32 substitutions, then no more
    ],
)
def test_periods(answer, expected):
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a-b", "b"),  # a space, and then "a" is an article
        ("x-y", "x y"),
        ("x-y - z", "xy z"),  # beside a space once: deleted everywhere
        ("x- y-z", "x yz"),  # a space on either side will do
        ("x -y-z", "x yz"),
        ("x-y z/w", "x y z w"),  # beside none
        ("hello!", "hello"),
        ("(yes)", "yes"),
        ("no (x)", "no x"),
        ("50%", "50%"),  # not in the list
        ("a:b", "a:b"),
    ],
)
def test_punctuation(answer, expected):
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("dont", "don't"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("couldntve", "couldntve"),  # two apostrophes short: not in the table
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # the one reversed entry
        ("Im", "im"),  # listed with a capital, so never found
        ("thats", "that's"),
        ("that's", "that 's"),
        ("Joe's", "joe 's"),
    ],
)
def test_contractions(answer, expected):
    assert normalise(answer) == expected
