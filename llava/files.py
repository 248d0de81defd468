"""The only place that writes to disk: whole files appear at once or not at all (promise P8).

Every write is `open, write, fsync, rename, fsync of the folder` through the `os` module imported
here, so that `tests/faults.py` can make any one of those calls fail or kill the process at it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` from writing `path` into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDY.get(error.errno, error.strerror or str(error))
        raise StorageError(
            f"{path}: cannot write: {remedy}; then run the same command again, "
            "everything finished so far is kept"
        ) from error


def atomic_write(path: str | Path, data: bytes | Iterable[bytes]) -> None:
    """Put `data` at `path` so that a reader sees the old file or the whole new one, never a part.

    A large file may be given piece by piece. Raises `StorageError` when the disk is full,
    read-only or faulty; the old file is then intact.
    """
    path = Path(path)
    temp = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    with storage_errors(path):
        try:
            _write_synced(temp, [data] if isinstance(data, bytes) else data, os.O_EXCL)
            os.replace(temp, path)
        except OSError:
            remove(temp)
            raise
        sync_folder(path.parent)


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
            sync_folder(path.parent)


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


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
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
