"""The only place that writes to disk: whole files appear at once or not at all (promise P8).

Every write is `open, write, fsync, rename, fsync of the folder` through the `os` module imported
here, so that `tests/faults.py` can make any one of those calls fail or kill the process at it.
What a library writes by itself (safetensors, PyTorch) it writes to a name that `writing` gives.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llava.errors import StorageError

_TEMP = re.compile(r"\.[0-9a-f]{16}\.tmp$")
_REMEDY = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "the file would exceed the size limit (ulimit -f): raise it",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder you may write to",
    errno.ENOENT: "its folder was removed, or another process has finished this work",
    errno.EIO: "the device returned an error: check it, or choose another folder",
}


_CONTINUE = "then run the same command again, everything finished so far is kept"
# What libraries make of an error of the disk: safetensors' text ends in its number.
_NUMBER = re.compile(r"\(os error (\d+)\)")
_PYTORCH = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos")


@contextmanager
def storage_errors(path: Path, advice: str = _CONTINUE) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written into a `StorageError` with the remedy.

    That is an `OSError`, or what safetensors and PyTorch raise in its place.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _refusal(error, path)
        if reason is None:
            raise
        raise StorageError(f"{path}: cannot write: {reason}; {advice}") from error


def _refusal(error: Exception, path: Path) -> str | None:
    if isinstance(error, RuntimeError):  # PyTorch's archive writer drops the cause
        free = shutil.disk_usage(path.parent).free / 2**20
        text = f"PyTorch could not write a file ({free:,.0f} MiB are free)"
        return text if _PYTORCH.search(str(error)) else None
    number = getattr(error, "errno", None)
    if told := _NUMBER.search(str(error)):
        number = int(told[1])
    return _REMEDY.get(number, getattr(error, "strerror", None) or str(error))


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Give a temporary name; what is written and synced there appears at `path` at once."""
    temp = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    with storage_errors(path):
        try:
            yield temp
            os.replace(temp, path)
        except BaseException:
            remove(temp)
            raise
        sync(path.parent)


def atomic_write(path: str | Path, data: bytes | Iterable[bytes]) -> None:
    """Put `data` at `path` so that a reader sees the old file or the whole new one, never a part.

    A large file may be given piece by piece. Raises `StorageError` when the disk is full,
    read-only or faulty; the old file is then intact.
    """
    with _appearing(Path(path)) as temp:
        _write_synced(temp, [data] if isinstance(data, bytes) else data, os.O_EXCL)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """As `atomic_write`, for a library that writes a file itself: gives the name to write to.

    The folder of `path` is made where it is missing.
    """
    path = Path(path)
    make_folder(path.parent)
    with _appearing(path) as temp:
        yield temp
        sync(temp)


@contextmanager
def writing_folder(path: Path, advice: str) -> Iterator[Path]:
    """Give a folder to write to; it then appears as `path`, absent or empty, at once.

    Nothing stays of a failure, and what a killed process has left is overwritten. Raises
    `StorageError`, which ends with `advice`.
    """
    temp = path.with_name(f".{path.name}.partial")
    with storage_errors(path, advice):
        try:
            shutil.rmtree(temp, ignore_errors=True)
            os.makedirs(temp)
            yield temp
            os.replace(temp, path)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        sync(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, at once or not at all; makes its folder."""
    make_folder(Path(path).parent)
    atomic_write(path, f"{json.dumps(value, indent=2, sort_keys=True)}\n".encode())


def append_line(path: str | Path, line: bytes) -> None:
    """Add `line` to the end of `path`, synced to disk.

    The line starts with a line break too: if a crash cut the previous one short, this one is
    still whole. Readers skip the blank lines.
    """
    path = Path(path)
    with storage_errors(path):
        new = not path.exists()
        _write_synced(path, [b"\n" + line + b"\n"], os.O_APPEND)
        if new:
            sync(path.parent)


def make_folder(path: str | Path) -> None:
    """Create `path` and its parents."""
    with storage_errors(Path(path)):
        os.makedirs(path, exist_ok=True)


def remove(path: Path) -> None:
    """Delete `path` if it can be; what stays behind is swept later."""
    try:
        os.unlink(path)
    except OSError:
        pass


def sweep(folder: Path) -> None:
    """Delete temporary files left in `folder` and below by writers that were killed.

    Call it when the work in `folder` is complete: nothing that is still needed is temporary then.
    """
    for path in list(folder.rglob("*.tmp")):
        if is_temporary(path):
            remove(path)


def is_temporary(path: Path) -> bool:
    """Whether `path` is a file that is still being written, or was when its writer was killed."""
    return _TEMP.search(path.name) is not None


def digest_of(path: str | Path, algorithm: str | Callable[[], Any] = "sha256") -> str:
    """Hexadecimal digest of a file's bytes, by a name in hashlib or a maker such as xxh3_128's."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def add_files(digest: Any, paths: Iterable[Path]) -> None:
    """Update `digest` with the name, the length and every byte of each file."""
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)


def sync(path: Path) -> None:
    """Make the content of a file, or a rename inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _write_synced(path: Path, pieces: Iterable[bytes], flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
