"""Fault-injection kit: make the operating system fail, kill real processes, damage files."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from selection import files

CALLS = ("open", "write", "fsync", "replace", "unlink", "makedirs")


class FaultyOS:
    """Stands where `selection.files` looks for `os`; call number `at` fails, all others are real.

    `fault` is an errno (the call raises it), "kill" (the process gets SIGKILL before the call) or
    "short" (a write stores half of its bytes and then raises ENOSPC, as a full disk does).
    `calls` holds the names of the calls made so far.
    """

    def __init__(self, at: int | None = None, fault: int | str = errno.EIO) -> None:
        self.at, self.fault = at, fault
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        real = getattr(os, name)
        return self._counted(name, real) if name in CALLS else real

    def _counted(self, name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) - 1 == self.at:
                self._fail(name, real, args)
            return real(*args, **kwargs)

        return call

    def _fail(self, name: str, real: Callable, args: tuple) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = self.fault
        if self.fault == "short":
            code = errno.ENOSPC
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
        raise OSError(code, os.strerror(code))


@contextmanager
def faulty_os(at: int | None = None, fault: int | str = errno.EIO) -> Iterator[FaultyOS]:
    """Let call `at` of `selection.files` fail inside the block; without `at`, only count."""
    shim, files.os = FaultyOS(at, fault), None
    files.os = shim
    try:
        yield shim
    finally:
        files.os = os


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; returns its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_until_killed(command: Sequence[str], seconds: float, timeout: float = 60) -> int:
    """Start `command` in its own process group, wait for its first line, SIGKILL all of it later.

    `seconds` are counted from that line ("ready"). Returns the exit status: -9 if it was killed,
    its own if it ended before. Fails the test when the line does not come within `timeout`.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    watchdog = time.monotonic() + timeout
    try:
        assert process.stdout.readline().strip() == b"ready"
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait(max(1.0, watchdog - time.monotonic()))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` by relative name, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file in place."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def corruptions(blocks: Sequence[Path]) -> dict[str, Callable[[], None]]:
    """Ways to damage `blocks[1]` (of at least three block files), by name."""
    path, other = blocks[1], blocks[2]
    size = path.stat().st_size

    def swap() -> None:
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)

    damage = {
        f"flip bit of byte {at}": lambda at=at: flip_bit(path, at, at % 8)
        for at in [0, 7, 8, 20, size // 2, size - 1, *random.Random(0).sample(range(size), 20)]
    }
    for keep in (0, 1, 7, 8, 100, size // 2, size - 1):
        damage[f"truncate to {keep}"] = lambda keep=keep: os.truncate(path, keep)
    damage["append a byte"] = lambda: path.write_bytes(path.read_bytes() + b"\0")
    damage["delete"] = path.unlink
    damage["duplicate another block over it"] = lambda: shutil.copy(other, path)
    damage["rename"] = lambda: path.rename(path.with_name("block-000099.safetensors"))
    damage["swap with another block"] = swap
    return damage


@contextmanager
def tiny_disk(folder: Path, size: int) -> Iterator[Path]:
    """A real file system of `size` bytes mounted at `folder`; skips the test where one cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
