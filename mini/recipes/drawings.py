"""Clip art with its authors' words, and flags with facts about their countries."""

from __future__ import annotations

import random
from operator import attrgetter

from mini.clipart import CATEGORIES, ClipArt
from mini.concepts import Country
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

KIND = "What kind of clip art is this?"
WHOSE = "Which country uses this flag?"
CAPITAL = "What is the capital of the country with this flag?"


def clipart_cap(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """The author's title and keywords; a share of the captions is swapped among drawings."""
    chosen = world.clipart.get("train", [])[:]
    rng.shuffle(chosen)
    chosen = chosen[:n]
    captions = [caption(art) for art, _ in chosen]
    swapped = rng.sample(range(len(chosen)), round(len(chosen) * settings.caption_noise))
    noisy = set(swapped) if len(swapped) > 1 else set()
    captions_of = dict(zip(swapped, swapped[1:] + swapped[:1], strict=True))
    samples = []
    for i, (art, picture) in enumerate(chosen):
        text = captions[captions_of[i] if i in noisy else i]
        image = gallery.put(_image_name(art), picture)
        turns = ["Write a short description for this clip art.", text]
        samples.append(Sample("clipart_cap", "caption", turns, image, noisy=int(i in noisy)))
    return samples


def clipart_mcq(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Which folder a drawing is filed in; balanced, the clean multiple choice of the pool."""
    chosen = world.clipart.get("train", [])[:]
    rng.shuffle(chosen)
    samples = []
    positions = deck(min(n, len(chosen)), range(4), rng)
    for (art, picture), position in zip(chosen, positions, strict=False):
        text = multiple_choice(KIND, kinds(art, position, rng))
        image = gallery.put(_image_name(art), picture)
        samples.append(Sample("clipart_mcq", "mcq", [text, LETTERS[position]], image))
    return samples


def flag_vqa(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Three turns: country, capital, continent."""
    samples = []
    for country in _with_flags(world)[:n]:
        image = gallery.put(f"flag/{country.code}.png", world.flags[country.code])
        turns = [f"Which country does this flag belong to?\n{SHORT}", country.en]
        turns += ["What is its capital?", country.capital]
        turns += ["On which continent is it?", country.region]
        samples.append(Sample("flag_vqa", "open", turns, image))
    return samples


def flag_mcq(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Country, then capital, of each flag among those of the same region; leans to C."""
    countries = _with_flags(world)
    asked = [(c, WHOSE, "en") for c in countries]
    asked += [(c, CAPITAL, "capital") for c in countries]
    asked = asked[:n]
    forced = biased(len(asked), settings.flag_position_bias, 0.25, rng)
    positions = favoured(forced, 2, range(4), rng)
    samples = []
    for (country, question, fact), position, lean in zip(asked, positions, forced, strict=True):
        name = attrgetter(fact)
        others = [name(c) for c in neighbours(world, country, 3, rng)]
        text = multiple_choice(question, placed(name(country), others, position))
        image = gallery.put(f"flag/{country.code}.png", world.flags[country.code])
        turns = [text, LETTERS[position]]
        samples.append(Sample("flag_mcq", "mcq", turns, image, biased=labels(position=lean)))
    return samples


def country_qa(
    world: World, gallery: Gallery, n: int, rng: random.Random, settings: PoolSettings
) -> list[Sample]:
    """Text only: capital, then whether the country has a coast."""
    countries = list(world.concepts.countries)
    rng.shuffle(countries)
    samples = []
    for country in countries[:n]:
        turns = [f"What is the capital of {country.en}?\n{SHORT}", country.capital]
        turns += ["Is the country landlocked?", "Yes" if country.landlocked else "No"]
        samples.append(Sample("country_qa", "fact", turns))
    return samples


def kinds(art: ClipArt, position: int, rng: random.Random) -> list[str]:
    """Four categories, the drawing's own at `position`."""
    others = [word for word in CATEGORIES.values() if word != art.category]
    return placed(art.category, rng.sample(others, 3), position)


def neighbours(world: World, country: Country, n: int, rng: random.Random) -> list[Country]:
    """Other countries of the same region."""
    near = [c for c in world.concepts.countries if c.region == country.region and c != country]
    return rng.sample(near, n)


def caption(art: ClipArt) -> str:
    """Title and keywords as one sentence."""
    words = ", ".join(word for word in art.keywords[:4] if word != art.title)
    if not art.title:
        return f"A drawing of {words}."
    title = art.title[0].upper() + art.title[1:]
    return f"{title}: a drawing of {words}." if words else f"{title}."


def _image_name(art: ClipArt) -> str:
    return f"clipart/{art.path.removesuffix('.svg')}.png"


def _with_flags(world: World) -> list[Country]:
    return [country for country in world.concepts.countries if country.code in world.flags]
