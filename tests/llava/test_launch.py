"""How programs end, in one line and a code; what a scheduler sees of a launch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava import errors
from llava.launch import process

RANK = """
import os, signal, sys, time

rank = os.environ["RANK"]
deed = sys.argv[1]
if deed == "raise" and rank == "1":
    raise ValueError("the traceback of rank 1")
if deed == "kill" and rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if deed.isdigit():
    sys.exit(int(deed))
if deed == "listen":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun's, when the other rank has ended
    os.write(1, b"ready\\n")  # at once: both ranks write into one pipe
if deed == "deaf":
    os.write(1, b"ready\\n")  # at once: both ranks write into one pipe
time.sleep(60)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "rank.py").write_text(RANK)
    flags = ["--standalone", "--nproc_per_node", "2", str(tmp_path / "rank.py")]
    return [sys.executable, "-m", "llava.launch", *flags]


@pytest.mark.parametrize("code", [0, 65, 75])
def test_exit_code_of_the_ranks(command, code):
    done = subprocess.run([*command, str(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert "ChildFailedError" not in done.stderr and "Traceback" not in done.stderr
    assert "torch/distributed" not in done.stderr  # nor what torchrun logs of ranks that end


@pytest.mark.parametrize(
    ("deed", "shown"), [("raise", "the traceback of rank 1"), ("kill", "Signal 9 (SIGKILL)")]
)
def test_a_crash_is_1_with_a_summary_and_ends_the_others(command, deed, shown):
    """P17."""
    done = subprocess.run([*command, deed], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and shown in done.stderr and "Root Cause" in done.stderr


@pytest.mark.parametrize("deed", ["listen", "deaf"])
def test_signals_reach_every_rank(command, deed):
    """P16: two ranks that listen; and two that do not listen yet."""
    process = subprocess.Popen([*command, deed], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
    os.kill(process.pid, signal.SIGUSR1)
    process.communicate(timeout=20)  # torchrun would give up at 30
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("error", "code"),
    [("UsageError", 2), ("DataError", 65), ("NonFiniteError", 70), ("StorageError", 74)]
    + [("RefusedError", 77)],
)
def test_a_user_error_is_one_line_and_its_code(error, code, capsys):
    def main():
        raise getattr(errors, error)("what it was")

    with pytest.raises(SystemExit) as ended:
        process(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == "error: what it was\n"


def test_a_reader_that_goes_away_ends_a_program_quietly():
    """`selection list | head`, with a reader that is gone before the first line."""
    command = [sys.executable, "-m", "selection", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.close()
        assert started.stderr.read() == b""
    assert started.returncode == 141
