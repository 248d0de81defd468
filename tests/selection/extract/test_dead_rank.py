"""A rank that dies: the others end, and what is committed stays (promise P17)."""

import os
import socket
import time

import pytest

from selection.signals.forward import Forward
from tests.extraction import as_rank, fork
from tests.faults import snapshot


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


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
            lambda r=r: as_rank(
                r, 2, lambda: world.extract(tmp_path, (Forward, Mortal)[r](), block_size=6)
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
