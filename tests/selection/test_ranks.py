import os
import socket
import subprocess
import sys
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


def test_first_rank_decides(free_port):
    """Two processes of their own; rank 0 holds what they meet in, so it leaves last."""
    work = (
        "import sys; from selection.ranks import Ranks; rank = int(sys.argv[1])\n"
        "ranks = Ranks(rank, 2)\n"
        "assert ranks.is_first == (rank == 0)\n"
        "assert ranks.share(f'from {rank}') == 'from 0'\n"
        "assert ranks.from_first(lambda: rank + 10) == 10\n"
        "ranks.barrier()\n"
        "print('done', flush=True); sys.stdin.read()\n"
    )
    meeting = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port)}
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", work, str(rank)],
            env=meeting,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    assert [program.stdout.readline() for program in programs] == [b"done\n"] * 2
    for program in reversed(programs):
        program.communicate()
        assert program.returncode == 0


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
