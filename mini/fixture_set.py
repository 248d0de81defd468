"""`python -m mini fixture`: re-makes mini/fixture/, a pool of sixty that needs no registry.

Fourteen emoji, twelve seen in training as Noto and Fluent flat drawings, two that evaluation shows
in the flat style. The same recipes and file formats as the full pool.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mini.concepts import Emoji
from mini.eval.claims import make_claims, make_printed
from mini.eval.formats import evaluation_files
from mini.eval.items import Choice, Claim, EvalSets, Exam, Open, Probe
from mini.eval.knowledge import make_facts, make_passages, marks
from mini.fetch import default_cache, fetch
from mini.jsonfiles import json_list
from mini.pool import write_files
from mini.recipes import emoji, facts
from mini.samples import LETTERS, Gallery, Sample, article, placed
from mini.settings import PoolSettings
from mini.world import World, load_world

FIXTURE = Path(__file__).parent / "fixture"
_NAMES = (
    *("fox", "rabbit", "butterfly", "octopus", "cactus", "pizza", "pineapple", "teapot"),
    *("house", "bus", "train", "guitar", "mushroom", "taco"),
)
_HELD_OUT = ("mushroom", "taco")
_SHARES = (
    (emoji.emoji_cap, 12),
    (emoji.emoji_vqa, 10),
    (emoji.emoji_yn, 12),
    (emoji.emoji_mcq, 14),
    (facts.element_qa, 6),
    (facts.element_mcq, 6),
)


def main(args: Sequence[str]) -> None:
    """Write the fixture; takes no options."""
    files = make_files(load_world(fetch(default_cache())))
    write_files(FIXTURE, files)
    print(f"{FIXTURE}: {len(files)} files, {sum(map(len, files.values())):,} bytes")


def make_files(world: World) -> dict[str, bytes]:
    """Pool, pictures and evaluation sets by their name in the fixture's folder."""
    world = _small(world)
    gallery = Gallery()
    samples: list[Sample] = []
    for recipe, n in _SHARES:
        rng = random.Random(f"fixture/{recipe.__name__}")
        samples += recipe(world, gallery, n, rng, PoolSettings(chinese=0.1))
    records = [sample.record(number) for number, sample in enumerate(samples)]
    files = {f"images/{name}": picture for name, picture in gallery.items()}
    evaluation = evaluation_files(_evaluation(world))
    files |= {f"eval/{name}": content for name, content in evaluation.items()}
    return files | {"pool.json": json_list(records)}


def _small(world: World) -> World:
    """The fixture's emoji alone, with roles of their own, and the elements."""
    chosen = {e.en: e for e in world.concepts.emoji if e.en in _NAMES}
    roles = {name: "evaluation" if name in _HELD_OUT else "train" for name in _NAMES}
    found = tuple(replace(chosen[name], role=roles[name]) for name in _NAMES)
    concepts = replace(world.concepts, emoji=found, countries=(), words=())
    codes = {e.hexcode for e in found}
    return World(concepts, {key: png for key, png in world.emoji.items() if key[0] in codes})


def _evaluation(world: World) -> EvalSets:
    rng = random.Random("fixture/evaluation")
    held_out = [e for e in world.concepts.emoji if e.role == "evaluation"]
    names = emoji.Names(world)
    mcq, yesno, open_ended = [], [], []
    for e, position in zip(held_out * 4, (0, 1, 2, 3, 3, 2, 1, 0), strict=True):
        mcq.append(_choice(e, names.wrong(e, 3, False, rng), position, world, len(mcq)))
    for category in ("adversarial", "random", "popular"):
        for e in held_out:
            picture = world.emoji[e.hexcode, "flat"]
            (other,) = names.wrong(e, 1, False, rng)
            yesno.append(Probe(category, e.en, True, picture))
            yesno.append(Probe(category, other.en, False, picture))
    for question in emoji.CHOICE[1:]:
        for e in held_out + held_out[:1]:  # one is asked for more often: GQA-OOD's head
            name, picture = f"open_{len(open_ended):04d}", world.emoji[e.hexcode, "flat"]
            open_ended.append(Open(name, "object", question, e.en, picture))
    mixed = [replace(item, id=str(i + 1)) for i, item in enumerate(mcq[:4])]
    for text, options, position in facts.element_choices(facts.elements(world, True), 4, rng):
        number = str(len(mixed) + 1)
        hint = "This is about chemistry." if position == 0 else ""
        mixed.append(Choice(number, "natural science", text, tuple(options), position, hint=hint))
    return EvalSets(
        mcq,
        mixed,
        yesno,
        open_ended,
        unseen=[],
        printed=make_printed(world, 4),
        claims=make_claims(world, 2) + _claims(world, held_out, names, rng),
        knowledge=_knowledge(world, held_out, rng),
        exams=_exams(world, held_out),
        facts=make_facts(world, 20),
        passages=make_passages(world, 4),
    )


def _claims(
    world: World, shown: list[Emoji], names: emoji.Names, rng: random.Random
) -> list[Claim]:
    claims = []
    for e in shown:
        (other,) = names.wrong(e, 1, False, rng)
        texts = (f"Is there {article(name)} in this image?" for name in (e.en, other.en))
        claims.append(Claim("existence", world.emoji[e.hexcode, "flat"], *texts))
    return claims


def _knowledge(world: World, shown: list[Emoji], rng: random.Random) -> list[Choice]:
    groups = sorted({e.group for e in world.concepts.emoji})
    items = []
    for position, e in enumerate(shown):
        wrong = rng.sample([group for group in groups if group != e.group], 2)
        options = tuple(placed(e.group, wrong, position))
        picture = world.emoji[e.hexcode, "flat"]
        items.append(
            Choice("", "category", "Which category is this in?", options, position, picture)
        )
    return items


def _exams(world: World, shown: list[Emoji]) -> list[Exam]:
    """Which of all the pictures; the last question has no options."""
    pictures = tuple(world.emoji[e.hexcode, "flat"] for e in shown)
    exams = [
        Exam("Art", f"Which picture shows {article(e.en)}?", marks(len(shown)), letter, pictures)
        for e, letter in zip(shown, LETTERS, strict=False)
    ]
    return [*exams, Exam("Art", "What does <image 1> show?", (), shown[0].en, pictures[:1])]


def _choice(gold: Emoji, wrong: list[Emoji], position: int, world: World, number: int) -> Choice:
    options = placed(gold, wrong, position)
    return Choice(
        f"mcq_{number:04d}",
        "coarse",
        emoji.CHOICE[0],
        tuple(option.en for option in options),
        position,
        world.emoji[gold.hexcode, "flat"],
        zh=(emoji.CHOICE_ZH, tuple(option.zh for option in options)),
    )
