"""Exact influence against cosines of whole gradients, pair by pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.influence_signal import ExactInfluence, mean_unit_gradients
from llava.errors import NonFiniteError
from llava.images import open_image
from selection.signals.gradients.gradients import Gradients
from tests.extraction import World, assert_same
from tests.lora_models import save_lora
from tests.tiny_models import save_llava, save_pool

TASKS = [[1, 2, 4], [3], [8, 9]]
GRADIENTS = Gradients(dim=4096)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    save_lora(save_llava(folder / "base"), folder / "lora")
    return World(folder / "lora", *save_pool(folder / "pool", 12), base=folder / "base")


@pytest.fixture(scope="module")
def items(world):
    records = [world.pool.record(row) for row in range(12)]
    images = [open_image(world.images, r.image) if r.image else None for r in records]
    return [world.proxy.prepare(*pair) for pair in zip(records, images, strict=True)]


@pytest.fixture(scope="module")
def influence(world, items):
    tasks = [[items[row] for row in rows] for rows in TASKS]
    return ExactInfluence(GRADIENTS, mean_unit_gradients(GRADIENTS, world.proxy, tasks))


def whole(world, item) -> np.ndarray:
    found = {}
    GRADIENTS.compute_each(world.proxy, [item], found.__setitem__)
    return torch.cat([part.flatten() for part in found.values()]).double().numpy()


def test_is_the_mean_cosine_to_each_task(world, items, influence, tmp_path):
    rows = np.array([whole(world, item) for item in items])
    norms = np.linalg.norm(rows, axis=1)
    cosines = (rows @ rows.T) / np.outer(norms, norms)
    slow = np.stack([cosines[:, task].mean(1) for task in TASKS], axis=1)
    found = world.extract(tmp_path, influence)
    np.testing.assert_allclose(found.column("influence"), slow, atol=1e-6)
    np.testing.assert_allclose(found.column("norm"), norms, rtol=1e-6)


def test_no_bit_depends_on_batches(world, items, influence, tmp_path):
    one, five = (influence.compute(world.proxy, [items[1]] * n) for n in (1, 5))
    for name, column in five.items():
        assert (column == one[name]).all()
    alone = world.extract(tmp_path / "1", influence, batch_size=1, block_size=12)
    assert_same(alone, world.extract(tmp_path / "8", influence, batch_size=8, block_size=12))


def test_projected_influence_estimates_it(world, influence, tmp_path):
    exact = world.extract(tmp_path, influence).column("influence")
    unit = world.extract(tmp_path, GRADIENTS).column("gradient").astype(np.float64)
    sketched = unit @ np.stack([unit[task].mean(0) for task in TASKS], axis=1)
    assert np.abs(sketched - exact).max() < 4 * np.sqrt(2 / GRADIENTS.dim)


def test_store_knows_the_tasks_and_the_settings_that_matter(world, items, influence):
    def digest(gradients, tasks):
        return mean_unit_gradients(gradients, world.proxy, tasks).digest

    tasks = [[items[1]], [items[2]]]
    found = [
        digest(GRADIENTS, tasks),
        digest(GRADIENTS, tasks[::-1]),
        digest(GRADIENTS, [tasks[0] + tasks[1]]),
        digest(GRADIENTS, [[items[1]], [items[3]]]),
        digest(Gradients(image="noise"), tasks),
    ]
    assert len(set(found)) == len(found)
    assert digest(Gradients(dim=7, projection="rademacher"), tasks) == found[0]
    assert influence.identity()["settings"]["directions"] == influence.directions.digest


def test_target_sample_without_a_direction_stops(world, items):
    pixels = torch.full_like(items[1].extras["pixel_values"], torch.nan)
    spoilt = replace(items[1], extras={"pixel_values": pixels})
    with pytest.raises(NonFiniteError, match="task 1: .* one of its 2 samples has length nan"):
        mean_unit_gradients(GRADIENTS, world.proxy, [[items[2]], [items[3], spoilt]])


class Zero(Gradients):
    """Every sample's gradient is zero."""

    def compute_each(self, proxy, items, use):
        super().compute_each(proxy, items, lambda name, gradient: use(name, 0 * gradient))


def test_a_gradient_of_zero_has_no_direction(world, items, tmp_path):
    with pytest.raises(NonFiniteError, match=r"of one of its 1 samples has length 0\.0"):
        mean_unit_gradients(Zero(), world.proxy, [[items[2]]])
    found = world.extract(tmp_path, Zero(dim=64), np.arange(3))
    assert [note["row"] for note in found.bad] == [0, 1, 2]
