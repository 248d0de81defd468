"""Text-only recipes: the length bias, true hypernyms, and senses that training may know."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mini.recipes.facts import (
    element_choices,
    element_mcq,
    element_qa,
    elements,
    wordnet_mcq,
    wordnet_yn,
    wrong_glosses,
)
from mini.samples import Gallery
from mini.settings import PoolSettings


def _make(recipe, world, n=300, **knobs):
    return recipe(world, Gallery(), n, random.Random(3), PoolSettings(**knobs))


def _options(sample) -> dict[str, str]:
    return dict(line.split(". ", 1) for line in sample.turns[0].split("\n")[1:5])


@pytest.mark.parametrize("knob", [0.0, 0.55, 1.0])
def test_length_bias(knob, small_world):
    samples = _make(wordnet_mcq, small_world, length_bias=knob)
    longest = []
    for sample in samples:
        options = _options(sample)
        lengths = sorted(map(len, options.values()))
        gold = len(options[sample.turns[1]])
        longest.append(gold == lengths[-1] > lengths[-2])
        assert not sample.biased or longest[-1]
    assert abs(sum(longest) / 300 - max(knob, 0.25)) <= 0.01
    assert Counter(s.turns[1] for s in samples) == dict.fromkeys("ABCD", 75)


def test_training_asks_only_its_own_senses(small_world):
    glosses = {w.lemma: w.gloss for w in small_world.concepts.words}
    held_out = {w.gloss for w in small_world.concepts.words if w.evaluation}
    for sample in _make(wordnet_mcq, small_world):
        options = _options(sample)
        lemma = sample.turns[0].split('"')[1]
        assert options[sample.turns[1]] == glosses[lemma]
        assert not held_out & set(options.values())


def test_hypernyms_are_true_for_yes_and_false_for_no(small_world):
    kinds = {w.lemma: w.hypernyms for w in small_world.concepts.words}
    samples = _make(wordnet_yn, small_world)
    for sample in samples:
        lemma = sample.turns[0].split('"')[1]
        kind = sample.turns[0].split("kind of ")[1].split("?")[0]
        assert (kind in kinds[lemma]) == (sample.turns[1] == "Yes")
    assert Counter(s.turns[1] for s in samples) == {"Yes": 150, "No": 150}


@pytest.mark.parametrize("n_longer", range(4))
def test_wrong_glosses_have_the_length_asked_for(n_longer, small_world):
    words, rng = small_world.concepts.words, random.Random(1)
    for word in words[20:40]:
        wrong = wrong_glosses(word, words, n_longer, rng)
        assert len(set(wrong)) == 3
        assert sum(len(gloss) > len(word.gloss) for gloss in wrong) == n_longer
        assert all(len(gloss) != len(word.gloss) for gloss in wrong)


def test_elements_are_divided_and_questions_true(pypi_world):
    train, held_out = elements(pypi_world, False), elements(pypi_world, True)
    assert len(train) + len(held_out) == 118 and 20 < len(held_out) < 40
    asked = _make(element_qa, pypi_world, 118) + _make(element_mcq, pypi_world, 240)
    assert len(asked) > 320
    text = "\n".join("\n".join(sample.turns) for sample in asked)
    assert not any(f"of {e.name}?" in text or f"does {e.name} " in text for e in held_out)
    facts = {e.name: e for e in held_out} | {e.symbol: e for e in held_out}
    for question, options, position in element_choices(held_out, 90, random.Random(0)):
        words = question.rstrip("?").split()
        element = next(facts[word] for word in words[1:] if word in facts)
        gold = options[position]
        assert gold in (element.symbol, element.name, element.series)
        assert len(set(options)) == 4
