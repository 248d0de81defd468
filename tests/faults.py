"""Fault-injection kit: make the operating system fail, kill real processes, damage files."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava import files

CALLS = ("open", "write", "fsync", "replace", "unlink", "makedirs")


class FaultyOS:
    """Stands where `llava.files` looks for `os`; call number `at` fails, all others are real.

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
    """Let call `at` of `llava.files` fail inside the block; without `at`, only count."""
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


DAMAGE = [
    *(f"flip bit at {percent}%" for percent in (0, 1, 2, 3, 5, *range(10, 101, 9), 100)),
    *(f"truncate to {percent}%" for percent in (0, 1, 2, 10, 50, 99)),
    "append a byte",
    "delete",
    "duplicate another over it",
    "rename",
    "swap with another",
]


def corrupt(paths: Sequence[Path], kind: str) -> None:
    """Damage `paths[1]` (of at least three files) in one of the ways of `DAMAGE`."""
    path, other = paths[1], paths[2]
    data, last = path.read_bytes(), path.stat().st_size - 1
    at = last * int(kind.rpartition(" ")[2][:-1]) // 100 if kind.endswith("%") else 0
    match kind.split()[0]:
        case "flip":
            flip_bit(path, at, at % 8)
        case "truncate":
            os.truncate(path, at)
        case "append":
            path.write_bytes(data + b"\0")
        case "delete":
            path.unlink()
        case "duplicate":
            shutil.copy(other, path)
        case "rename":
            path.rename(path.with_name("block-000099.safetensors"))
        case "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)


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
