"""Training programs as real processes, watched line by line; nothing outlives a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]
ALONE = ("-m", "llava.train")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *ALONE)
SECONDS = 120  # then a run is taken for hanging


class Program:
    """A started program; `lines` grow with what it writes to stderr."""

    def __init__(self, words: Sequence[str], **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, beginning: str) -> None:
        """Return when a line that begins so was written."""
        wait_until(
            lambda: any(line.startswith(beginning) for line in self.lines), self.process, self
        )

    def ranks(self) -> list[psutil.Process]:
        """The processes that a launcher started, by rank."""
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def end(self) -> int:
        """Wait for the end; its exit code, negative for a signal."""
        code = self.process.wait(SECONDS)
        self._reader.join(5)  # a child that is stopped keeps the pipe open
        return code


def wait_until(condition, process: subprocess.Popen | None = None, program=None) -> None:
    """Return as soon as `condition()` holds; fail if it never does."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        text = program.text if program else ""
        assert process is None or process.poll() is None, f"ended too early:\n{text}"
        assert time.monotonic() < deadline, f"hangs:\n{text}"
        time.sleep(0.001)


@contextmanager
def started(words: Sequence[str], **environment: str) -> Iterator[Program]:
    """A program that is killed, with all it started, when the block ends."""
    program = Program(words, **environment)
    try:
        yield program
    finally:
        for process in [program.process, *_descendants(program.process.pid)]:
            try:
                process.send_signal(signal.SIGKILL)
            except (psutil.NoSuchProcess, ProcessLookupError):
                pass
        program.process.wait()
        program._reader.join()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
