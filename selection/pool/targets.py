"""Target tasks: small labelled sets that say what the subset is wanted for, named in a YAML list.

    - name: pope                    # as it stands in reports
      data: pope_val.json           # LLaVA records; a list of files makes each a sub-task
      images: images                # folder of their pictures; none for text
      weight: 1                     # of its vote
      subtasks: category            # a key of the records (or of their `meta`) to divide them by

Paths are relative to the YAML file. Every sub-task is extracted into a store of its own, so a task
or sub-task that is added later costs its own samples only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

from llava.errors import DataError, UsageError
from selection.pool.pool import Pool


@dataclass(frozen=True)
class Subtask:
    """`rows` (n,) int64 of `pool`; of a task that is not divided, all of it under its name."""

    name: str
    pool: Pool
    rows: np.ndarray


@dataclass(frozen=True)
class Target:
    """A target task: what its vote weighs, where its pictures are, and its sub-tasks."""

    name: str
    weight: float
    images: str | None
    subtasks: tuple[Subtask, ...]

    def identity(self) -> dict[str, Any]:
        """What decides the task's influence, JSON-serialisable; places do not."""
        digests = {subtask.name: subtask.pool.digest(subtask.rows) for subtask in self.subtasks}
        return {"name": self.name, "weight": self.weight, "subtasks": digests}


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    data: str | list[str]
    images: str | None = None
    weight: float = 1.0
    subtasks: str | None = None


def read_targets(path: str | Path) -> tuple[Target, ...]:
    """The tasks of a YAML file, in its order.

    Raises UsageError for what is not such a list, names a file that is not there, repeats a name
    or has a weight that is not positive; DataError for data that cannot be used.
    """
    path = Path(path)
    entries = _entries(path)
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            raise UsageError(f"--targets {path}: two tasks are called {entry.name!r}; rename one")
        if not (entry.weight > 0 and math.isfinite(entry.weight)):
            raise UsageError(
                f"--targets {path}: {entry.name}: weight {entry.weight:g}: give one above 0, or "
                "leave the task out"
            )
    return tuple(_target(entry, path) for entry in entries)


def title_of(task: str, subtask: str) -> str:
    """How a sub-task is called in full."""
    return task if subtask == task else f"{task}/{subtask}"


def _entries(path: Path) -> list[_Entry]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = msgspec.convert(content, list[_Entry], strict=False)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--targets {path}: {reason}; it is a YAML list of tasks, each with name and data"
        ) from None
    if not entries:
        raise UsageError(f"--targets {path}: names no task")
    return entries


def _target(entry: _Entry, path: Path) -> Target:
    files = [entry.data] if isinstance(entry.data, str) else entry.data
    if not files:
        raise UsageError(f"--targets {path}: {entry.name}: data names no file")
    subtasks = [
        subtask for file in files for subtask in _subtasks(entry, path, file, len(files) > 1)
    ]
    images = None if entry.images is None else str(path.parent / entry.images)
    return Target(entry.name, entry.weight, images, tuple(subtasks))


def _subtasks(entry: _Entry, path: Path, file: str, is_one_of_many: bool) -> list[Subtask]:
    """The sub-tasks of one data file, in the order of their first record."""
    data = path.parent / file
    if not data.is_file():
        raise UsageError(f"--targets {path}: {entry.name}: no such file {data}")
    pool = Pool.open(data)
    name = data.stem if is_one_of_many else entry.name
    if entry.subtasks is None:
        return [Subtask(name, pool, np.arange(len(pool)))]
    groups: dict[str, list[int]] = {}
    for row in range(len(pool)):
        groups.setdefault(_value(pool, row, entry.subtasks), []).append(row)
    prefix = f"{name}/" if is_one_of_many else ""
    return [Subtask(prefix + value, pool, np.array(rows)) for value, rows in groups.items()]


def _value(pool: Pool, row: int, key: str) -> str:
    """What a record, or its `meta`, says under `key`."""
    pool.record(row)  # raises DataError for one that is no record
    record = msgspec.json.decode(pool.raw(row))
    meta = record.get("meta")
    value = record.get(key, meta.get(key) if isinstance(meta, dict) else None)
    if value is None:
        raise DataError(f"{pool.path}: row {row}: has no {key!r}, which its sub-task follows from")
    return str(value)
