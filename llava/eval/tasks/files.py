"""Reading the files that benchmarks come in, every bad row one clear line.

JSON lists and JSON lines, LLaVA's and the owners', and parquet as on Hugging Face. A split in
parquet is one file or several, `<split>-00000-of-00003.parquet`, ...; all its parts must be there.
Pictures stay encoded bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from llava.errors import DataError, UsageError
from llava.eval.tasks.base import Id
from llava.records import raw_records

SHORT = "Answer the question using a single word or phrase."
"""LLaVA's instruction for short answers, a line of its own after the question"""
BATCH = 64
"""rows of parquet read at a time: of pictures of a megabyte, not the whole file at once"""
_PART = re.compile(r".*-(\d{5})-of-(\d{5})\b.*\.parquet")

T = TypeVar("T")


class QuestionRow(msgspec.Struct):
    """One line of LLaVA's question files."""

    question_id: Id
    image: str
    text: str
    category: str = "default"


class Picture(msgspec.Struct, rename={"content": "bytes"}):
    """A cell of Hugging Face's image type."""

    content: bytes | None = None


# ---- where they are


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


# ---- JSON


def read_rows(path: Path, kind: type[T]) -> list[T]:
    """The records of a JSON list or JSON-lines file, each a `kind`.

    Raises UsageError if the file cannot be read, DataError naming file and row for a bad one.
    """
    return [_decoded(raw, kind, f"{path}: row {i}") for i, raw in enumerate(raw_records(path))]


def read_document(path: Path, kind: type[T]) -> T:
    """A whole JSON file as a `kind`; UsageError if unreadable, DataError if something else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return _decoded(content, kind, str(path))


def _decoded(raw: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{where}: {error}; is this the file that the benchmark's owners publish?"
        ) from error


# ---- JSON or parquet


def read_questions(
    data: Path, kind: type[T], split: str, name: str = "", below: Sequence[str] = ("data",)
) -> Iterator[tuple[str, T]]:
    """The rows of a benchmark, each a `kind` with its place in words.

    `data` is the question file, or the folder with the JSON file `name` or the parquet files of
    `split`, there or in one of the folders `below`. Raises UsageError if there is none, or one
    that cannot be read, DataError naming file and row for a bad row or a missing part.
    """
    for path in _question_files(data, split, name, below):
        if path.suffix == ".parquet":
            yield from _parquet_rows(path, kind)
        else:
            rows = read_rows(path, kind)
            yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows))


def _question_files(data: Path, split: str, name: str, below: Sequence[str]) -> list[Path]:
    if not data.is_dir():
        return [data]
    if name and (path := find_file(data, name, below)):
        return [path]
    for folder in (".", *below):
        if paths := sorted(data.glob(f"{folder}/{split}-*.parquet")):
            _check_parts(paths)
            return paths
    names = " nor ".join(filter(None, (name, f"{split}-*.parquet")))
    raise UsageError(f"{data}: no {names}; give the folder or file of the benchmark's owners")


def _check_parts(paths: Sequence[Path]) -> None:
    """DataError unless all parts of each folder's split are among `paths`."""
    parts = {(path.parent, int(m[1])): m for path in paths if (m := _PART.fullmatch(path.name))}
    for (folder, _), match in parts.items():
        for number in range(int(match[2])):
            if (folder, number) not in parts:
                raise DataError(f"{folder}: part {number} of {match[2]} is missing; download it")


def _parquet_rows(path: Path, kind: type[T]) -> Iterator[tuple[str, T]]:
    try:
        with path.open("rb") as content:
            file = pq.ParquetFile(content)
            columns = _columns(path, file.schema_arrow.names, kind)
            batches = file.iter_batches(BATCH, columns=columns)
            for i, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                yield f"{path}: row {i}", _converted(row, kind, f"{path}: row {i}")
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UsageError(f"{path}: {error.strerror}") from error
        line = str(error).splitlines()[0]
        raise DataError(f"{path}: {line}; download it again") from error


def _columns(path: Path, names: Sequence[str], kind: type) -> list[str]:
    """Those of a `kind` that the file has; UsageError if one that it needs is not there."""
    fields = msgspec.structs.fields(kind)
    missing = [f.encode_name for f in fields if f.required and f.encode_name not in names]
    if missing:
        raise UsageError(
            f"{path}: no column {', '.join(missing)}; give the benchmark's own parquet files"
        )
    return [field.encode_name for field in fields if field.encode_name in names]


def _converted(row: dict[str, Any], kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(row, kind)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {error}; correct it, or download the file again") from error
