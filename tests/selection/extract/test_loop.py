import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from llava.errors import UsageError
from llava.vlm.base import Prepared
from selection.extract.loop import buckets
from selection.signals.forward import Forward
from selection.store.store import block_path
from tests.extraction import (
    Forbidden,
    N,
    Slow,
    World,
    assert_closer_than_rounding,
    assert_same,
    columns,
    extract,
    fork,
)
from tests.faults import snapshot
from tests.tiny_models import BUILDERS, save_pool


@pytest.mark.bits
@pytest.mark.parametrize("name", BUILDERS)
def test_no_bit_depends_on_batches_or_blocks(name, tmp_path):
    """Bitwise on the CPU in float32, for text-only and image samples of mixed lengths."""
    world = World(BUILDERS[name](tmp_path / "model"), *save_pool(tmp_path / "pool", 24))
    reference = world.extract(tmp_path / "1", batch_size=1, block_size=24)
    assert not reference.bad
    for batch_size, block_size in [(3, 7), (8, 24), (64, 1000)]:
        store = tmp_path / f"{batch_size}"
        found = world.extract(store, batch_size=batch_size, block_size=block_size)
        assert_same(reference, found)


@pytest.mark.bits
@pytest.mark.parametrize("name", BUILDERS)
def test_bfloat16_depends_on_batches_and_threads_by_less_than_it_rounds(
    name, tmp_path, set_threads
):
    """Here the kernels are oneDNN's: on some processors they differ by the number of rows."""
    files = BUILDERS[name](tmp_path / "model"), *save_pool(tmp_path / "pool", 24)
    exact = World(*files).extract(tmp_path / "exact", batch_size=1)
    world = World(*files, dtype="bfloat16")
    alone = world.extract(tmp_path / "1", batch_size=1)
    for batch_size, n_threads in [(3, 1), (64, 2)]:
        set_threads(n_threads)
        store = tmp_path / f"{batch_size}-{n_threads}"
        together = world.extract(store, batch_size=batch_size)
        assert_closer_than_rounding(together, alone, exact)


@pytest.mark.bits
def test_no_bit_depends_on_threads(world, reference, tmp_path, set_threads):
    """Of products, and of a model too small for anything else to be shared out among threads."""
    for n_threads in (1, 2):
        set_threads(n_threads)
        few = world.extract(tmp_path / f"{n_threads}", rows=np.arange(6), batch_size=4)
        for name, array in columns(few).items():
            np.testing.assert_array_equal(array, reference.column(name)[:6])


@pytest.mark.bits
def test_bfloat16_blocks_have_the_same_bytes_whenever_and_wherever_computed(world, tmp_path):
    """The same batches give the same bits, also in a later run and with loader processes."""
    narrow = World(world.model, world.pool_path, world.images, dtype="bfloat16")
    whole = narrow.extract(tmp_path / "whole", batch_size=4, block_size=6)
    again = narrow.extract(tmp_path / "again", batch_size=4, block_size=6)
    for block in (0, 3, 6):
        block_path(again.folder, block).unlink()
    narrow.extract(tmp_path / "again", batch_size=4, block_size=6, num_workers=2)
    assert snapshot(again.folder) == snapshot(whole.folder)


@pytest.mark.bits
def test_token_limit_changes_no_byte(world, reference, tmp_path):
    found = world.extract(tmp_path, batch_size=64, max_tokens=500, block_size=6)
    assert snapshot(found.folder) == snapshot(reference.folder)


@pytest.mark.bits
def test_loader_processes_change_no_byte(world, reference, tmp_path):
    found = world.extract(tmp_path, num_workers=2, block_size=6)
    assert snapshot(found.folder) == snapshot(reference.folder)


def test_rows_come_in_the_order_asked_for(world, reference, tmp_path):
    rows = np.array([17, 3, 30, 4])
    found = world.extract(tmp_path, rows=rows)
    assert found.rows.tolist() == rows.tolist()
    for name, array in columns(found).items():
        np.testing.assert_array_equal(array, reference.column(name)[rows])


def test_two_ranks_change_no_byte(world, reference, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, *world.command(tmp_path)], check=True, capture_output=True)
    (folder,) = tmp_path.iterdir()
    assert snapshot(folder) == snapshot(reference.folder)


def test_kill_and_resume_changes_no_byte(world, tmp_path):
    """SIGKILL at random moments, over and over; blocks that were done are kept."""
    moments, store = random.Random(0), tmp_path / "killed"
    for _ in range(8):  # 1.6 s at most, of the 2 s that 40 batches take
        pid = fork(lambda: world.extract(store, Slow(), batch_size=1, block_size=2))
        time.sleep(moments.uniform(0.0, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not list(store.glob("*/manifest.json"))
    uninterrupted = world.extract(tmp_path / "whole", block_size=2)
    assert snapshot(world.extract(store, block_size=2).folder) == snapshot(uninterrupted.folder)


def test_finished_store_is_not_computed_again(world, reference):
    found = world.extract(reference.folder.parent, Forbidden(), block_size=3)
    assert_same(reference, found)


def test_only_missing_blocks_are_computed(world, reference, tmp_path):
    store = tmp_path / "store"
    world.extract(store, block_size=6)
    (folder,) = store.iterdir()
    (folder / "block-000002.safetensors").unlink()
    seen = []

    class Counting(Forward):
        def compute(self, proxy, items):
            seen.extend(items)
            return super().compute(proxy, items)

    world.extract(store, Counting())
    assert len(seen) == 6
    assert snapshot(folder) == snapshot(reference.folder)


def test_buckets_hold_one_length_and_begin_with_the_longest():
    lengths = [20, 300, 17, 31, 290, 16]
    items = {
        10 + i: Prepared(torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long))
        for i, n in enumerate(lengths)
    }
    assert buckets(items) == [[11, 14], [13], [10, 12], [15]]


def test_image_folder_is_asked_for(world, tmp_path):
    world.images, kept = None, world.images
    try:
        with pytest.raises(UsageError, match="--images"):
            world.extract(tmp_path)
        world.images = tmp_path / "nowhere"
        with pytest.raises(UsageError, match="nowhere"):
            world.extract(tmp_path)
    finally:
        world.images = kept


def test_text_only_pool_needs_no_image_folder(world, reference, tmp_path):
    rows = np.arange(0, N, 4)
    found = extract(
        Forward(), world.proxy, world.pool, rows, tmp_path, None, batch_size=3, progress=False
    )
    for name, array in columns(found).items():
        np.testing.assert_array_equal(array, reference.column(name)[rows])
