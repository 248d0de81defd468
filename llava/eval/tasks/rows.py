"""Reading the JSON and JSON-lines files that benchmarks come in, every bad row one clear line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from llava.errors import DataError, UsageError
from llava.eval.tasks.base import Id
from llava.records import raw_records

SHORT = "Answer the question using a single word or phrase."
"""LLaVA's instruction for short answers, a line of its own after the question"""

T = TypeVar("T")


class QuestionRow(msgspec.Struct):
    """One line of LLaVA's question files."""

    question_id: Id
    image: str
    text: str
    category: str = "default"


def read_rows(path: Path, kind: type[T]) -> list[T]:
    """The records of a JSON list or JSON-lines file, each a `kind`.

    Raises UsageError if the file cannot be read, DataError naming file and row for a bad one.
    """
    return [_decoded(raw, kind, f"{path}: row {i}") for i, raw in enumerate(raw_records(path))]


def read_json(path: Path, kind: type[T]) -> T:
    """A whole JSON file as a `kind`; UsageError if unreadable, DataError if something else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return _decoded(content, kind, str(path))


def folder_of(data: Path) -> Path:
    """The benchmark's folder, when `data` is that folder or a file in it."""
    return data if data.is_dir() else data.parent


def question_file(data: Path, name: str) -> Path:
    """`data` itself if it is a file, else the file `name` in the folder."""
    return data / name if data.is_dir() else data


def find_file(folder: Path, name: str, below: Sequence[str]) -> Path | None:
    """The first of `folder/name` and `folder/<below>/name` that exists, else None."""
    paths = (folder / place / name for place in ("", *below))
    return next((path for path in paths if path.is_file()), None)


def first_line(prompt: str) -> str:
    """A prompt without its instruction lines."""
    return prompt.split("\n", 1)[0]


def _decoded(raw: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{where}: {error}; is this the file that the benchmark's owners publish?"
        ) from error
