"""Printed words and claims: two a picture, one true."""

from __future__ import annotations

from collections import Counter

from mini.eval.claims import make_claims, make_printed
from mini.recipes.facts import elements
from mini.world import World


def test_printed_words_are_held_out(small_world, pypi_world):
    held_out = {word.lemma for word in small_world.concepts.words if word.evaluation}
    items = make_printed(small_world, 30)
    assert len({item.answer for item in items}) == 30
    assert {item.answer for item in items} <= held_out
    names = {element.name for element in elements(pypi_world, True)}
    assert {item.answer for item in make_printed(pypi_world, 10)} <= names


def test_claims_of_every_category(pypi_world):
    claims = make_claims(pypi_world, 6)
    assert Counter(claim.category for claim in claims) == dict.fromkeys(
        ("OCR", "existence", "count", "numerical_calculation", "color"), 6
    )
    assert all(claim.true != claim.false and claim.picture for claim in claims)
    assert make_claims(pypi_world, 6) == claims


def test_colours_are_those_of_the_picture(pypi_world):
    part = pypi_world.shapes["evaluation"]
    known = {
        (part.pictures[number], answer)
        for text, answer, number in part.questions
        if "color" in text
    }
    for claim in make_claims(pypi_world, 20):
        if claim.category == "color":
            true, false = (text.split()[-1].rstrip("?") for text in (claim.true, claim.false))
            assert (claim.picture, true) in known and (claim.picture, false) not in known


def test_a_world_without_figures_has_words_alone(small_world):
    bare = World(small_world.concepts)
    assert {claim.category for claim in make_claims(bare, 3)} == {"OCR"}
