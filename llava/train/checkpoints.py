"""Which `checkpoint-N` are whole, and which one a run goes on from (promise P14).

`COMPLETE` is written last, when every process has written its part: the name, size and xxh3-128
of each file. A folder without it, or with a file that differs from it, is never resumed from; it is
renamed, not deleted. Two whole ones are kept at least: the newest may be found damaged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from llava import ranks
from llava.errors import RefusedError, StorageError
from llava.model.weights import write_json

MARKER = "COMPLETE"
KEPT_AT_LEAST = 2
_NAME = re.compile(r"checkpoint-(\d+)")
_OF_A_RANK = re.compile(r"(?:rank_|rng_state_)(\d+)")
_OF_ARCHIVE = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos")
_BLOCK = 1 << 22


def step_of(folder: Path) -> int:
    """The optimizer step after which `folder`, a `checkpoint-N`, was written."""
    return int(_NAME.fullmatch(folder.name)[1])


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """A disk that is full, read-only or faulty while `folder` is written becomes a StorageError.

    PyTorch says the same as a RuntimeError of its archive writer.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OF_ARCHIVE.search(str(error)):
            raise
        free = shutil.disk_usage(folder.parent).free
        reason = getattr(error, "strerror", None) or "PyTorch could not write a file"
        raise StorageError(
            f"{folder}: cannot write: {reason} ({free / 2**20:,.0f} MiB are free); make room and "
            "run the same command again, the checkpoint before it is whole"
        ) from error


def mark_complete(folder: Path, names: Iterable[str] | None = None) -> None:
    """List `names`, by default all files in `folder`, in its marker. To be called by all processes.

    Each hashes what it has just written itself, which is still in memory. Raises StorageError.
    """
    ranks.barrier()
    listed = ranks.from_main(lambda: sorted(_files(folder) if names is None else names))
    mine = {name: _described(folder / name) for name in listed if _is_mine(name)}
    files = {name: entry for part in ranks.gathered(mine) for name, entry in part.items()}
    if ranks.rank() == 0:
        write_json(folder / MARKER, {"files": files})
    ranks.barrier()


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return [path.relative_to(folder).as_posix() for path in found]


def _is_mine(name: str) -> bool:
    """Whether this process wrote the file: DeepSpeed and Trainer number those of the others."""
    numbered = _OF_A_RANK.search(name)
    writer = int(numbered[1]) if numbered else 0
    return writer % ranks.world_size() == ranks.rank()


def _described(path: Path) -> dict[str, int | str]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        size = file.tell()
        os.fsync(file.fileno())
    return {"size": size, "xxh3_128": digest.hexdigest()}


def flaw(folder: Path, content: bool = True) -> str | None:
    """What keeps `folder` from being complete, or None; reads every byte if `content`."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MARKER}: writing it was interrupted"
    except (OSError, ValueError, LookupError, TypeError):
        return f"its {MARKER} is damaged"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if content and _described(path) != entry:
            return f"the content of {name} has changed"
    return None


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file that its marker lists, byte for byte."""
    return flaw(folder) is None


def _survey(output_dir: Path, content: bool = True) -> Iterator[tuple[Path, str | None]]:
    """Every `checkpoint-N` and its flaw, newest first; `content` is read until one is whole."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    for folder in sorted(found, key=step_of, reverse=True):
        reason = flaw(folder, content)
        content = content and reason is not None
        yield folder, reason


def newest_complete(output_dir: Path) -> Path | None:
    """The newest whole `checkpoint-N`, if there is one; moves nothing."""
    return next((folder for folder, reason in _survey(output_dir) if reason is None), None)


def set_aside(output_dir: Path) -> Path | None:
    """Rename every `checkpoint-N` that is not whole and say so; the newest whole one."""
    for old in output_dir.glob("checkpoint-*.old"):  # being rotated when a run ended
        shutil.rmtree(old)
    newest = None
    for folder, reason in list(_survey(output_dir)):
        if reason is None:
            newest = newest or folder
            continue
        aside = _free_name(folder)
        folder.rename(aside)
        print(f"{folder}: not used, {reason}; kept as {aside.name}", file=sys.stderr)
    return newest


def _free_name(folder: Path) -> Path:
    aside, number = folder.with_name(f"{folder.name}.incomplete"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.incomplete-{number}")
    return aside


def rotate(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest whole checkpoints beyond `limit`, but never the last two or `best`."""
    if not limit:
        return
    whole = [folder for folder, reason in _survey(output_dir, False) if reason is None]
    for folder in whole[max(limit, KEPT_AT_LEAST) :]:
        if best is None or folder.resolve() != Path(best).resolve():
            old = folder.rename(folder.with_name(f"{folder.name}.old"))
            shutil.rmtree(old)


def check_owner(folder: Path) -> None:
    """RefusedError if a file in `folder` was not written by the user who would load it.

    DeepSpeed keeps its state as pickles, which can run code when they are read (P22).
    """
    with tempfile.TemporaryFile(dir=folder.parent) as own:
        user = os.fstat(own.fileno()).st_uid
    for name in _files(folder):
        if (folder / name).stat().st_uid != user:
            raise RefusedError(
                f"{folder / name}: belongs to another user, and loading it could run code; "
                "copy the checkpoint if you trust it"
            )
