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
from pathlib import Path

import xxhash

from llava import ranks
from llava.errors import RefusedError
from llava.files import digest_of, storage_errors, sync, write_json

MARKER = "COMPLETE"
KEPT_AT_LEAST = 2
GOES_ON = "make room and run the same command again, the checkpoint before it is whole"
_NAME = re.compile(r"checkpoint-(\d+)")
_OF_A_RANK = re.compile(r"(?:rank_|rng_state_)(\d+)")


def step_of(folder: Path) -> int:
    """The optimizer step after which `folder`, a `checkpoint-N`, was written."""
    return int(_NAME.fullmatch(folder.name)[1])


def mark_complete(folder: Path, names: Iterable[str] | None = None) -> None:
    """List `names`, by default all files in `folder`, in its marker. To be called by all processes.

    Each syncs and hashes what it has just written itself, which is still in memory. Raises
    StorageError.
    """
    ranks.barrier()
    listed = ranks.from_main(lambda: sorted(_files(folder) if names is None else names))
    described = {}
    for name in listed:
        if _is_of_this_process(name):
            with storage_errors(folder / name):
                sync(folder / name)
            described[name] = _described(folder / name)
    entries = {name: entry for part in ranks.gathered(described) for name, entry in part.items()}
    if ranks.rank() == 0:
        write_json(folder / MARKER, {"files": entries})
    ranks.barrier()


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return [path.relative_to(folder).as_posix() for path in paths]


def _is_of_this_process(name: str) -> bool:
    """Whether this process wrote the file: DeepSpeed and Trainer number those of the others."""
    numbered = _OF_A_RANK.search(name)
    writer = int(numbered[1]) if numbered else 0
    return writer % ranks.world_size() == ranks.rank()


def _described(path: Path) -> dict[str, int | str]:
    return {"size": path.stat().st_size, "xxh3_128": digest_of(path, xxhash.xxh3_128)}


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
    named = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    for folder in sorted(named, key=step_of, reverse=True):
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
    with tempfile.TemporaryFile(dir=folder.parent) as new:
        user = os.fstat(new.fileno()).st_uid
    for name in _files(folder):
        if (folder / name).stat().st_uid != user:
            raise RefusedError(
                f"{folder / name}: belongs to another user, and loading it could run code; "
                "copy the checkpoint if you trust it"
            )
