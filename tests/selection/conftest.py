"""A tiny world that several test files extract from."""

from __future__ import annotations

import pytest

from tests.extraction import N, World
from tests.tiny_models import save_llava, save_pool


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return World(save_llava(folder / "model"), *save_pool(folder / "pool", N))


@pytest.fixture(scope="session")
def reference(world, tmp_path_factory):
    return world.extract(tmp_path_factory.mktemp("reference"), batch_size=4, block_size=6)
