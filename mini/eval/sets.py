"""Evaluation questions: balanced, unframed, about pictures and senses that training never shows.

They follow from the packages alone, not from the pool's seed or knobs, so results of different
pools can be compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mini.concepts import Emoji, rank
from mini.eval.claims import make_claims, make_printed
from mini.eval.items import Choice, EvalSets, Open, Probe
from mini.eval.knowledge import make_exams, make_facts, make_knowledge, make_passages
from mini.recipes.drawings import KIND, WHOSE, kinds, neighbours
from mini.recipes.emoji import CHOICE, CHOICE_ZH, Names
from mini.recipes.facts import element_choices, elements, meaning, wrong_glosses
from mini.recipes.figures import (
    COLOURS,
    COUNT,
    NUMBER,
    WHICH,
    WORD,
    animal_options,
    handwritten,
    herd,
    printed,
    shape_choices,
    shape_options,
    single_animal,
)
from mini.render import png
from mini.samples import deck, placed
from mini.world import ANIMALS, World

_ANIMALS_ZH = ("熊", "鸟", "猫", "牛", "狗", "大象", "长颈鹿", "马", "绵羊", "斑马")
_COLOURS_ZH = dict(
    zip(COLOURS, ("黑色", "蓝色", "棕色", "灰色", "绿色", "红色", "青色", "黄色"), strict=True)
)
_LIKE = ({"cow", "dog", "horse", "sheep", "zebra", "bear", "cat"}, set(ANIMALS))
_POPULAR = ("cat", "dog", "horse", "bird")


def make_evalsets(world: World) -> EvalSets:
    """Every set the packages at hand allow; without emoji, simple figures take their place."""
    return EvalSets(
        mcq=_mcq(world),
        mixed=_mixed(world),
        yesno=_yesno(world),
        open_ended=_open(world),
        unseen=_unseen(world),
        printed=make_printed(world, 100),
        claims=make_claims(world, 30),
        knowledge=make_knowledge(world, 80),
        exams=make_exams(world, 16),
        facts=make_facts(world, 60),
        passages=make_passages(world, 60),
    )


def _mcq(world: World) -> list[Choice]:
    rng = random.Random("mcq")
    asked, names = _asked_emoji(world), Names(world)
    half = len(asked) // 2
    items = [_object(world, names, e, p, "fine", rng) for e, p in _dealt(asked[:half], rng)]
    items += [_object(world, names, e, p, "coarse", rng) for e, p in _dealt(asked[half:], rng)]
    items += _flags(world, rng)
    for animal, position in zip(deck(100, range(10), rng), deck(100, range(4), rng), strict=True):
        options = animal_options(animal, position, rng)
        zh = ("图中是哪种动物？", tuple(_ANIMALS_ZH[o] for o in options))
        picture = png(single_animal(world, "evaluation", animal, rng))
        en = tuple(ANIMALS[o] for o in options)
        items.append(Choice("", "animal", WHICH, en, position, picture, zh=zh))
    items += _counts(world, rng)
    if not asked:
        items += _colours(world, 200, rng) + _numbers(world, 100, rng)
    return [_named(item, f"mcq_{i:04d}") for i, item in enumerate(items)]


def _object(
    world: World, names: Names, emoji: Emoji, position: int, kind: str, rng: random.Random
) -> Choice:
    options = placed(emoji, names.wrong(emoji, 3, kind == "fine", rng), position)
    return Choice(
        "",
        kind,
        CHOICE[0],
        tuple(option.en for option in options),
        position,
        world.emoji[emoji.hexcode, "3d"],
        zh=(CHOICE_ZH, tuple(option.zh for option in options)),
    )


def _flags(world: World, rng: random.Random) -> list[Choice]:
    countries = [c for c in world.concepts.countries if c.code in world.waving]
    items = []
    for country, position in _dealt(countries, rng):
        options = placed(country, neighbours(world, country, 3, rng), position)
        zh = ("这是哪个国家的国旗？", tuple(c.zh for c in options))
        names = tuple(c.en for c in options)
        items.append(Choice("", "flag", WHOSE, names, position, world.waving[country.code], zh=zh))
    return items


def _counts(world: World, rng: random.Random) -> list[Choice]:
    items = []
    for count, position in zip(deck(100, range(1, 7), rng), deck(100, range(4), rng), strict=True):
        others = rng.sample([n for n in range(1, 7) if n != count], 3)
        options = tuple(map(str, placed(count, others, position)))
        picture = png(herd(world, "evaluation", count, rng))
        zh = ("图中有几只动物？", options)
        items.append(Choice("", "count", COUNT, options, position, picture, zh=zh))
    return items


def _colours(world: World, n: int, rng: random.Random) -> list[Choice]:
    part = world.shapes["evaluation"]
    questions = [question for question in part.questions if question[1] in COLOURS]
    items = []
    for text, answer, number, position in shape_choices(questions, n, rng):
        options = tuple(shape_options(answer, position, rng))
        zh = ("图中的图形是什么颜色？", tuple(_COLOURS_ZH[o] for o in options))
        items.append(Choice("", "colour", text, options, position, part.pictures[number], zh=zh))
    return items


def _numbers(world: World, n: int, rng: random.Random) -> list[Choice]:
    items = []
    for position in deck(n, range(4), rng):
        number, picture = handwritten(world, "evaluation", 2, rng)
        others = rng.sample([str(k) for k in range(10, 100) if str(k) != number], 3)
        options = tuple(placed(number, others, position))
        zh = ("图中的数字是多少？", options)
        text = "Which number is written here?"
        items.append(Choice("", "number", text, options, position, png(picture), zh=zh))
    return items


def _mixed(world: World) -> list[Choice]:
    """ScienceQA-like: questions without a picture, some with a context, and with one."""
    rng = random.Random("mixed")
    held_out = [word for word in world.concepts.words if word.evaluation]
    words = sorted(held_out, key=lambda word: len(word.gloss))[20:-20]
    words = rng.sample(words, min(400, len(words)))
    longer = deck(len(words), range(4), rng)
    items = []
    for i, (word, position) in enumerate(_dealt(words, rng)):
        options = tuple(placed(word.gloss, wrong_glosses(word, held_out, longer[i], rng), position))
        hint = f"The word names a kind of {word.hypernyms[0]}." if i % 4 == 0 else ""
        items.append(Choice("", "language science", meaning(word), options, position, hint=hint))
    drawings = world.clipart.get("evaluation", [])[:]
    rng.shuffle(drawings)
    for (art, picture), position in _dealt(drawings[:279], rng):
        options = tuple(kinds(art, position, rng))
        items.append(Choice("", "social science", KIND, options, position, picture))
    if not words:
        for text, names, position in element_choices(elements(world, True), 90, rng):
            items.append(Choice("", "natural science", text, tuple(names), position))
    if not drawings:
        part = world.shapes["evaluation"]
        for text, answer, number, position in shape_choices(part.questions, 150, rng):
            options = tuple(shape_options(answer, position, rng))
            picture = part.pictures[number]
            items.append(Choice("", "social science", text, options, position, picture))
    return [_named(item, str(i + 1)) for i, item in enumerate(items)]


def _yesno(world: World) -> list[Probe]:
    """POPE-like: 200 in each category, every picture asked once with yes and once with no."""
    rng = random.Random("yesno")
    asked = _asked_emoji(world)
    probes = []
    for c, category in enumerate(("adversarial", "random", "popular")):
        names = Names(world, *(("train",) if category == "popular" else ()))  # seen most often
        for emoji in asked[100 * c : 100 * (c + 1)]:
            picture = world.emoji[emoji.hexcode, "3d"]
            (wrong,) = names.wrong(emoji, 1, category == "adversarial", rng)
            probes.append(Probe(category, emoji.en, True, picture))
            probes.append(Probe(category, wrong.en, False, picture))
        for animal in deck(0 if asked else 100, range(10), rng):
            picture = png(single_animal(world, "evaluation", animal, rng))
            name = ANIMALS[animal]
            like = next(group for group in _LIKE if name in group)
            pool = {"adversarial": like, "random": ANIMALS, "popular": _POPULAR}[category]
            wrong = rng.choice([other for other in sorted(pool) if other != name])
            probes += [Probe(category, name, True, picture), Probe(category, wrong, False, picture)]
    return probes


def _open(world: World) -> list[Open]:
    rng = random.Random("open")
    items = [
        Open("", "object", CHOICE[1], emoji.en, world.emoji[emoji.hexcode, "3d"])
        for emoji in _asked_emoji(world)[::2]
    ]
    for length in deck(150, (1, 2, 3), rng):
        number, picture = handwritten(world, "evaluation", length, rng)
        items.append(Open("", "number", NUMBER, number, png(picture)))
    words = [word for word in world.concepts.words if word.evaluation]
    for word in rng.sample(words, min(150, len(words))):
        items.append(Open("", "word", WORD, word.lemma, png(printed(word, rng))))
    part = world.shapes["evaluation"]
    for text, answer, number in rng.sample(part.questions, 400):
        question = text[0].upper() + text[1:]
        items.append(Open("", "shape", question, answer, part.pictures[number]))
    return [_named(item, f"open_{i:04d}") for i, item in enumerate(items)]


def _unseen(world: World) -> list[Choice]:
    """Category of emoji that training never shows in any style."""
    rng = random.Random("unseen")
    groups = sorted({emoji.group for emoji in world.concepts.emoji})
    asked = [e for e in world.concepts.emoji if e.role == "unseen"]
    asked = [e for e in asked if (e.hexcode, "3d") in world.emoji]
    items = []
    for emoji, position in _dealt(asked, rng):
        wrong = rng.sample([group for group in groups if group != emoji.group], 3)
        options = tuple(placed(emoji.group, wrong, position))
        text = "Which category does the object in the picture belong to?"
        picture = world.emoji[emoji.hexcode, "3d"]
        items.append(Choice("", "unseen", text, options, position, picture))
    return [_named(item, f"unseen_{i:04d}") for i, item in enumerate(items)]


def _asked_emoji(world: World) -> list[Emoji]:
    """Evaluation concepts, in the order of their fixed pseudo-random rank."""
    asked = [e for e in world.concepts.emoji if e.role == "evaluation"]
    asked = [e for e in asked if (e.hexcode, "3d") in world.emoji]
    return sorted(asked, key=lambda e: rank(e.hexcode))


def _dealt(items: Sequence, rng: random.Random) -> list[tuple]:
    """Each item with a position; the four positions are equally frequent."""
    return list(zip(items, deck(len(items), range(4), rng), strict=True))


def _named(item, name: str):
    return type(item)(**{**vars(item), "id": name})
