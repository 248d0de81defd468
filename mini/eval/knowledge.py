"""Questions that ask what one knows: about a picture, about several, and about none."""

from __future__ import annotations

import random

from mini.concepts import Country, Element
from mini.eval.items import Choice, Exam, Passage
from mini.recipes.drawings import CAPITAL, WHOSE, neighbours
from mini.recipes.facts import element_choices, elements, meaning, wrong_glosses
from mini.recipes.figures import handwritten, single_animal
from mini.render import png
from mini.samples import LETTERS, article, deck, placed
from mini.world import ANIMALS, World

YOUNG = dict(
    zip(ANIMALS, "cub chick kitten calf puppy calf calf foal lamb foal".split(), strict=True)
)
YOUNG_ONE = "What is the young of this animal called?"


def make_knowledge(world: World, n: int) -> list[Choice]:
    """A-OKVQA-like: the capital of a flag's country, the young of an animal; `n` of each."""
    rng = random.Random("knowledge")
    items = []
    flags = _flags(world, n, rng)
    for country, position in zip(flags, deck(len(flags), range(4), rng), strict=True):
        wrong = [other.capital for other in neighbours(world, country, 3, rng)]
        options = tuple(placed(country.capital, wrong, position))
        picture = world.waving[country.code]
        items.append(Choice("", "capital", CAPITAL, options, position, picture))
    n = n if world.animals else 0
    for animal, position in zip(deck(n, range(10), rng), deck(n, range(4), rng), strict=True):
        right = YOUNG[ANIMALS[animal]]
        wrong = rng.sample(sorted({*YOUNG.values()} - {right}), 3)
        picture = png(single_animal(world, "evaluation", animal, rng))
        options = tuple(placed(right, wrong, position))
        items.append(Choice("", "animal", YOUNG_ONE, options, position, picture))
    return items


def make_exams(world: World, n: int) -> list[Exam]:
    """MMMU-like: `n` questions with options a subject; the mathematicians' last one has none."""
    rng = random.Random("exams")
    exams = _find_animals(world, n, rng) + _count_birds(world, rng) if world.animals else []
    exams += _find_flags(world, n, rng)
    return exams + (_sums(world, n, rng) if world.digits else [])


def make_facts(world: World, n: int) -> list[Choice]:
    """ARC-like, text alone: `n` questions on elements, and `n` on words where there are any."""
    rng = random.Random("facts")
    asked = element_choices(elements(world, True), n, rng)
    items = [Choice("", "element", text, tuple(o), gold) for text, o, gold in asked]
    words = [word for word in world.concepts.words if word.evaluation]
    middle = sorted(words, key=lambda word: len(word.gloss))[20:-20]
    chosen = rng.sample(middle, min(n, len(middle)))
    longer, positions = (deck(len(chosen), range(4), rng) for _ in range(2))
    for word, n_longer, position in zip(chosen, longer, positions, strict=True):
        options = tuple(placed(word.gloss, wrong_glosses(word, words, n_longer, rng), position))
        items.append(Choice("", "word", meaning(word), options, position))
    return items


def make_passages(world: World, n: int) -> list[Passage]:
    """BoolQ-like, text alone: what a passage on an element says; as many yes as no."""
    rng = random.Random("passages")
    known = elements(world, True)
    passages = []
    for i, yes in enumerate(deck(n if known else 0, (True, False), rng)):
        element = known[i % len(known)]
        other = rng.choice([e for e in known if e.series != element.series])
        said = (element if yes else other), element.name
        question = _questions(*said)[i // len(known) % 3]
        passages.append(Passage(_passage(element), question, yes))
    return passages


def _find_animals(world: World, n: int, rng: random.Random) -> list[Exam]:
    exams = []
    for position in deck(n, range(4), rng):
        kinds = rng.sample(range(len(ANIMALS)), 4)
        pictures = tuple(png(single_animal(world, "evaluation", kind, rng)) for kind in kinds)
        question = f"Which picture shows {article(ANIMALS[kinds[position]])}?"
        exams.append(Exam("Biology", question, marks(4), LETTERS[position], pictures))
    return exams


def _count_birds(world: World, rng: random.Random) -> list[Exam]:
    """The one question with seven pictures, three of them of birds."""
    kinds = [ANIMALS.index(name) for name in ("bird", "cat", "bird", "cow", "dog", "bird", "bear")]
    pictures = tuple(png(single_animal(world, "evaluation", kind, rng)) for kind in kinds)
    question = f"How many of {', '.join(marks(7))} show a bird?"
    return [Exam("Biology", question, ("2", "3", "4", "5", "6"), "B", pictures)]


def _find_flags(world: World, n: int, rng: random.Random) -> list[Exam]:
    exams = []
    flags = _flags(world, n, rng)
    for country, position in zip(flags, deck(len(flags), range(4), rng), strict=True):
        wrong = [other.en for other in neighbours(world, country, 3, rng)]
        options = tuple(placed(country.en, wrong, position))
        picture = (world.waving[country.code],)
        exams.append(Exam("Geography", f"<image 1> {WHOSE}", options, LETTERS[position], picture))
    return exams


def _sums(world: World, n: int, rng: random.Random) -> list[Exam]:
    exams = []
    question = "What is the sum of the numbers in <image 1> and <image 2>?"
    for position in [*deck(n, range(4), rng), None]:
        digits = [handwritten(world, "evaluation", 1, rng) for _ in range(2)]
        total = sum(int(number) for number, _ in digits)
        wrong = rng.sample([k for k in range(19) if k != total], 3)
        options = () if position is None else tuple(map(str, placed(total, wrong, position)))
        answer = str(total) if position is None else LETTERS[position]
        exams.append(
            Exam("Math", question, options, answer, tuple(png(picture) for _, picture in digits))
        )
    return exams


def marks(n: int) -> tuple[str, ...]:
    """How MMMU's text refers to its first `n` pictures."""
    return tuple(f"<image {number}>" for number in range(1, n + 1))


def _flags(world: World, n: int, rng: random.Random) -> list[Country]:
    flags = [country for country in world.concepts.countries if country.code in world.waving]
    return rng.sample(flags, min(n, len(flags)))


def _passage(element: Element) -> str:
    return (
        f"{element.name.capitalize()} is a chemical element with the symbol {element.symbol} and "
        f"the atomic number {element.number}. It belongs to the series {element.series}."
    )


def _questions(said: Element, name: str) -> tuple[str, str, str]:
    """Whether what is true of `said` is true of the element called `name`."""
    return (
        f"is {said.symbol} the symbol of {name}",
        f"does {name} have the atomic number {said.number}",
        f"does {name} belong to the series {said.series}",
    )
