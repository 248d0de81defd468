import os
import socket
import time

import pytest

from selection.ranks import Ranks
from selection.signals.forward import Forward
from tests.extraction import fork
from tests.faults import snapshot


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_one_process_needs_no_group():
    ranks = Ranks(0, 1)
    ranks.barrier()
    assert ranks.is_first and ranks.from_first(lambda: 7) == 7 and ranks.share("x") == "x"


def test_first_rank_decides(free_port, tmp_path):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free_port))

    def work(rank: int) -> None:
        ranks = Ranks(rank, 2)
        assert ranks.is_first == (rank == 0)
        assert ranks.share(f"from {rank}") == "from 0"
        assert ranks.from_first(lambda: rank + 10) == 10
        ranks.barrier()
        if rank == 0:  # it holds what the other meets it through; under torchrun the launcher does
            while not (tmp_path / "left").exists():
                time.sleep(0.01)
        (tmp_path / "left").touch()

    children = [fork(lambda r=r: work(r)) for r in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]


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
