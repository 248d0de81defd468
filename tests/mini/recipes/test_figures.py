"""Figures: right answers, the count bias, and no picture of the evaluation split."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from mini.recipes.figures import (
    COLOURS,
    SHAPES,
    digits_ocr,
    easyvqa,
    easyvqa_mcq,
    handwritten,
    herd,
    shape_options,
    silhouette,
    silhouette_mcq,
    word_ocr,
)
from mini.render import open_png
from mini.samples import Gallery
from mini.settings import PoolSettings
from mini.world import ANIMALS


def _make(recipe, world, n=200, **knobs):
    gallery = Gallery()
    return recipe(world, gallery, n, random.Random(3), PoolSettings(**knobs)), gallery


@pytest.mark.parametrize("knob", [0.0, 0.8, 1.0])
def test_count_bias(knob, pypi_world):
    samples, gallery = _make(silhouette, pypi_world, count_bias=knob)
    counts = [int(s.turns[1]) for s in samples if s.task == "count"]
    assert abs(sum(c <= 3 for c in counts) / len(counts) - max(knob, 0.5)) <= 0.02
    assert all(int(s.turns[1]) <= 3 for s in samples if s.biased)
    if not knob:
        assert max(Counter(counts).values()) - min(Counter(counts).values()) <= 1
    for sample in samples[:20]:  # as many cells of the 3 x 2 grid are inked as the answer says
        image = np.asarray(open_png(gallery[sample.image]))[16:80].reshape(2, 32, 3, 32, 3)
        assert (image.min(axis=(1, 3, 4)) < 128).sum() == int(sample.turns[1])


def test_silhouette_choice_names_the_animal(pypi_world):
    samples, gallery = _make(silhouette_mcq, pypi_world, 80)
    assert len(gallery) == 80
    for sample in samples:
        options = dict(line.split(". ") for line in sample.turns[0].split("\n")[1:5])
        assert len(set(options.values())) == 4 and options[sample.turns[1]] in ANIMALS
    assert {s.biased for s in samples} == {"", "position", "colour", "position+colour"}


def test_splits_share_no_silhouette_or_digit(pypi_world):
    for parts in (pypi_world.animals, pypi_world.digits):
        train, held_out = (
            {image.tobytes() for images in parts[split] for image in images}
            for split in ("train", "evaluation")
        )
        assert not train & held_out
        assert 0.15 < len(held_out) / (len(train) + len(held_out)) < 0.25


def test_published_questions_keep_their_picture(pypi_world):
    part = pypi_world.shapes["train"]
    known = {(text.lower(), answer, part.pictures[n]) for text, answer, n in part.questions}
    samples, gallery = _make(easyvqa, pypi_world)
    for sample in samples:
        text = sample.turns[0].split("\n")[0].lower()
        assert (text, sample.turns[1], gallery[sample.image]) in known
    answers = Counter(sample.turns[1] for sample in samples)
    assert abs(answers["yes"] - answers["no"]) < 40
    for sample in _make(easyvqa_mcq, pypi_world)[0]:
        options = dict(line.split(". ") for line in sample.turns[0].split("\n")[1:-1])
        family = SHAPES if len(options) == 3 else COLOURS
        assert set(options.values()) <= set(family)
        assert sample.turns[1] in options


def test_shape_options():
    rng = random.Random(0)
    assert sorted(shape_options("circle", 1, rng)) == sorted(SHAPES)
    assert shape_options("teal", 3, rng)[3] == "teal"


def test_numbers_have_no_leading_zero(pypi_world):
    rng = random.Random(0)
    numbers = [handwritten(pypi_world, "train", length, rng)[0] for length in (1, 2, 3) * 60]
    assert all(str(int(number)) == number for number in numbers)
    assert {len(s.turns[1]) for s in _make(digits_ocr, pypi_world, 30)[0]} == {1, 2, 3}


def test_herds_and_words(pypi_world, small_world):
    image = np.asarray(herd(pypi_world, "train", 6, random.Random(0)))
    assert (image[16:80] < 128).any() and (image[:16] == 255).all()
    samples, _ = _make(word_ocr, small_world, 20)
    held_out = {word.lemma for word in small_world.concepts.words if word.evaluation}
    assert not held_out & {sample.turns[1] for sample in samples}
