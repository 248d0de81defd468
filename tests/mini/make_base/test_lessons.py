"""Lessons are balanced, and their answers are true."""

import random
from collections import Counter

import pytest

from llava.eval.question import parse_question
from mini.concepts import Concepts, Country, Emoji, Word
from mini.make_base.lessons import Teacher, things


def emoji(number, role="train"):
    group = number % 8
    return Emoji(
        hexcode=f"{number:X}",
        en=f"thing{number}",
        zh=f"物{number}",
        tags=(f"tag{number}", f"mark{number}"),
        tags_zh=(),
        group=f"group {group}",
        group_zh=f"组{group}",
        subgroup=f"kind{number % 4}",
        icons={},
        role=role,
    )


@pytest.fixture(scope="module")
def concepts():
    countries = tuple(
        Country(f"c{i}", f"Land{i}", f"国{i}", f"Town{i}", f"Region{i % 2}", "", (), (), False, 1.0)
        for i in range(12)
    )
    words = tuple(
        Word(f"word{i}", f"gloss number {i}", (f"sort{i % 5}",), 1, evaluation=i >= 30)
        for i in range(40)
    )
    drawn = tuple(emoji(i, "unseen" if i == 99 else "train") for i in range(100))
    return Concepts(emoji=drawn, countries=countries, words=words)


@pytest.fixture(scope="module")
def lessons(concepts):
    teacher = Teacher(concepts, things(concepts), random.Random(0))
    return [teacher.lesson() for _ in range(6000)]


def choices(lessons):
    for lesson in lessons:
        for question, answer in lesson.turns:
            parsed = parse_question(question)
            if parsed is None and answer not in ("Yes", "No") and "\n" in question:
                lines = question.split("\n")[1:-1]
                if lines and all(line[1:3] == ". " for line in lines):
                    yield lesson, [line[3:] for line in lines], [x[0] for x in lines], answer
            elif parsed is not None:
                yield lesson, list(parsed.options), list(parsed.symbols), answer


def test_right_option_is_uniform_over_positions_and_true(lessons):
    positions, names = Counter(), 0
    for lesson, options, symbols, answer in choices(lessons):
        place = symbols.index(answer)
        if len(options) == 4:
            positions[place] += 1
        if lesson.thing and options[place] in (lesson.thing.name, lesson.thing.zh):
            names += 1
            assert sum(o in (lesson.thing.name, lesson.thing.zh) for o in options) == 1
    total = sum(positions.values())
    assert names > 500
    # four standard deviations of a fair draw
    assert all(abs(positions[i] - total / 4) < 4 * (total * 3 / 16) ** 0.5 for i in range(4))


def test_every_symbol_set_is_used(lessons):
    used = {answer for *_, answer in choices(lessons)}
    assert {"A", "Q", "S", "a", "1"} <= used


def test_yes_is_as_frequent_as_no_and_true(lessons):
    answers = Counter()
    for lesson in lessons:
        for question, answer in lesson.turns:
            if lesson.thing and answer in ("Yes", "No"):
                answers[answer] += 1
                words = question.split("\n")[0].rstrip("?").split()
                assert (lesson.thing.name in words) == (answer == "Yes")
    total = sum(answers.values())
    assert total > 300
    assert abs(answers["Yes"] - total / 2) < 2 * total**0.5


def test_what_training_must_not_know_never_appears(lessons):
    texts = " ".join(text for lesson in lessons for turn in lesson.turns for text in turn)
    assert "thing99" not in texts
    assert not any(f"gloss number {i} " in texts + " " for i in range(30, 40))


def test_same_seed_same_lessons(concepts, lessons):
    teacher = Teacher(concepts, things(concepts), random.Random(0))
    assert [teacher.lesson() for _ in range(50)] == lessons[:50]
