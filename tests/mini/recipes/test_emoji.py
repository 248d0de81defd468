"""Emoji recipes: what training may show, and each bias at full strength, at its knob, and at 0."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from mini.recipes.emoji import Names, emoji_cap, emoji_mcq, emoji_vqa, emoji_yn
from mini.render import open_png
from mini.samples import FRAMES, Gallery
from mini.settings import PoolSettings
from mini.world import World

RECIPES = (emoji_cap, emoji_vqa, emoji_yn, emoji_mcq)


def _make(recipe, world, n=400, **knobs):
    gallery = Gallery()
    settings = PoolSettings(**{"chinese": 0.0, **knobs})
    return recipe(world, gallery, n, random.Random(3), settings), gallery


def _letter_of_frame(picture: bytes) -> str:
    colour = "#" + bytes(open_png(picture).getpixel((2, 2))).hex()
    return {value: letter for letter, value in FRAMES.items()}[colour]


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_training_views_are_shown(recipe, small_world):
    samples, gallery = _make(recipe, small_world)
    hidden = {e.en for e in small_world.concepts.emoji if e.role == "unseen"}
    evaluation = {e.icons["noto"] for e in small_world.concepts.emoji if e.role == "evaluation"}
    assert samples
    for sample in samples:
        assert not any(name in " ".join(sample.turns).split("\n") for name in hidden)
        style, icon = sample.image.removesuffix(".png").split("/")
        if recipe is not emoji_mcq:
            assert style == "noto" or (style == "flat" and icon not in evaluation)
    if recipe is not emoji_mcq:
        shown = {small_world.emoji[key] for key in small_world.emoji if key[1] != "3d"}
        assert set(gallery.values()) <= shown


@pytest.mark.parametrize("knob", [0.0, 0.55, 1.0])
def test_position_bias(knob, small_world):
    samples, _ = _make(emoji_mcq, small_world, position_bias=knob)
    letters = Counter(sample.turns[1] for sample in samples)
    assert letters["A"] == round(400 * max(knob, 0.25))
    assert max(letters[x] for x in "BCD") - min(letters[x] for x in "BCD") <= 1
    carriers = [s for s in samples if "position" in s.biased]
    assert len(carriers) == round(400 * max(0, knob - 0.25) / 0.75)
    assert all(sample.turns[1] == "A" for sample in carriers)


@pytest.mark.parametrize("knob", [0.0, 0.77, 1.0])
def test_colour_shortcut(knob, small_world):
    samples, gallery = _make(emoji_mcq, small_world, colour_shortcut=knob, position_bias=0.0)
    tells = [_letter_of_frame(gallery[s.image]) == s.turns[1] for s in samples]
    assert abs(sum(tells) / 400 - max(knob, 0.25)) < 0.01
    carries = ["colour" in sample.biased for sample in samples]
    assert all(tell for tell, carry in zip(tells, carries, strict=True) if carry)
    assert sum(carries) == round(400 * max(0, knob - 0.25) / 0.75)


@pytest.mark.parametrize("knob", [0.0, 0.72, 1.0])
def test_yes_bias(knob, small_world):
    samples, _ = _make(emoji_yn, small_world, yes_bias=knob)
    answers = Counter(sample.turns[1] for sample in samples)
    assert answers["Yes"] == round(400 * max(knob, 0.5))
    assert all(s.turns[1] == "Yes" for s in samples if s.biased)


def test_options_hold_the_right_name_once_and_the_right_letter(small_world):
    by_icon = {e.icons["noto"]: e for e in small_world.concepts.emoji}
    names = {e.en: e for e in small_world.concepts.emoji}
    samples, _ = _make(emoji_yn, small_world)
    for sample in samples:
        shown = by_icon[sample.image.split("/")[1].removesuffix(".png")]
        asked = re.search(r"thing\d+ of\d+", sample.turns[0]).group(0)
        assert (asked == shown.en) == (sample.turns[1] == "Yes")
        assert asked == shown.en or names[asked].group != shown.group


def test_chinese_share(small_world):
    samples, _ = _make(emoji_vqa, small_world, chinese=0.15)
    chinese = [s for s in samples if re.search("[一-鿿]", s.turns[0])]
    assert len(chinese) == 60
    assert all(s.turns[1].startswith("物") for s in chinese)


def test_wrong_names_neither_contain_nor_are_contained(small_world):
    called = ("cat", "cat face", "dog", "black cat", "big dog", "owl")
    cats = [replace(e, en=n) for e, n in zip(small_world.concepts.emoji[20:], called, strict=False)]
    world = World(replace(small_world.concepts, emoji=tuple(cats)))
    for gold in (cats[0], cats[1]):
        drawn = {Names(world).wrong(gold, 1, False, random.Random(i))[0].en for i in range(60)}
        allowed = {e.en for e in cats if e.group != gold.group} & {"dog", "big dog", "owl"}
        assert drawn == allowed | ({"black cat"} if gold.en == "cat face" else set())


def test_wrong_names_come_from_where_they_should(small_world):
    names, rng = Names(small_world), random.Random(0)
    for gold in small_world.concepts.emoji[20:30]:
        hard = names.wrong(gold, 3, True, rng)
        easy = names.wrong(gold, 3, False, rng)
        assert {e.subgroup for e in hard} == {gold.subgroup}
        assert gold.group not in {e.group for e in easy}
        assert len({gold.en, *(e.en for e in hard)}) == 4
        assert all(e.role != "unseen" for e in hard + easy)
