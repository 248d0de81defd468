"""The two file formats of a store: a block of arrays, and the index that lists blocks.

A block is an ordinary safetensors file whose metadata says which block of which store it is. An
index (`manifest.json`, `layout.json`) is JSON with one block entry a line and a checksum of
everything before it on its last line; journals hold the same entry lines. Damage to one line thus
costs one block, not the store.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
import xxhash

from llava.errors import StorageError

DTYPES = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_HEADER_BYTES = 64 * 2**20
_encode = msgspec.json.Encoder(order="deterministic").encode


class Entry(msgspec.Struct, frozen=True):
    """One committed block as journals and the manifest list it."""

    block: int
    bytes: int
    xxh3_128: str
    bad: list[dict[str, Any]]


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_decode_entry = msgspec.json.Decoder(Entry).decode
_decode_header = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_tensor = msgspec.json.Decoder(_Tensor).decode


def block_path(folder: Path, index: int) -> Path:
    """Where block `index` of the store `folder` lies."""
    return folder / f"block-{index:06d}.safetensors"


def damaged(path: Path, what: str) -> StorageError:
    """The error for a block that cannot be used, with what to do."""
    return StorageError(
        f"{path}: {what}; delete this file and run the command that made it again, "
        "only this block is computed"
    )


def encode_block(
    index: int, fingerprint: str, arrays: Mapping[str, np.ndarray], bad: Sequence[Mapping[str, Any]]
) -> tuple[bytes, Entry]:
    """The bytes of a block file and the entry that lists it."""
    note = {"block": index, "fingerprint": fingerprint, "bad": list(bad)}
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # A single metadata key: safetensors does not keep the order of several.
    data = safetensors.numpy.save(tensors, {"store": _encode(note).decode()})
    return data, Entry(index, len(data), xxhash.xxh3_128_hexdigest(data), list(bad))


class Block:
    """A block file, memory-mapped; nothing is checked before `check`."""

    def __init__(self, folder: Path, entry: Entry) -> None:
        self.path = block_path(folder, entry.block)
        self._entry = entry
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise damaged(self.path, "is missing or empty") from error
        if len(self._data) != entry.bytes:
            raise damaged(self.path, f"has {len(self._data)} bytes instead of {entry.bytes}")
        length = int.from_bytes(self._data[:8], "little")
        if length > min(MAX_HEADER_BYTES, len(self._data) - 8):
            raise damaged(self.path, "has a broken header")
        self._start = 8 + length

    def check(self, fingerprint: str) -> None:
        """Compare every byte with the entry, and the block's own note with its place."""
        if xxhash.xxh3_128_hexdigest(self._data) != self._entry.xxh3_128:
            raise damaged(self.path, "has other contents than were written")
        metadata = msgspec.json.decode(self._header()["__metadata__"])
        note = msgspec.json.decode(metadata["store"])
        if note["block"] != self._entry.block or note["fingerprint"] != fingerprint:
            raise damaged(
                self.path, f"is block {note['block']} of store {note['fingerprint'][:16]}"
            )
        if note["bad"] != self._entry.bad:
            raise damaged(self.path, "lists other samples without numbers than its entry")

    def array(self, name: str) -> np.ndarray:
        """Array `name`, a read-only view of the file."""
        try:
            tensor = _decode_tensor(self._header()[name])
            dtype = DTYPES[tensor.dtype]
            begin, end = tensor.data_offsets
            count = (end - begin) // dtype.itemsize
            return np.frombuffer(self._data, dtype, count, self._start + begin).reshape(
                tensor.shape
            )
        except (msgspec.MsgspecError, KeyError, ValueError) as error:
            raise damaged(self.path, f"has no readable array {name!r}") from error

    def _header(self) -> dict[str, msgspec.Raw]:
        return _decode_header(self._data[8 : self._start])


def encode_index(fields: Mapping[str, Any], entries: Iterable[Entry] = ()) -> bytes:
    """An index file: `fields`, the block entries one a line, and the checksum of all that."""
    lines = [
        f"{_encode(key).decode()}: {_encode(value).decode()}," for key, value in fields.items()
    ]
    listing = ",\n".join(_encode(entry).decode() for entry in entries)
    body = "\n".join(["{", *lines, '"blocks": [', listing, "],", ""]).encode()
    return body + b'"xxh3_128": "%s"\n}\n' % xxhash.xxh3_128_hexdigest(body).encode()


def read_index(path: Path) -> dict[str, Any] | None:
    """The fields of an index file with `blocks` as entries; None if absent, damaged or edited."""
    try:
        data = path.read_bytes()
        index = msgspec.json.decode(data)
        body = data[: data.rindex(b'"xxh3_128"')]
        if index.pop("xxh3_128") != xxhash.xxh3_128_hexdigest(body):
            return None
        index["blocks"] = msgspec.convert(index["blocks"], list[Entry])
        return index
    except (OSError, ValueError, AttributeError, LookupError, msgspec.MsgspecError):
        return None


def read_entries(paths: Iterable[Path]) -> dict[int, list[Entry]]:
    """All block entries found in journals and manifests, by block; lines that are cut are skipped.

    An entry is only a claim: the caller compares it with the file.
    """
    found: dict[int, list[Entry]] = {}
    for path in paths:
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            try:
                entry = _decode_entry(line.strip().rstrip(b","))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            found.setdefault(entry.block, [])
            if entry not in found[entry.block]:
                found[entry.block].append(entry)
    return found
