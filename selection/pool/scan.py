"""Where each record of a pool file lies, found without building a Python object per value.

Both forms are recognised by content: a JSON list, and JSON lines (one record a line). A file that
is neither is refused with the place and the remedy.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np

from llava.errors import DataError

_SPACE = re.compile(rb"[ \t\r\n]*+")
_GAP = re.compile(rb"[ \t\r\n,]*+")
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)
_BYTE = re.compile(r"\(byte (\d+)\)")
_CHUNK = 64 * 2**20


def split(buffer, path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    """Starts and ends (N,) int64 of the records in `buffer` (bytes or mmap), and if it is a list.

    Raises DataError when the file is neither a JSON list nor JSON lines, or has no record.
    """
    begin = 3 if buffer[:3] == b"\xef\xbb\xbf" else 0  # a UTF-8 byte order mark
    begin = _SPACE.match(buffer, begin).end()
    if begin == len(buffer):
        raise DataError(f"{path}: the pool is empty: write at least one record")
    if buffer[begin : begin + 1] == b"[":
        starts, ends = _split_list(buffer, begin, path)
    elif _is_lines(buffer, begin, path):
        return *_split_lines(buffer, begin), False
    if not len(starts):
        raise DataError(f"{path}: the list holds no record: the pool is empty")
    return starts, ends, True


def line_number(buffer, offset: int) -> int:
    """1-based line of byte `offset`."""
    return (
        sum(buffer[i : min(i + _CHUNK, offset)].count(b"\n") for i in range(0, offset, _CHUNK)) + 1
    )


def _split_list(buffer, begin: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        # msgspec checks the JSON and yields views, 20 times faster than building the objects
        raws = msgspec.json.decode(memoryview(buffer)[begin:], type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        raise _unreadable(buffer, begin, path, error) from error
    lengths = np.fromiter(map(len, raws), np.int64, len(raws))
    del raws
    starts = np.empty(len(lengths), np.int64)
    position, gap = begin + 1, _GAP.match
    for i, length in enumerate(lengths.tolist()):
        starts[i] = position = gap(buffer, position).end()
        position += length
    return starts, starts + lengths


def _split_lines(buffer, begin: int) -> tuple[np.ndarray, np.ndarray]:
    breaks = [
        i + np.flatnonzero(np.frombuffer(buffer[i : i + _CHUNK], np.uint8) == ord("\n"))
        for i in range(0, len(buffer), _CHUNK)
    ]
    breaks = np.concatenate(breaks)
    starts = np.concatenate([[begin], breaks[breaks >= begin] + 1]).astype(np.int64)
    ends = np.concatenate([starts[1:] - 1, [len(buffer)]])
    kept = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        start = min(_SPACE.match(buffer, start).end(), end)
        while end > start and buffer[end - 1 : end] in b" \t\r":
            end -= 1
        if start < end:
            kept.append((start, end))
    starts, ends = np.array(kept, np.int64).T
    return np.ascontiguousarray(starts), np.ascontiguousarray(ends)


def _is_lines(buffer, begin: int, path: Path) -> bool:
    """True for JSON lines; raises for everything else that is no list."""
    stop = buffer.find(b"\n", begin)
    first = buffer[begin : len(buffer) if stop < 0 else stop]
    kind = _kind(first)
    if kind == "object":
        single = stop < 0 or _SPACE.match(buffer, stop).end() == len(buffer)
        if not single or "conversations" in msgspec.json.decode(first, type=dict[str, msgspec.Raw]):
            return True
    whole = kind or _kind(buffer[begin:])
    if whole:
        raise DataError(
            f"{path}: is one JSON {whole}, not a list of records: put the records in [ ], "
            "or one a line"
        )
    snippet = bytes(buffer[begin : begin + 40]).decode("utf-8", "replace")
    raise DataError(
        f"{path}: is neither a JSON list nor JSON lines (byte {begin}: {snippet!r}): "
        "check that this is the pool and that it was downloaded whole"
    )


def _kind(data: bytes) -> str | None:
    """What JSON value `data` is, or None when it is not JSON."""
    try:
        value = bytes(msgspec.json.decode(data, type=msgspec.Raw)).lstrip()
    except (msgspec.DecodeError, RecursionError):
        return None
    return {b"{": "object", b"[": "list", b'"': "string"}.get(value[:1], "value")


def _unreadable(buffer, begin: int, path: Path, error: Exception) -> DataError:
    if isinstance(error, RecursionError):
        row, byte = _deepest(buffer, begin)
        return DataError(f"{path}: row {row}, byte {byte}: nested too deeply: remove this record")
    place = _BYTE.search(str(error))
    if place is None:
        row = _row_at(buffer, begin, len(buffer))
        return DataError(
            f"{path}: the file ends in the middle of row {row} (byte {len(buffer)}): "
            "it is cut off, get it again"
        )
    byte = begin + int(place[1])
    what = str(error).removeprefix("JSON is malformed: ")[: -len(place[0])].strip()
    snippet = bytes(buffer[max(byte - 30, 0) : byte + 10]).decode("utf-8", "replace")
    return DataError(
        f"{path}: row {_row_at(buffer, begin, byte)}, byte {byte}: not JSON: {what} "
        f"in {snippet!r}: correct it or write the file again"
    )


def _row_at(buffer, begin: int, stop: int) -> int:
    """List index of the record around byte `stop`; slow, for error messages only."""
    depth = row = 0
    for token in _TOKEN.finditer(buffer, begin, stop):
        depth, row = _step(token[0], depth, row)
    return row


def _deepest(buffer, begin: int) -> tuple[int, int]:
    """Row and byte where the nesting passes every sensible depth; slow, for messages only."""
    depth = row = 0
    for token in _TOKEN.finditer(buffer, begin):
        depth, row = _step(token[0], depth, row)
        if depth > 200:
            return row, token.start()
    return row, begin


def _step(token: bytes, depth: int, row: int) -> tuple[int, int]:
    if token in b"[{":
        return depth + 1, row
    if token in b"]}":
        return depth - 1, row
    return depth, row + (token == b"," and depth == 1)
