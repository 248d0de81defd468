"""What processes tell each other: alone, before they have met, and two that have."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest

from llava import ranks
from llava.errors import DataError

BEGIN = """
import sys
from datetime import timedelta
from llava import ranks
from llava.errors import DataError, UserError
assert "torch" not in sys.modules
"""
MET = """
me = ranks.rank()
assert ranks.world_size() == 2 and not ranks.started()
ranks.join(timedelta(seconds=60))
assert ranks.started() and ranks.rank() == me and ranks.world_size() == 2
ranks.join(timedelta(seconds=1))  # has met them: nothing to do
assert ranks.share(f"from {me}") == "from 0" and ranks.gathered(me) == [0, 1]
assert ranks.from_main(lambda: me + 10) == 10
assert ranks.total([me, 1]) == [1, 2] and ranks.total_float(me / 4) == 0.25
assert ranks.any_of(me == 1) and not ranks.any_of(False)

def fail():
    raise DataError(f"row {me}")

defect = DataError("row 0") if me else None
for work in (lambda: ranks.from_main(fail), lambda: ranks.agree(defect)):
    try:
        work()
    except DataError as error:
        assert str(error) == "row 0"
    else:
        raise AssertionError("no error")
ranks.agree(None)
assert not ranks.said()
ranks.barrier()
assert sum(ranks.gathered(ranks.first_to_say())) == 1 and ranks.said()
ranks.barrier()
ranks.leave()
assert not ranks.started()
print("done", flush=True); sys.stdin.read()
"""


@pytest.fixture
def meeting() -> dict[str, str]:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    return {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def test_one_process_answers_for_itself():
    ranks.join(timedelta(seconds=1))
    ranks.barrier()
    assert (ranks.rank(), ranks.world_size(), ranks.started()) == (0, 1, False)
    assert ranks.share("x") == "x" and ranks.from_main(lambda: 7) == 7
    assert ranks.total([3]) == [3] and ranks.total_float(0.1) == 0.1 and ranks.gathered(5) == [5]
    assert ranks.first_to_say() and not ranks.said()
    with pytest.raises(DataError, match="row 3"):
        ranks.agree(DataError("row 3"))


def test_two_processes(meeting):
    """Rank 0 holds what they meet in, so it ends last."""
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN + MET],
            env={**meeting, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    assert [program.stdout.readline() for program in programs] == [b"done\n"] * 2
    for program in reversed(programs):
        program.communicate()
        assert program.returncode == 0


def test_a_process_leaves_its_group(meeting):
    """Alone and with nothing to leave it does nothing; in a group it is out of it."""
    work = (
        "ranks.leave()\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo', rank=0, world_size=1)\n"
        "ranks.leave(); assert not dist.is_initialized()\n"
        "dist.init_process_group('gloo', rank=0, world_size=1)\n"
        "ranks.leave(after_error=True); assert not dist.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", BEGIN + work], check=True, env=meeting)
