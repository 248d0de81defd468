"""Questions on knowledge: fair, balanced, and right by construction."""

from __future__ import annotations

from collections import Counter

import pytest

from mini.eval.knowledge import YOUNG, make_exams, make_facts, make_knowledge, make_passages
from mini.recipes.facts import elements
from mini.world import ANIMALS

LETTERS = "ABCDE"


@pytest.fixture(scope="module")
def world(small_world, pypi_world):
    """Flags and words of the invented world, figures and elements of the real one."""
    parts = {name: getattr(pypi_world, name) for name in ("shapes", "animals", "digits")}
    concepts = {**vars(small_world.concepts), "elements": pypi_world.concepts.elements}
    concepts = type(small_world.concepts)(**concepts)
    return type(small_world)(**{**vars(small_world), **parts, "concepts": concepts})


def test_knowledge_is_balanced_and_needs_its_picture(world, pypi_world):
    items = make_knowledge(world, 12)
    assert Counter(item.category for item in items) == {"capital": 12, "animal": 12}
    assert Counter(item.answer for item in items) == dict.fromkeys(range(4), 6)
    assert all(len(set(item.options)) == 4 and item.picture for item in items)
    capitals = {world.waving[c.code]: c.capital for c in world.concepts.countries}
    for item in items[:12]:
        assert item.options[item.answer] == capitals[item.picture]
    assert [item.category for item in make_knowledge(pypi_world, 12)] == ["animal"] * 12
    assert set(YOUNG) == set(ANIMALS)


def test_exams_have_one_to_seven_pictures(world):
    exams = make_exams(world, 8)
    subjects = Counter(exam.subject for exam in exams)
    assert subjects == {"Biology": 9, "Geography": 8, "Math": 9}
    assert Counter(len(exam.pictures) for exam in exams) == {4: 8, 7: 1, 1: 8, 2: 9}
    assert [exam.subject for exam in exams if not exam.options] == ["Math"]
    for exam in exams:
        text = exam.question + " ".join(exam.options)
        assert all(f"<image {n + 1}>" in text for n in range(len(exam.pictures)))
        assert not exam.options or exam.answer in LETTERS[: len(exam.options)]


def test_facts_are_held_out_and_balanced(world, pypi_world):
    items = make_facts(world, 20)
    assert Counter(item.category for item in items) == {"element": 20, "word": 20}
    assert Counter(item.answer for item in items) == dict.fromkeys(range(4), 10)
    assert all(item.picture is None for item in items)
    glosses = {word.gloss: word for word in world.concepts.words}
    for item in items[20:]:
        assert all(glosses[option].evaluation for option in item.options)
        assert glosses[item.options[item.answer]].lemma in item.question
    assert len(make_facts(pypi_world, 20)) == 20


def test_passages_answer_their_questions(pypi_world):
    passages = make_passages(pypi_world, 40)
    assert Counter(item.answer for item in passages) == {True: 20, False: 20}
    known = {element.name: element for element in elements(pypi_world, True)}
    for item in passages:
        element = known[item.passage.split()[0].lower()]
        values = {element.symbol, str(element.number), element.series}
        asked = next(v for v in ends(item.question, element.name))
        assert (asked in values) == item.answer, item
        assert asked in item.passage or not item.answer


def ends(question, name):
    """The value that a question asks about."""
    for start, end in (
        ("is ", f" the symbol of {name}"),
        (f"does {name} have the atomic number ", ""),
        (f"does {name} belong to the series ", ""),
    ):
        if question.startswith(start) and question.endswith(end):
            yield question[len(start) : len(question) - len(end)]
