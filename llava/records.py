"""LLaVA records: how they are written, and the one reader of every file of them.

A file is a JSON list or has one JSON object a line, with or without a byte order mark; which, is
told by its content. It is mapped into memory and only the place of each record is kept, so a file
of any size costs 16 bytes a record; whoever wants a record decodes it (see docs/Data.md). The files
of benchmarks' questions and answers are read in the same way, with records of their own.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llava.conversation import check_turns
from llava.errors import DataError, UsageError

MAX_CHARACTERS = 2_000_000  # of one conversation; about 250 times what LLaVA-1.5 can read
_SPACE = re.compile(rb"[ \t\r\n]*+")
_GAP = re.compile(rb"[ \t\r\n,]*+")
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)
_BYTE = re.compile(r"\(byte (\d+)\)")
_CHUNK = 64 * 2**20
_TOO_DEEP = 200  # levels of brackets; the JSON reader gives up at several hundred

# ---- one record ----------------------------------------------------------------------------------


class Turn(msgspec.Struct, rename={"from_": "from"}, gc=False):
    """One message, `from_` "human" or "gpt"."""

    from_: str
    value: str


class Record(msgspec.Struct):
    """One LLaVA sample. Unknown keys are ignored; `id` is opaque and need not be unique."""

    conversations: list[Turn]
    id: Any = None
    image: str | None = None
    """Path relative to the image folder; without this key (or null) the record is text-only."""

    @property
    def has_image(self) -> bool:
        return self.image is not None

    @property
    def turns(self) -> list[tuple[str, str]]:
        return [(turn.from_, turn.value) for turn in self.conversations]

    @property
    def first_human(self) -> str:
        """Text of the first human turn, with its `<image>` placeholder; without one, nothing."""
        return next((turn.value for turn in self.conversations if turn.from_ == "human"), "")


_DECODER = msgspec.json.Decoder(Record)


def decode_record(raw: bytes, where: str) -> Record:
    """Read and check one record; DataError beginning with `where` (file and row) if it is bad."""
    try:
        return parse_record(raw)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def parse_record(raw: bytes) -> Record:
    """`decode_record` for those who know the row; DataError with the reason alone."""
    try:
        record = _DECODER.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        remedy = 'a record is {"id", "image" (optional), "conversations": [{"from", "value"}, ...]}'
        if str(error).endswith("`$.image`"):
            remedy = "image is one relative path, or the key is left out"
        raise DataError(f"{error}; {remedy}") from error
    check_turns(record.turns)
    length = sum(len(turn.value) for turn in record.conversations)
    if length > MAX_CHARACTERS:
        raise DataError(f"{length} characters, more than {MAX_CHARACTERS}; split it")
    return record


# ---- a file of records ---------------------------------------------------------------------------


def load_records(path: str | Path) -> list[Record]:
    """All records of a file; DataError naming the file and row of the first bad one."""
    raws = raw_records(path, key="conversations")
    return [decode_record(raw, f"{path}: row {row}") for row, raw in enumerate(raws)]


def raw_records(path: str | Path, key: str | None = None) -> Iterator[bytes]:
    """The records of a file one after another, undecoded, each exactly as it stands there.

    `key`: see `find_records`. Raises UsageError if the file cannot be read, DataError if it is
    neither a JSON list nor JSON lines or holds no record.
    """
    content = map_file(path)
    starts, ends, _ = find_records(content, path, key)
    spans = zip(starts.tolist(), ends.tolist(), strict=True)
    return (content[start:end] for start, end in spans)


def map_file(path: str | Path) -> mmap.mmap | bytes:
    """The bytes of a file, not read into memory if it can be mapped; UsageError if unreadable."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder: name the JSON file in it")
    try:
        with path.open("rb") as file:
            try:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (ValueError, OSError):  # an empty file, or a pipe
                return file.read()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def find_records(
    content: mmap.mmap | bytes, path: str | Path, key: str | None = None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Where the records of a mapped file lie, found without building a Python object per value.

    Starts and ends (N,) int64 in bytes, and whether the file is one JSON list. A lone object on one
    line may be a whole data set in another layout: with `key` it is a record only if it has that
    key. Raises DataError when the file is neither list nor lines or holds no record, with the place
    and the remedy.
    """
    begin = 3 if content[:3] == b"\xef\xbb\xbf" else 0  # a UTF-8 byte order mark
    begin = _SPACE.match(content, begin).end()
    if begin == len(content):
        expected = "expected a JSON list of records, or one record a line"
        raise DataError(f"{path}: the file is empty; {expected}")
    if content[begin : begin + 1] != b"[":
        _check_lines(content, begin, path, key)
        return *_split_lines(content, begin), False
    starts, ends = _split_list(content, begin, path)
    if not len(starts):
        raise DataError(f"{path}: the list is empty; write at least one record")
    return starts, ends, True


def line_number(content, offset: int) -> int:
    """1-based line of byte `offset`."""
    return (
        sum(content[i : min(i + _CHUNK, offset)].count(b"\n") for i in range(0, offset, _CHUNK)) + 1
    )


def _split_list(content, begin: int, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        # msgspec checks the JSON and yields views, 20 times faster than building the objects
        raws = msgspec.json.decode(memoryview(content)[begin:], type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        raise _unreadable(content, begin, path, error) from error
    lengths = np.fromiter(map(len, raws), np.int64, len(raws))
    del raws
    starts = np.empty(len(lengths), np.int64)
    position, gap = begin + 1, _GAP.match
    for i, length in enumerate(lengths.tolist()):
        starts[i] = position = gap(content, position).end()
        position += length
    return starts, starts + lengths


def _split_lines(content, begin: int) -> tuple[np.ndarray, np.ndarray]:
    breaks = [
        i + np.flatnonzero(np.frombuffer(content[i : i + _CHUNK], np.uint8) == ord("\n"))
        for i in range(0, len(content), _CHUNK)
    ]
    breaks = np.concatenate(breaks)
    starts = np.concatenate([[begin], breaks[breaks >= begin] + 1]).astype(np.int64)
    ends = np.concatenate([starts[1:] - 1, [len(content)]])
    kept = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        start = min(_SPACE.match(content, start).end(), end)
        while end > start and content[end - 1 : end] in b" \t\r":
            end -= 1
        if start < end:
            kept.append((start, end))
    starts, ends = np.array(kept, np.int64).T
    return np.ascontiguousarray(starts), np.ascontiguousarray(ends)


def _check_lines(content, begin: int, path: str | Path, key: str | None) -> None:
    """Raise DataError for everything that is neither a list nor lines of objects."""
    stop = content.find(b"\n", begin)
    first = content[begin : len(content) if stop < 0 else stop]
    kind = _kind(first)
    if kind == "object":
        alone = stop < 0 or _SPACE.match(content, stop).end() == len(content)
        if not alone or key is None:
            return
        if key in msgspec.json.decode(first, type=dict[str, msgspec.Raw]):
            return
    kind = kind or _kind(content[begin:])
    if kind:
        raise DataError(
            f"{path}: is one JSON {kind}, not a list of records: put the records in [ ], "
            "or one a line"
        )
    if first[:1] != b"{":  # else a line that is broken: reading the records will name it
        snippet = bytes(content[begin : begin + 40]).decode("utf-8", "replace")
        raise DataError(
            f"{path}: is neither a JSON list nor JSON lines (byte {begin}: {snippet!r}): "
            "check that this is the right file and that it was downloaded whole"
        )


def _kind(data: bytes) -> str | None:
    """What JSON value `data` is, or None when it is not JSON."""
    try:
        value = bytes(msgspec.json.decode(data, type=msgspec.Raw)).lstrip()
    except (msgspec.DecodeError, RecursionError):
        return None
    return {b"{": "object", b"[": "list", b'"': "string"}.get(value[:1], "value")


def _unreadable(content, begin: int, path: str | Path, error: Exception) -> DataError:
    if isinstance(error, RecursionError):
        nesting = _nesting(content, begin, len(content))
        deep = ((byte, row) for byte, depth, row in nesting if depth > _TOO_DEEP)
        byte, row = next(deep, (begin, 0))
        return DataError(f"{path}: row {row}, byte {byte}: nested too deeply: remove this record")
    place = _BYTE.search(str(error))
    if place is None:
        row = _row_at(content, begin, len(content))
        return DataError(
            f"{path}: the file ends in the middle of row {row} (byte {len(content)}): "
            "it is cut off, get it again"
        )
    byte = begin + int(place[1])
    what = str(error).removeprefix("JSON is malformed: ")[: -len(place[0])].strip()
    snippet = bytes(content[max(byte - 30, 0) : byte + 10]).decode("utf-8", "replace")
    return DataError(
        f"{path}: row {_row_at(content, begin, byte)}, byte {byte}: not JSON: {what} "
        f"in {snippet!r}: correct it or write the file again"
    )


def _row_at(content, begin: int, stop: int) -> int:
    """List index of the record around byte `stop`; slow, for error messages only."""
    return max((row for _, _, row in _nesting(content, begin, stop)), default=0)


def _nesting(content, begin: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Byte, depth behind it and list index of every bracket and comma that is in no string."""
    depth = row = 0
    for token in _TOKEN.finditer(content, begin, stop):
        if token[0] in b"[{":
            depth += 1
        elif token[0] in b"]}":
            depth -= 1
        elif token[0] == b"," and depth == 1:
            row += 1
        yield token.start(), depth, row
