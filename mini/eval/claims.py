"""Printed words to read, and pairs of claims about a picture of which one is true."""

from __future__ import annotations

import random

from mini.concepts import Word
from mini.eval.items import Claim, Open
from mini.recipes.facts import elements
from mini.recipes.figures import COLOURS, WORD, handwritten, herd, printed, single_animal
from mini.render import png
from mini.samples import article, deck
from mini.world import ANIMALS, World


def make_printed(world: World, n: int) -> list[Open]:
    """TextVQA-like: nouns, or names of elements where there are none, each in a picture."""
    rng = random.Random("printed")
    words = rng.sample(known := _words(world), min(n, len(known)))
    return [Open(word.lemma, "word", WORD, word.lemma, png(printed(word, rng))) for word in words]


def make_claims(world: World, n: int) -> list[Claim]:
    """MME-like: `n` pictures for each category that the world has pictures for."""
    rng = random.Random("claims")
    claims = _words_claimed(world, n, rng)
    if world.animals:
        claims += _animals_claimed(world, n, rng) + _counts_claimed(world, n, rng)
    if world.digits:
        claims += _sums_claimed(world, n, rng)
    return claims + (_colours_claimed(world, n, rng) if world.shapes else [])


def _words(world: World) -> list[Word]:
    """Held-out nouns, or held-out elements as such."""
    words = [word for word in world.concepts.words if word.evaluation]
    return words or [Word(e.name, "", (), 0, True) for e in elements(world, True)]


def _words_claimed(world: World, n: int, rng: random.Random) -> list[Claim]:
    claims = []
    for _ in range(n):
        word, other = rng.sample(_words(world), 2)
        true, false = (f'Is the word in the image "{w.lemma}"?' for w in (word, other))
        claims.append(Claim("OCR", png(printed(word, rng)), true, false))
    return claims


def _animals_claimed(world: World, n: int, rng: random.Random) -> list[Claim]:
    claims = []
    for animal in deck(n, range(len(ANIMALS)), rng):
        other = rng.choice([k for k in range(len(ANIMALS)) if k != animal])
        true, false = (f"Is there {article(ANIMALS[k])} in this image?" for k in (animal, other))
        picture = png(single_animal(world, "evaluation", animal, rng))
        claims.append(Claim("existence", picture, true, false))
    return claims


def _counts_claimed(world: World, n: int, rng: random.Random) -> list[Claim]:
    claims = []
    for count in deck(n, range(2, 7), rng):
        other = rng.choice([k for k in range(2, 7) if k != count])
        true, false = (f"Are there {k} animals in this image?" for k in (count, other))
        claims.append(Claim("count", png(herd(world, "evaluation", count, rng)), true, false))
    return claims


def _sums_claimed(world: World, n: int, rng: random.Random) -> list[Claim]:
    claims = []
    for length in deck(n, (1, 2), rng):
        number, picture = handwritten(world, "evaluation", length, rng)
        more, wrong = rng.randint(1, 9), rng.choice((-2, -1, 1, 2))
        total = int(number) + more
        true, false = (
            f"Is {k} the sum of {more} and the number in the image?" for k in (total, total + wrong)
        )
        claims.append(Claim("numerical_calculation", png(picture), true, false))
    return claims


def _colours_claimed(world: World, n: int, rng: random.Random) -> list[Claim]:
    part = world.shapes["evaluation"]
    known = [(colour, number) for _, colour, number in part.questions if colour in COLOURS]
    claims = []
    for colour, number in rng.sample(known, min(n, len(known))):
        other = rng.choice([word for word in COLOURS if word != colour])
        true, false = (f"Is the shape in the image {word}?" for word in (colour, other))
        claims.append(Claim("color", part.pictures[number], true, false))
    return claims
