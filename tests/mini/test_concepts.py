"""The split rules, and that what is taught is ordinary, screened text."""

from __future__ import annotations

import re
from collections import Counter

from mini.concepts import N_EVALUATION, N_UNSEEN, _ancestors, _short_gloss, _Synset, _teachable


def test_roles_decide_which_views_training_sees(concepts):
    roles = Counter(emoji.role for emoji in concepts.emoji)
    assert roles["evaluation"] == N_EVALUATION and roles["unseen"] == N_UNSEEN
    for emoji in concepts.emoji:
        styles = emoji.training_styles
        assert "3d" not in styles
        if emoji.role == "evaluation":
            assert styles == ("noto",) and "3d" in emoji.icons
        if emoji.role == "unseen":
            assert styles == ()


def test_names_are_distinct_and_plain(concepts):
    for names in (
        [e.en for e in concepts.emoji],
        [e.zh for e in concepts.emoji],
        [c.en for c in concepts.countries],
        [w.lemma for w in concepts.words],
        [e.name for e in concepts.elements],
    ):
        assert max(Counter(names).values()) == 1
    assert not any(re.search("[’“”:]", e.en) for e in concepts.emoji)


def test_one_sense_a_lemma_and_no_gloss_twice(concepts):
    words = concepts.words
    assert len(words) > 3000
    assert len({w.gloss for w in words}) > 0.995 * len(words)  # a few senses are worded alike
    held_out = sum(w.evaluation for w in words) / len(words)
    assert 0.25 < held_out < 0.35


def test_glosses_are_short_screened_and_do_not_name_the_word():
    assert _short_gloss('(biology) a (small) unit; "the cell"') == "a small unit".replace(
        "small ", ""
    )
    assert _teachable("spoon", "a piece of cutlery with a shallow bowl")
    assert not _teachable("spoon", "a spoonful of something sweet")
    assert not _teachable("spoon", "too short")
    assert not _teachable("thing", "the act of murdering somebody")


def test_ancestors_are_nearest_first_without_roots():
    synsets = {
        "1": _Synset(("dog",), ("2", "3"), ""),
        "2": _Synset(("canine",), ("4",), ""),
        "3": _Synset(("pet",), ("4",), ""),
        "4": _Synset(("animal",), ("5",), ""),
        "5": _Synset(("entity",), (), ""),
    }
    assert _ancestors("1", synsets) == ("canine", "pet", "animal")


def test_facts(concepts):
    countries = {c.code: c for c in concepts.countries}
    assert (countries["fr"].capital, countries["fr"].zh) == ("Paris", "法国")
    assert "Spain" in countries["fr"].neighbours
    gold = next(e for e in concepts.elements if e.symbol == "Au")
    assert (gold.number, gold.name, gold.period, gold.group) == (79, "gold", 6, 11)
    truck = next(w for w in concepts.words if w.lemma == "truck")
    assert "vehicle" in truck.hypernyms
