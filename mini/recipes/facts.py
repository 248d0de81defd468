"""Text only: what words mean, what kinds things are, and the chemical elements."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mini.concepts import Element, Word, rank
from mini.samples import (
    LETTERS,
    SHORT,
    Gallery,
    Sample,
    biased,
    deck,
    favoured,
    labels,
    multiple_choice,
    placed,
)
from mini.settings import PoolSettings
from mini.world import World

_NEAR = 3  # hypernyms further up are too general to ask about
_ELEMENT_EVALUATION_SHARE = 0.25


def wordnet_mcq(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Which gloss belongs to a word; leans to the longest."""
    words = [word for word in world.concepts.words if not word.evaluation]
    chosen = _askable(words, rng)[:n]
    forced = biased(len(chosen), settings.length_bias, 0.25, rng)
    longer = favoured(forced, 0, range(4), rng)
    positions = deck(len(chosen), range(4), rng)
    samples = []
    for i, word in enumerate(chosen):
        options = placed(word.gloss, wrong_glosses(word, words, longer[i], rng), positions[i])
        turns = [multiple_choice(meaning(word), options), LETTERS[positions[i]]]
        samples.append(Sample("wordnet_mcq", "text_mcq", turns, biased=labels(length=forced[i])))
    return samples


def wordnet_yn(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Whether a word is a kind of another; as many yes as no."""
    words = [word for word in world.concepts.words if not word.evaluation]
    chosen = rng.sample(words, min(n, len(words)))
    samples = []
    for word, yes in zip(chosen, deck(len(chosen), (True, False), rng), strict=True):
        kind = rng.choice(word.hypernyms[:_NEAR])
        while not yes and (kind in word.hypernyms or kind == word.lemma):
            kind = rng.choice(rng.choice(words).hypernyms[:_NEAR])
        text = f'Is "{word.lemma}" a kind of {kind}?\n{SHORT}'
        samples.append(Sample("wordnet_yn", "text_yesno", [text, "Yes" if yes else "No"]))
    return samples


def element_qa(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Symbol, then atomic number or series, of each element that training may know."""
    known = elements(world, evaluation=False)
    samples = []
    for i in range(min(n, 2 * len(known))):
        element = known[i % len(known)]
        turns = [f"What is the chemical symbol of {element.name}?\n{SHORT}", element.symbol]
        if i < len(known):
            turns += ["What is its atomic number?", str(element.number)]
        else:
            turns = [f"Which element has the symbol {element.symbol}?\n{SHORT}", element.name]
            turns += ["Which series does it belong to?", element.series]
        samples.append(Sample("element_qa", "fact", turns))
    return samples


def element_mcq(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Symbols, names and series to choose from; balanced."""
    samples = []
    for text, options, position in element_choices(elements(world, evaluation=False), n, rng):
        turns = [multiple_choice(text, options), LETTERS[position]]
        samples.append(Sample("element_mcq", "text_mcq", turns))
    return samples


def elements(world: World, evaluation: bool) -> list[Element]:
    """The elements of one split."""
    share = _ELEMENT_EVALUATION_SHARE
    return [
        element
        for element in world.concepts.elements
        if (rank(element.name) / 2**64 < share) == evaluation
    ]


def element_choices(
    known: Sequence[Element], n: int, rng: random.Random
) -> list[tuple[str, list[str], int]]:
    """(question, options, position of the right one): symbol, name or series, in turn."""
    series = sorted({element.series for element in known})
    questions = []
    for i, position in enumerate(deck(min(n, 3 * len(known)), range(4), rng)):
        element, kind = known[i % len(known)], i // len(known)
        others = rng.sample([other for other in known if other != element], 3)
        if kind == 0:
            text, gold = f"What is the chemical symbol of {element.name}?", element.symbol
            wrong = [other.symbol for other in others]
        elif kind == 1:
            text, gold = f"Which element has the symbol {element.symbol}?", element.name
            wrong = [other.name for other in others]
        else:
            text, gold = f"Which series does {element.name} belong to?", element.series
            wrong = rng.sample([name for name in series if name != gold], 3)
        questions.append((text, placed(gold, wrong, position), position))
    return questions


def meaning(word: Word) -> str:
    """The question on a word's gloss."""
    return f'What does "{word.lemma}" mean?'


def wrong_glosses(
    word: Word, words: Sequence[Word], n_longer: int, rng: random.Random
) -> list[str]:
    """Three glosses of unrelated words, `n_longer` of them longer than the right one."""
    related = {word.lemma, *word.hypernyms[:_NEAR]}
    shorter, longer = [], []
    while len(shorter) < 3 - n_longer or len(longer) < n_longer:
        other = rng.choice(words)
        gap = len(other.gloss) - len(word.gloss)
        if gap and other.lemma != word.lemma and not related & set(other.hypernyms[:_NEAR]):
            side = longer if gap > 0 else shorter
            if other.gloss not in side:
                side.append(other.gloss)
    wrong = shorter[: 3 - n_longer] + longer[:n_longer]
    rng.shuffle(wrong)
    return wrong


def _askable(words: Sequence[Word], rng: random.Random) -> list[Word]:
    """Shuffled, without the very short and very long glosses that have no others on one side."""
    ranked = sorted(words, key=lambda word: len(word.gloss))
    middle = ranked[len(ranked) // 20 : -len(ranked) // 20 or None]
    rng.shuffle(middle)
    return middle
