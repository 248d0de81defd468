"""Real packages for the tests that need them; skipped where no registry can be reached."""

from __future__ import annotations

import pytest

from llava.errors import DataError
from mini.concepts import Concepts, load_concepts
from mini.fetch import Sources, default_cache, fetch


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
