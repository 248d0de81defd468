"""A tiny proxy, a pool with images, and short ways to extract from them: for several test files."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.vlm import load_vlm
from selection.extract.loop import extract
from selection.pool.pool import Pool
from selection.signals.forward import Forward

N = 40
WORKER = Path(__file__).parent / "selection" / "extract" / "extract_worker.py"


@dataclass
class World:
    """A tiny proxy, a pool and its images."""

    model: Path
    pool_path: Path
    images: Path
    base: Path | None = None

    def __post_init__(self):
        self.proxy = load_vlm(self.model, self.base)
        self.pool = Pool.open(self.pool_path)

    def extract(self, store, signal=None, rows=None, **options):
        rows = np.arange(len(self.pool)) if rows is None else rows
        options = {"progress": False, "max_bad": 1.0, **options}
        signal = signal or Forward()
        return extract(signal, self.proxy, self.pool, rows, store, self.images, **options)

    def command(self, store, signal="forward") -> list[str]:
        return list(map(str, (WORKER, self.model, self.pool_path, self.images, store, signal)))


def columns(reader) -> dict[str, np.ndarray]:
    return {name: reader.column(name) for name in reader.columns}


def assert_same(left, right, rows=slice(None)):
    for name, array in columns(left).items():
        np.testing.assert_array_equal(array[rows], right.column(name)[rows], err_msg=name)


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
