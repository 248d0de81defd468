"""Clip art and flags: noise, balance, and facts that stay together."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mini.recipes.drawings import caption, clipart_cap, clipart_mcq, country_qa, flag_mcq, flag_vqa
from mini.samples import Gallery
from mini.settings import PoolSettings


def _make(recipe, world, n=400, **knobs):
    return recipe(world, Gallery(), n, random.Random(3), PoolSettings(**knobs))


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_noisy_captions_are_those_of_other_drawings(noise, small_world):
    samples = _make(clipart_cap, small_world, caption_noise=noise)
    own = {f"clipart/{a.path[:-4]}.png": caption(a) for a, _ in small_world.clipart["train"]}
    assert sum(sample.noisy for sample in samples) == round(len(samples) * noise)
    assert all((own[s.image] != s.turns[1]) == bool(s.noisy) for s in samples)
    assert Counter(s.turns[1] for s in samples) == Counter(own.values())


def test_clipart_choice_is_balanced_and_right(small_world):
    samples = _make(clipart_mcq, small_world)
    counts = Counter(sample.turns[1] for sample in samples)
    assert max(counts.values()) - min(counts.values()) <= 1
    kinds = {f"clipart/{a.path[:-4]}.png": a.category for a, _ in small_world.clipart["train"]}
    for sample in samples:
        lines = sample.turns[0].split("\n")
        assert f"{sample.turns[1]}. {kinds[sample.image]}" in lines
        assert len(set(lines)) == 6 and not sample.biased


@pytest.mark.parametrize("knob", [0.0, 0.52])
def test_flags_lean_to_c_among_their_region(knob, small_world):
    samples = _make(flag_mcq, small_world, flag_position_bias=knob)
    assert len(samples) == 32
    letters = Counter(sample.turns[1] for sample in samples)
    assert abs(letters["C"] / 32 - max(knob, 0.25)) <= 1 / 32
    by_code = {country.code: country for country in small_world.concepts.countries}
    for sample in samples:
        country = by_code[sample.image[5:7]]
        options = dict(line.split(". ") for line in sample.turns[0].split("\n")[1:5])
        assert options[sample.turns[1]] in (country.en, country.capital)
        assert all(f" {country.region}" in text for text in options.values())


def test_facts_of_one_country_stay_together(small_world):
    by_code = {country.code: country for country in small_world.concepts.countries}
    for sample in _make(flag_vqa, small_world):
        country = by_code[sample.image[5:7]]
        assert sample.turns[1::2] == [country.en, country.capital, country.region]
    for sample in _make(country_qa, small_world, 5):
        assert sample.image is None
        assert sample.turns[1].split()[1] in sample.turns[0]
