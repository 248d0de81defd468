"""Evaluation questions: balanced, answerable, and about what training does not show."""

from __future__ import annotations

from collections import Counter

import pytest

from mini.eval.sets import make_evalsets


@pytest.fixture(scope="module")
def pypi_sets(pypi_world):
    return make_evalsets(pypi_world)


@pytest.fixture(scope="module")
def mixed_world(small_world, pypi_world):
    """Emoji, flags, words and clip art of the invented world, figures of the real one."""
    parts = {name: getattr(pypi_world, name) for name in ("shapes", "animals", "digits")}
    return type(small_world)(**{**vars(small_world), **parts})


@pytest.fixture(scope="module")
def sets(mixed_world):
    return make_evalsets(mixed_world)


def test_right_options_are_spread_evenly(sets, pypi_sets):
    for found in (sets, pypi_sets):
        for items in (found.mcq, found.mixed):
            counts = Counter(item.answer for item in items if len(item.options) == 4)
            assert max(counts.values()) - min(counts.values()) <= 6
            assert all(len(set(item.options)) == len(item.options) for item in items)
            assert len({item.id for item in items}) == len(items)


def test_categories_with_and_without_emoji(sets, pypi_sets):
    assert Counter(item.category for item in sets.mcq) == {
        "fine": 8,
        "coarse": 8,
        "flag": 16,
        "animal": 100,
        "count": 100,
    }
    assert Counter(item.category for item in pypi_sets.mcq) == {
        "animal": 100,
        "count": 100,
        "colour": 200,
        "number": 100,
    }
    assert {item.picture is None for item in pypi_sets.mixed} == {True, False}


def test_chinese_twins_have_as_many_distinct_options(sets, pypi_sets):
    for item in sets.mcq + pypi_sets.mcq:
        question, options = item.zh
        assert len(set(options)) == len(item.options)
        assert any("一" <= character <= "鿿" for character in question)


def test_gold_is_not_told_by_its_length(sets):
    words = [item for item in sets.mixed if item.category == "language science"]
    assert len(words) > 100
    longest = [max(item.options, key=len) == item.options[item.answer] for item in words]
    assert abs(sum(longest) / len(longest) - 0.25) < 0.02


def test_probes_ask_each_picture_with_yes_and_with_no(pypi_sets):
    assert Counter(p.category for p in pypi_sets.yesno) == {
        "adversarial": 200,
        "random": 200,
        "popular": 200,
    }
    for yes, no in zip(pypi_sets.yesno[::2], pypi_sets.yesno[1::2], strict=True):
        assert yes.picture == no.picture and yes.name != no.name
        assert yes.present and not no.present


def test_pictures_and_senses_are_held_out(sets, mixed_world):
    hidden = {key for key in mixed_world.emoji if key[1] == "3d"}
    train = {mixed_world.emoji[key] for key in mixed_world.emoji if key not in hidden}
    train |= {picture for _, picture in mixed_world.clipart["train"]}
    train |= set(mixed_world.flags.values()) | set(mixed_world.shapes["train"].pictures.values())
    assert not train & sets.pictures()
    glosses = {word.gloss for word in mixed_world.concepts.words if not word.evaluation}
    for item in sets.mixed:
        assert not glosses & set(item.options)
    asked = {e.en for e in mixed_world.concepts.emoji if e.role == "unseen"}
    assert len(sets.unseen) == len(asked) == 4


def test_same_questions_every_time(mixed_world, sets):
    assert make_evalsets(mixed_world) == sets
