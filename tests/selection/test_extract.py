import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.errors import DataError, UsageError
from llava.images import open_image
from selection.extract import allowed_bad, buckets, extract, is_out_of_memory, non_finite
from selection.plan import plan
from selection.pool import Pool
from selection.proxies.base import Prepared
from selection.proxy import load_proxy
from selection.ranks import Ranks
from selection.signals.forward import Forward
from tests.faults import snapshot
from tests.tiny_models import BUILDERS, save_llava, save_pool

N = 40
WORKER = Path(__file__).with_name("extract_worker.py")


@dataclass
class World:
    """A tiny proxy, a pool and its images."""

    model: Path
    pool_path: Path
    images: Path

    def __post_init__(self):
        self.proxy = load_proxy(self.model)
        self.pool = Pool.open(self.pool_path)

    def extract(self, store, signal=None, rows=None, **options):
        rows = np.arange(len(self.pool)) if rows is None else rows
        options = {"progress": False, "max_bad": 1.0, **options}
        signal = signal or Forward()
        return extract(signal, self.proxy, self.pool, rows, store, self.images, **options)

    def command(self, store) -> list[str]:
        return list(map(str, (WORKER, self.model, self.pool_path, self.images, store)))


def columns(reader) -> dict[str, np.ndarray]:
    return {name: reader.column(name) for name in reader.columns}


def assert_same(left, right, rows=slice(None)):
    for name, array in columns(left).items():
        np.testing.assert_array_equal(array[rows], right.column(name)[rows], err_msg=name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return World(save_llava(folder / "model"), *save_pool(folder / "pool", N))


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    return world.extract(tmp_path_factory.mktemp("reference"), batch_size=4, block_size=6)


def fork(work) -> int:
    """Run `work` in a forked process, which exits with 0 or, after an error, 1; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("name", BUILDERS)
def test_no_bit_depends_on_batches_or_blocks(name, tmp_path):
    """Bitwise on the CPU in float32, for text-only and image samples of mixed lengths."""
    world = World(BUILDERS[name](tmp_path / "model"), *save_pool(tmp_path / "pool", N))
    reference = world.extract(tmp_path / "1", batch_size=1, block_size=N)
    assert not reference.bad
    for batch_size, block_size in [(3, 7), (8, N), (64, 1000)]:
        store = tmp_path / f"{batch_size}"
        found = world.extract(store, batch_size=batch_size, block_size=block_size)
        assert_same(reference, found)


def test_no_bit_depends_on_threads(world, reference, tmp_path):
    torch.set_num_threads(2)
    try:
        found = world.extract(tmp_path, rows=np.arange(12), batch_size=4)
    finally:
        torch.set_num_threads(1)
    for name, array in columns(found).items():
        np.testing.assert_array_equal(array, reference.column(name)[:12])


def test_token_limit_changes_no_byte(world, reference, tmp_path):
    found = world.extract(tmp_path, batch_size=64, max_tokens=500, block_size=6)
    assert snapshot(found.folder) == snapshot(reference.folder)


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


def test_dead_rank_ends_the_other(world, reference, tmp_path, free_port):
    """A rank exits without a word: the other one fails soon by itself, and nothing is lost."""

    class Mortal(Forward):
        def compute(self, proxy, items):
            if len(list(tmp_path.glob("*/block-*"))) >= 2:
                os._exit(1)
            return super().compute(proxy, items)

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free_port))
    ranks = [
        fork(
            lambda r=r: world.extract(
                tmp_path, (Forward, Mortal)[r](), block_size=6, ranks=Ranks(r, 2)
            )
        )
        for r in range(2)
    ]
    started = time.monotonic()
    assert all(os.waitpid(pid, 0)[1] != 0 for pid in ranks)
    assert time.monotonic() - started < 30
    (folder,) = tmp_path.iterdir()
    assert not (folder / "manifest.json").exists()
    assert list(folder.glob("block-*"))
    assert snapshot(world.extract(tmp_path).folder) == snapshot(reference.folder)


class Slow(Forward):
    """Takes 0.05 s a batch more, so that a kill comes before the end on any machine."""

    def compute(self, proxy, items):
        time.sleep(0.05)
        return super().compute(proxy, items)


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


class Forbidden(Forward):
    """Computes nothing: any attempt fails the test."""

    def compute(self, proxy, items):
        raise AssertionError("computed again")


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


def too_much_memory():
    """A real allocation that no machine can give: 8 exabytes."""
    return torch.empty(2**60)


class Small(Forward):
    """A machine whose memory holds `room` tokens."""

    room = 0
    attempts = 0

    def compute(self, proxy, items):
        type(self).attempts += 1
        if sum(item.n_tokens for item in items) > self.room:
            too_much_memory()
        return super().compute(proxy, items)


def test_out_of_memory_halves_the_batch(world, reference, tmp_path):
    class Half(Small):
        room = 700

    found = world.extract(tmp_path, Half(), batch_size=32, block_size=6)
    assert not found.bad
    assert_same(reference, found)


def test_later_batches_keep_the_smaller_size(world, tmp_path):
    """Once a batch did not fit, none is tried at that size again."""

    class Half(Small):
        room = 300

    world.extract(tmp_path, Half(), batch_size=32, block_size=N)
    n_needed = len(world.pool)
    assert Half.attempts <= n_needed + 5  # five halvings from 32 to 1


def test_sample_too_large_for_memory_is_listed(world, reference, tmp_path):
    lengths = reference_lengths(world)

    class Quarter(Small):
        room = int(np.quantile(lengths, 0.8))

    found = world.extract(tmp_path, Quarter(), block_size=6)
    expected = np.flatnonzero(lengths > Quarter.room)
    assert [note["row"] for note in found.bad] == expected.tolist()
    assert all("out of memory" in note["reason"] for note in found.bad)
    assert np.isnan(found.column("nll_mean")[expected]).all()
    assert_same(reference, found, np.flatnonzero(lengths <= Quarter.room))


def reference_lengths(world) -> np.ndarray:
    lengths = []
    for row in range(len(world.pool)):
        record = world.pool.record(row)
        image = open_image(world.images, record.image) if record.image else None
        lengths.append(world.proxy.prepare(record, image).n_tokens)
    return np.array(lengths)


def test_other_errors_are_not_taken_for_lack_of_memory(world, tmp_path):
    class Broken(Forward):
        def compute(self, proxy, items):
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        world.extract(tmp_path, Broken())


def test_memory_errors_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        too_much_memory()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.fixture
def damaged(world, tmp_path):
    """The world with six samples spoilt, each in its own way: reasons by row."""
    records = json.loads(world.pool_path.read_text())
    images = tmp_path / "images"
    images.mkdir()
    for path in world.images.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "1.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:60])
    (images / "3.png").write_text("<html>not found</html>")
    records[4]["conversations"][1]["from"] = "teacher"
    records[5]["conversations"][0]["value"] = "red " * 300 + "<image>"
    records[6]["conversations"] = records[6]["conversations"][:1]
    records[7]["image"] = "../model/config.json"
    path = tmp_path / "pool.json"
    path.write_text(json.dumps(records))
    reasons = {
        1: "no such file",
        2: "truncated or corrupt",
        3: "not an image",
        4: "teacher",
        5: "no answer token|image ends",
        6: "no answer token",
        7: "leaves the image folder",
    }
    return World(world.model, path, images), reasons


def test_unusable_samples_are_listed_and_harm_no_other(damaged, reference, tmp_path):
    world, reasons = damaged
    found = world.extract(tmp_path / "store", block_size=6)
    notes = {note["row"]: note for note in found.bad}
    assert notes.keys() == reasons.keys()
    for row, reason in reasons.items():
        assert any(part in notes[row]["reason"] for part in reason.split("|")), notes[row]
        assert notes[row]["uid"] == world.pool.uid(row)
        for name, array in columns(found).items():
            assert name == "n_tokens" or np.isnan(array[row]).all(), name
    assert notes[2]["image"] == "2.png"
    good = [row for row in range(N) if row not in reasons]
    assert_same(reference, found, good)


def test_too_many_unusable_samples_stop_the_run(damaged, tmp_path):
    """Seven of 40 are bad; the run stops, says which, and a larger limit does not compute again."""
    world, reasons = damaged
    with pytest.raises(DataError) as caught:
        world.extract(tmp_path / "store", max_bad=0.05, block_size=6)
    assert caught.value.exit_code == 65
    assert "row 1:" in str(caught.value) and "--max-bad" in str(caught.value)
    world.extract(tmp_path / "store", max_bad=0.2)
    assert len(world.extract(tmp_path / "store", Forbidden(), max_bad=0.2).bad) == len(reasons)
    with pytest.raises(DataError, match="7 samples cannot be scored, 2 may"):
        world.extract(tmp_path / "store", Forbidden(), max_bad=0.05)


def test_one_unusable_sample_always_may_be():
    assert [allowed_bad(n, 0.001) for n in (1, 999, 2000, 665_298)] == [1, 1, 2, 665]
    assert allowed_bad(100, 0.0) == 1


def test_non_finite_numbers_are_listed(world, reference, tmp_path):
    """A head that gives NaN for one answer token: only samples that ask for it are listed."""
    token = int(world.proxy.loaded.tokenizer.encode("triangle")[0][-1])
    weight = world.proxy.head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[token] = torch.nan
    try:
        found = world.extract(tmp_path, Uncached())
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert len(found.bad) == N  # the softmax of every answer sees the broken row
    assert all("nll_sum is not finite" in note["reason"] for note in found.bad)


class Uncached(Forward):
    """A Forward whose store no other test reads."""


def test_state_that_float16_cannot_hold_is_listed(world, tmp_path):
    proxy = load_proxy(world.model, dtype="bfloat16")
    with torch.no_grad():
        proxy.decoder.norm.weight.mul_(3e5)
    rows = np.arange(8)
    found = extract(
        Forward(), proxy, world.pool, rows, tmp_path, world.images, max_bad=1.0, progress=False
    )
    assert len(found.bad) == 8
    assert "last_state is not finite in float16" in found.bad[0]["reason"]


def test_non_finite_names_row_and_column():
    found = {
        "state": np.array([[1.0, 2], [np.inf, 1], [3, 4]]),
        "gap": np.array([np.nan, 1, 2]),
        "n": np.array([1, 2, 3]),
    }
    assert non_finite(found) == {
        0: "gap is not finite in float64",
        1: "state is not finite in float64",
    }
    assert non_finite(found, may_be_nan=("gap",)) == {1: "state is not finite in float64"}


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


def test_progress_lines(world, tmp_path, capfd):
    world.extract(tmp_path, rows=np.arange(5), progress=True)
    assert "forward: 5/5 samples" in capfd.readouterr().err


def test_plan_tells_what_extraction_does(world, tmp_path):
    rows = np.arange(N)
    options = {"batch_size": 4, "block_size": N}
    told = plan(Forward(), world.proxy, world.pool, rows, tmp_path, world.images, **options)
    assert not list(tmp_path.iterdir())
    batches, tokens = [], 0

    class Counting(Forward):
        def compute(self, proxy, items):
            nonlocal tokens
            batches.append(len(items))
            tokens += sum(item.n_tokens for item in items)
            return super().compute(proxy, items)

    reader = world.extract(tmp_path, Counting(), **options)
    assert (told["samples"], told["batches"], told["tokens"]) == (N, len(batches), tokens)
    assert told["bytes"] == sum(array.nbytes for array in columns(reader).values())
    assert 0 < told["padding"] < 0.1 and told["seconds"] > 0 and not told["stored"]
    again = plan(Forward(), world.proxy, world.pool, rows, tmp_path, world.images)
    assert again["stored"] and Path(again["folder"]) == reader.folder
