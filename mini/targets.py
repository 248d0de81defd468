"""Target tasks of the small world: what a subset is wanted for, in LLaVA's format, and their YAML.

Several kinds of question about drawings, combinations of drawings and words that neither the pool
nor the evaluation sets have. Like those sets they follow from the packages alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import yaml

from llava.errors import DataError
from mini.concepts import Emoji
from mini.eval.formats import json_list
from mini.eval.items import EvalSets
from mini.recipes.emoji import CHOICE, CHOICE_ZH, YES_NO, Names
from mini.recipes.facts import meaning, wrong_glosses
from mini.recipes.figures import COUNT, NUMBER, handwritten, herd
from mini.render import png
from mini.samples import (
    LETTER_ZH,
    LETTERS,
    SHORT,
    Gallery,
    Sample,
    article,
    deck,
    multiple_choice,
    placed,
)
from mini.world import World, target_emoji

N = 80
"""samples of a task, where there are as many"""


def target_files(world: World, sets: EvalSets, gallery: Mapping[str, bytes]) -> dict[str, bytes]:
    """All files by their name under targets/: records, pictures and targets.yaml.

    Raises DataError if a picture is also in the pool's `gallery` or in the evaluation sets.
    """
    pictures, files, entries = Gallery(), {}, []
    tasks = {
        "object_mcq": _object_choices(world, pictures),
        "object_yesno": _object_probes(world, pictures),
        "object_open": _object_names(world, pictures),
        "object_cn": _object_choices_zh(world, pictures),
        "shape_open": _shapes(world, pictures),
        "count_open": _counts(world, pictures),
        "number_ocr": _numbers(world, pictures),
        "word_mcq": _words(world, sets),
    }
    for name, samples in tasks.items():
        records = [sample.record(i) for i, sample in enumerate(samples)]
        if records:
            files[f"{name}.json"] = json_list(records)
            entry = {"name": name, "data": f"{name}.json", "images": "images"}
            entries.append(entry | ({"subtasks": "task"} if name == "object_mcq" else {}))
    elsewhere = set(gallery.values()) | sets.pictures()
    if shared := sorted(name for name, picture in pictures.items() if picture in elsewhere):
        raise DataError(f"targets/images/{shared[0]}: also in the pool or the evaluation sets")
    files["targets.yaml"] = yaml.safe_dump(entries, sort_keys=False).encode()
    return files | {f"images/{name}": picture for name, picture in pictures.items()}


def _drawings(world: World, part: int) -> list[Emoji]:
    """One quarter of the drawings: no task shows those of another."""
    asked = target_emoji(world.concepts)[part * N : (part + 1) * N]
    return [emoji for emoji in asked if (emoji.hexcode, "3d") in world.emoji]


def _show(world: World, pictures: Gallery, emoji: Emoji) -> str:
    return pictures.put(f"3d/{emoji.hexcode}.png", world.emoji[emoji.hexcode, "3d"])


def _object_choices(world: World, pictures: Gallery) -> list[Sample]:
    """Wrong names are of the same subgroup (task fine) or of other groups (task coarse)."""
    rng, names = random.Random("target mcq"), Names(world)
    asked, samples = _drawings(world, 0), []
    for i, (emoji, position) in enumerate(zip(asked, deck(len(asked), range(4), rng), strict=True)):
        options = placed(emoji, names.wrong(emoji, 3, i % 2 == 0, rng), position)
        text = multiple_choice(CHOICE[0], [option.en for option in options])
        kind = ("fine", "coarse")[i % 2]
        turns = [text, LETTERS[position]]
        samples.append(Sample("object_mcq", kind, turns, _show(world, pictures, emoji)))
    return samples


def _object_choices_zh(world: World, pictures: Gallery) -> list[Sample]:
    rng, names = random.Random("target mcq zh"), Names(world)
    asked, samples = _drawings(world, 1), []
    for emoji, position in zip(asked, deck(len(asked), range(4), rng), strict=True):
        options = placed(emoji, names.wrong(emoji, 3, False, rng), position)
        text = multiple_choice(CHOICE_ZH, [option.zh for option in options], LETTER_ZH)
        turns = [text, LETTERS[position]]
        samples.append(Sample("object_cn", "mcq", turns, _show(world, pictures, emoji)))
    return samples


def _object_probes(world: World, pictures: Gallery) -> list[Sample]:
    """As many yes as no."""
    rng, names = random.Random("target yesno"), Names(world)
    asked, samples = _drawings(world, 2), []
    for emoji, yes in zip(asked, deck(len(asked), (True, False), rng), strict=True):
        (other,) = names.wrong(emoji, 1, False, rng)
        name = article((emoji if yes else other).en)
        turns = [f"{YES_NO[2].format(name)}\n{SHORT}", "Yes" if yes else "No"]
        samples.append(Sample("object_yesno", "yesno", turns, _show(world, pictures, emoji)))
    return samples


def _object_names(world: World, pictures: Gallery) -> list[Sample]:
    return [
        Sample("object_open", "open", [f"{CHOICE[1]}\n{SHORT}", emoji.en], image)
        for emoji in _drawings(world, 3)
        for image in [_show(world, pictures, emoji)]
    ]


def _shapes(world: World, pictures: Gallery) -> Iterator[Sample]:
    """Published questions on pictures that come after those of the evaluation sets."""
    part = world.shapes.get("target")
    questions = part.questions if part else []
    rng = random.Random("target shapes")
    for text, answer, number in rng.sample(questions, min(N, len(questions))):
        image = pictures.put(f"easyvqa/{number}.png", part.pictures[number])
        turns = [f"{text[0].upper()}{text[1:]}\n{SHORT}", answer]
        yield Sample("shape_open", "open", turns, image)


def _counts(world: World, pictures: Gallery) -> Iterator[Sample]:
    """Two to six silhouettes: single ones are in the pool."""
    rng = random.Random("target counts")
    for i, count in enumerate(deck(N if world.animals else 0, range(2, 7), rng)):
        image = pictures.put(f"count/{i:02d}.png", png(herd(world, "train", count, rng)))
        yield Sample("count_open", "count", [f"{COUNT}\n{SHORT}", str(count)], image)


def _numbers(world: World, pictures: Gallery) -> Iterator[Sample]:
    """Two or three digits: single ones are in the pool."""
    rng = random.Random("target numbers")
    for i, length in enumerate(deck(N if world.digits else 0, (2, 3), rng)):
        number, picture = handwritten(world, "train", length, rng)
        image = pictures.put(f"number/{i:02d}.png", png(picture))
        yield Sample("number_ocr", "ocr", [f"{NUMBER}\n{SHORT}", number], image)


def _words(world: World, sets: EvalSets) -> Iterator[Sample]:
    """Meanings of held-out words that no evaluation set asks about."""
    asked = {item.question for item in [*sets.mixed, *sets.facts]}
    held_out = [word for word in world.concepts.words if word.evaluation]
    left = sorted(
        (word for word in held_out if meaning(word) not in asked), key=lambda w: len(w.gloss)
    )[20:-20]  # the shortest and longest have nothing shorter or longer beside them
    rng = random.Random("target words")
    chosen = rng.sample(left, min(N, len(left)))
    positions, longer = deck(len(chosen), range(4), rng), deck(len(chosen), range(4), rng)
    for word, position, n_longer in zip(chosen, positions, longer, strict=True):
        options = placed(word.gloss, wrong_glosses(word, held_out, n_longer, rng), position)
        turns = [multiple_choice(meaning(word), options), LETTERS[position]]
        yield Sample("word_mcq", "text_mcq", turns)
