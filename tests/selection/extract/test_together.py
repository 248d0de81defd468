"""Several signals out of one pass: each store as if it had been computed alone, byte for byte."""

import numpy as np
import pytest

from selection.extract.loop import extract
from selection.signals.attention_means import Blocks
from selection.signals.forward import Forward
from selection.signals.gradients.gradients import Gradients
from selection.store.store import StoreReader, block_path
from tests.extraction import World, settings
from tests.faults import snapshot
from tests.tiny_models import save_llava, save_pool

N = 20
SIGNALS = [Forward(), Blocks()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return World(save_llava(folder / "model"), *save_pool(folder / "pool", N))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    store = tmp_path_factory.mktemp("alone")
    return [world.extract(store, signal, block_size=6) for signal in SIGNALS]


@pytest.fixture
def n_seen(world):
    """How many samples went through the language model, by a hook on it."""
    seen = []
    hook = world.proxy.decoder.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(output.last_hidden_state)),
        with_kwargs=True,
    )
    yield lambda: sum(seen)
    hook.remove()


def together(world, store, signals=SIGNALS, **options) -> list[StoreReader]:
    where, how = settings(
        world.pool, store, world.images, **{"block_size": 6, "max_bad": 1.0, **options}
    )
    return extract(signals, world.proxy, world.pool, np.arange(N), where, how, progress=False)


def assert_same_files(readers, others):
    for one, other in zip(readers, others, strict=True):
        assert snapshot(one.folder) == snapshot(other.folder)


@pytest.mark.bits
def test_one_pass_fills_both_stores_byte_for_byte(world, alone, tmp_path, n_seen):
    assert_same_files(together(world, tmp_path), alone)
    assert n_seen() == N
    together(world, tmp_path)
    assert n_seen() == N  # both are there


@pytest.mark.bits
def test_gradients_of_several_projections_are_one_pass(world, tmp_path, n_seen):
    """Other widths and projections: each store as if it had been computed alone."""
    signals = [Gradients(64, rank=4), Gradients(96, rank=4), Gradients(64, "two_sided", rank=4)]
    alone = [world.extract(tmp_path / "alone", signal, block_size=6) for signal in signals]
    assert n_seen() == 3 * N
    assert_same_files(together(world, tmp_path / "together", signals), alone)
    assert n_seen() == 4 * N


def test_a_store_that_is_complete_is_left_alone(world, alone, tmp_path, n_seen):
    world.extract(tmp_path, Forward(), block_size=6)
    assert n_seen() == N
    assert_same_files(together(world, tmp_path), alone)
    assert n_seen() == 2 * N  # the blocks need a pass


def test_only_blocks_missing_from_either_are_computed(world, alone, tmp_path, n_seen):
    first = together(world, tmp_path)
    block_path(first[0].folder, 1).unlink()
    block_path(first[1].folder, 3).unlink()  # the last: 2 samples
    assert_same_files(together(world, tmp_path), alone)
    assert n_seen() == N + 6 + 2


def test_stores_begun_with_other_block_sizes_are_filled_one_after_the_other(
    world, alone, tmp_path, n_seen
):
    begun = world.extract(tmp_path, Forward(), block_size=4)
    block_path(begun.folder, 0).unlink()
    readers = together(world, tmp_path)
    assert [reader.block_size for reader in readers] == [4, 6]
    assert n_seen() == N + 4 + N
    for one, other in zip(readers, alone, strict=True):
        for name in other.columns:
            np.testing.assert_array_equal(one.column(name), other.column(name))


class Overflowing(Blocks):
    """Not finite in every sample whose first number is positive."""

    def read(self, proxy, batch, out, seen):
        found = super().read(proxy, batch, out, seen)
        positive = found["language"][:, :1] > 0
        return {**found, "language": found["language"].masked_fill(positive, float("inf"))}


def test_a_sample_is_bad_for_the_signal_that_cannot_score_it(world, alone, tmp_path):
    readers = together(world, tmp_path, [Forward(), Overflowing()])
    assert snapshot(readers[0].folder) == snapshot(alone[0].folder)
    expected = np.flatnonzero(alone[1].column("language")[:, 0] > 0)
    assert [note["row"] for note in readers[1].bad] == expected.tolist() and len(expected) > 2
    assert "language is not finite" in readers[1].bad[0]["reason"]
