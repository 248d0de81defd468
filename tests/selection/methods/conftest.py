"""The contract's made-up world, for tests of every method."""

from __future__ import annotations

from pathlib import Path

import pytest

from selection.methods.made_up import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def new_world(tmp_path: Path):
    """Maker of further worlds, each in a folder of its own."""

    def make(name: str, **choices) -> World:
        folder = tmp_path / name
        folder.mkdir()
        return make_world(folder, **choices)

    return make
