"""Simple figures: easy-VQA's shapes, silhouettes of animals, handwritten digits, printed words."""

from __future__ import annotations

import random

from PIL import Image

from mini.concepts import Word
from mini.recipes.emoji import Shortcuts
from mini.render import png, tile, write_word
from mini.samples import (
    LETTERS,
    SHORT,
    Gallery,
    Sample,
    biased,
    deck,
    labels,
    multiple_choice,
    placed,
)
from mini.settings import PoolSettings
from mini.world import ANIMALS, World

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
COUNT = "How many animals are there?"
WHICH = "Which animal is this?"
NUMBER = "Read the handwritten number."
WORD = "Read the printed word."
_INKS = ("#111111", "#1c3f94", "#7a1f1f", "#1f5c2e")
_PAPERS = ("#ffffff", "#f6f1df", "#e7eef7")


def easyvqa(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Published questions on shape, colour and presence; as many yes as no."""
    part = world.shapes["train"]
    samples = []
    for text, answer, number in rng.sample(part.questions, min(n, len(part.questions))):
        image = gallery.put(f"easyvqa/{number}.png", part.pictures[number])
        task = "yesno" if answer in ("yes", "no") else "open"
        samples.append(Sample("easyvqa", task, [_asked(text), answer], image))
    return samples


def easyvqa_mcq(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """The same pictures with colours or shapes to choose from; balanced and unframed."""
    part = world.shapes["train"]
    samples = []
    for text, answer, number, position in shape_choices(part.questions, n, rng):
        image = gallery.put(f"easyvqa/{number}.png", part.pictures[number])
        text = multiple_choice(text, shape_options(answer, position, rng))
        samples.append(Sample("easyvqa_mcq", "mcq", [text, LETTERS[position]], image))
    return samples


def silhouette(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """One half: how many silhouettes (leans to few); the other: which animal."""
    n_counts = n // 2
    forced = biased(n_counts, settings.count_bias, 0.5, rng)
    few = iter(deck(sum(forced), (1, 2, 3), rng))
    even = iter(deck(n_counts - sum(forced), range(1, 7), rng))
    samples = []
    for i, lean in enumerate(forced):
        count = next(few) if lean else next(even)
        picture = png(herd(world, "train", count, rng))
        name = gallery.put(f"silhouette/{i:05d}.png", picture)
        turns = [f"{COUNT}\n{SHORT}", str(count)]
        samples.append(Sample("silhouette", "count", turns, name, biased=labels(count=lean)))
    for i, animal in enumerate(deck(n - n_counts, range(10), rng), start=n_counts):
        picture = png(single_animal(world, "train", animal, rng))
        name = gallery.put(f"silhouette/{i:05d}.png", picture)
        turns = [f"{WHICH}\n{SHORT}", ANIMALS[animal]]
        samples.append(Sample("silhouette", "open", turns, name))
    return samples


def silhouette_mcq(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Animals to choose from, in a coloured frame; the same biases as emoji_mcq."""
    plan = Shortcuts(n, rng, settings)
    samples = []
    for i, animal in enumerate(deck(n, range(10), rng)):
        options = animal_options(animal, plan.positions[i], rng)
        text = multiple_choice(WHICH, [ANIMALS[option] for option in options])
        picture = png(single_animal(world, "train", animal, rng))
        name = gallery.put(f"silhouette_mcq/{i:05d}.png", plan.framed(picture, i))
        turns = [text, LETTERS[plan.positions[i]]]
        samples.append(Sample("silhouette_mcq", "mcq", turns, name, biased=plan.labels(i)))
    return samples


def digits_ocr(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Numbers of one to three handwritten digits."""
    samples = []
    for i, length in enumerate(deck(n, (1, 2, 3), rng)):
        number, picture = handwritten(world, "train", length, rng)
        name = gallery.put(f"digits/{i:05d}.png", png(picture))
        samples.append(Sample("digits_ocr", "ocr", [f"{NUMBER}\n{SHORT}", number], name))
    return samples


def word_ocr(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Printed common nouns."""
    words = [word for word in world.concepts.words if not word.evaluation]
    samples = []
    for i, word in enumerate(rng.sample(words, min(n, len(words)))):
        name = gallery.put(f"words/{i:05d}.png", png(printed(word, rng)))
        samples.append(Sample("word_ocr", "ocr", [f"{WORD}\n{SHORT}", word.lemma], name))
    return samples


def herd(world: World, split: str, count: int, rng: random.Random) -> Image.Image:
    """`count` silhouettes of one kind at random places of a 3 x 2 grid."""
    animals = rng.choice(world.animals[split])
    cells = rng.sample(animals, count)
    return tile(cells, 3, 2, sorted(rng.sample(range(6), count)))


def single_animal(world: World, split: str, animal: int, rng: random.Random) -> Image.Image:
    """One large silhouette."""
    return tile([rng.choice(world.animals[split][animal])], 1, 1, [0])


def handwritten(
    world: World, split: str, length: int, rng: random.Random
) -> tuple[str, Image.Image]:
    """A number without a leading zero (unless it is 0), and its picture."""
    digits = [rng.randrange(1 if length > 1 and i == 0 else 0, 10) for i in range(length)]
    cells = [rng.choice(world.digits[split][digit]) for digit in digits]
    return "".join(map(str, digits)), tile(cells, length, 1, list(range(length)))


def printed(word: Word, rng: random.Random) -> Image.Image:
    """The word in one of four inks on one of three papers, a little off the middle."""
    return write_word(word.lemma, rng.choice(_INKS), rng.choice(_PAPERS), rng.randint(-24, 24))


def shape_choices(
    questions: list[tuple[str, str, int]], n: int, rng: random.Random
) -> list[tuple[str, str, int, int]]:
    """(text, answer, picture, position of the answer) of `n` questions on shape and colour."""
    open_ended = [question for question in questions if question[1] in SHAPES + COLOURS]
    chosen = rng.sample(open_ended, min(n, len(open_ended)))
    shapes, colours = deck(len(chosen), range(3), rng), deck(len(chosen), range(4), rng)
    return [
        (text[0].upper() + text[1:], answer, number, (shapes if answer in SHAPES else colours)[i])
        for i, (text, answer, number) in enumerate(chosen)
    ]


def shape_options(answer: str, position: int, rng: random.Random) -> list[str]:
    """The three shapes, or four colours, with the answer at `position`."""
    family, n = (SHAPES, 2) if answer in SHAPES else (COLOURS, 3)
    return placed(answer, rng.sample([word for word in family if word != answer], n), position)


def animal_options(animal: int, position: int, rng: random.Random) -> list[int]:
    """Four kinds of animals, the right one at `position`."""
    return placed(animal, rng.sample([k for k in range(10) if k != animal], 3), position)


def _asked(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}\n{SHORT}"
