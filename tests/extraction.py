"""A tiny proxy, a pool with images, and short ways to extract from them: for several test files."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np

from llava import ranks
from llava.vlm import load_vlm
from selection.extract import cost, loop
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals.forward import Forward

N = 40
WORKER = Path(__file__).parent / "selection" / "extract" / "extract_worker.py"


def settings(pool, store, images, **options) -> tuple[PoolSettings, ProxySettings]:
    """What `extract` is told of where things are and how batches are cut."""
    where = PoolSettings(str(pool.path), None if images is None else str(images))
    return where, ProxySettings(store=str(store), device="cpu", **options)


def extract(signal, model, pool, rows, store, images, progress=False, **options):
    """The store of one signal."""
    where, how = settings(pool, store, images, **options)
    return loop.extract([signal], model, pool, rows, where, how, progress)[0]


def estimate(signal, model, pool, rows, store, images, **options):
    """What an extraction would cost."""
    return cost.estimate(signal, model, pool, rows, *settings(pool, store, images, **options))


def as_rank(rank: int, world_size: int, work) -> None:
    """Do `work` as one of several processes that meet at MASTER_ADDR and MASTER_PORT."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    ranks.join(timedelta(minutes=5))
    work()


@dataclass
class World:
    """A tiny proxy, a pool and its images."""

    model: Path
    pool_path: Path
    images: Path
    base: Path | None = None
    dtype: str = "float32"

    def __post_init__(self):
        self.proxy = load_vlm(self.model, self.base, self.dtype)
        self.pool = Pool.open(self.pool_path)

    def extract(self, store, signal=None, rows=None, **options):
        rows = np.arange(len(self.pool)) if rows is None else rows
        options = {"max_bad": 1.0, **options}
        signal = signal or Forward()
        return extract(signal, self.proxy, self.pool, rows, store, self.images, **options)

    def command(self, store, signal="forward") -> list[str]:
        return list(map(str, (WORKER, self.model, self.pool_path, self.images, store, signal)))


def columns(reader) -> dict[str, np.ndarray]:
    return {name: reader.column(name) for name in reader.columns}


def assert_same(left, right, rows=slice(None)):
    for name, array in columns(left).items():
        np.testing.assert_array_equal(array[rows], right.column(name)[rows], err_msg=name)


def assert_closer_than_rounding(left, right, exact):
    """Two stores in a narrow dtype are no further apart than each of them is from float32.

    Other batches or threads may mean other kernels, which add up in another order. That flips the
    rounding of some states, and of all that follows from them: two independent roundings of the
    same numbers, at most, so that twice the root mean square of one is a wide bound. A number of
    another sample, or a sum over too many, is far outside it.
    """
    for name, array in columns(exact).items():
        if array.dtype.kind == "i":
            np.testing.assert_array_equal(left.column(name), right.column(name), err_msg=name)
            continue
        one, other = (reader.column(name).astype(np.float64) for reader in (left, right))
        rounding, apart = (np.sqrt(np.mean(x**2)) for x in (other - array, one - other))
        assert 0 < rounding and apart <= 2 * rounding, (name, apart, rounding)


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


class Forbidden(Forward):
    """Computes nothing: any attempt fails the test."""

    def compute(self, proxy, items):
        raise AssertionError("computed again")


class Slow(Forward):
    """Takes 0.05 s a batch more, so that a kill comes before the end on any machine."""

    def compute(self, proxy, items):
        time.sleep(0.05)
        return super().compute(proxy, items)
