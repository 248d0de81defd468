"""Arrays that are expensive to compute: one row per sample, in blocks, resumable and checked.

A store is a folder `<signal>-<fingerprint[:16]>` of `block-000000.safetensors`, ... and, once
complete, `manifest.json`. While it is written there are also `layout.json` and one
`journal-<rank>-<pid>.jsonl` per writer. The commit protocol (promise P8 of docs/Reliability.md):
block file (temporary name, fsync, rename, fsync of the folder), then a journal line with its
length and xxh3-128, `manifest.json` last. No file holds a time, a host or a process, so a resumed
store equals an uninterrupted one byte for byte.

A store never answers for other inputs: its fingerprint covers everything that made the numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llava import files
from llava.errors import StorageError
from llava.runs import differences
from selection.store.files import (
    Block,
    Entry,
    block_path,
    damaged,
    encode_block,
    encode_index,
    read_entries,
    read_index,
)
from selection.store.key import ROW, SCHEMA, Column, StoreKey, fingerprint, folder_name, rows_hash

DEFAULT_BLOCK_SIZE = 1024


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` is a finished store: sound manifest, every block there, nothing to tidy.

    Looks at lengths only; the contents are checked when they are read.
    """
    folder = Path(folder)
    try:
        StoreReader.open(folder)
    except StorageError:
        return False
    return not (folder / "layout.json").exists() and not any(folder.glob("journal-*.jsonl"))


class StoreWriter:
    """Writes the missing blocks of one store. Any number of writers may work on disjoint blocks.

    The order of calls, for one rank or many: one rank opens first, then the others; one asks for
    `missing_blocks()` and deals them out; each calls `write_block`; when all are done, one calls
    `finish()`.
    """

    def __init__(
        self, folder: Path, key: StoreKey, rows: np.ndarray, block_size: int, rank: int
    ) -> None:
        self.folder, self.key, self.block_size = folder, key, block_size
        self.columns = {column.name: column for column in key.columns}
        self._rows = rows
        self._journal = folder / f"journal-{rank}-{os.getpid()}.jsonl"

    @classmethod
    def open(
        cls, root: str | Path, key: StoreKey, block_size: int = DEFAULT_BLOCK_SIZE, rank: int = 0
    ) -> StoreWriter:
        """Begin the store of `key`, or resume it with the block size it was begun with."""
        rows = np.ascontiguousarray(key.rows, dtype=np.int64)
        folder = key.folder(root)
        files.make_folder(folder)
        layout = read_index(folder / "manifest.json") or read_index(folder / "layout.json")
        if layout is None:
            layout = _layout(key, max(1, min(int(block_size), len(rows))))
            files.atomic_write(folder / "layout.json", encode_index(layout))
        if layout["identity"] != key.identity:
            changes = "; ".join(differences(layout["identity"], key.identity))
            raise StorageError(f"{folder}: holds other inputs ({changes}); delete or rename it")
        return cls(folder, key, rows, layout["block_size"], rank)

    @property
    def n_blocks(self) -> int:
        """Blocks of the finished store."""
        return -(-len(self._rows) // self.block_size)

    def block_rows(self, index: int) -> np.ndarray:
        """Pool rows of block `index`, (block_size,) int64; the last block may be shorter."""
        return self._rows[index * self.block_size : (index + 1) * self.block_size]

    def missing_blocks(self) -> list[int]:
        """Blocks to compute: never committed, or damaged since (every committed byte is read)."""
        entries = self._entries()
        return [i for i in range(self.n_blocks) if self._sound_entry(entries.get(i, [])) is None]

    def write_block(
        self, index: int, arrays: Mapping[str, np.ndarray], bad: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Commit block `index`: one array (rows of the block, *shape) per column.

        `bad` lists samples without valid numbers as `{"row", "uid", "reason", ...}`; their array
        rows mean nothing. Raises `StorageError` when the disk refuses; nothing is then committed.
        """
        rows = self.block_rows(index)
        self._check_arrays(arrays, len(rows))
        data, entry = encode_block(index, self.key.fingerprint, {**arrays, ROW: rows}, bad)
        files.atomic_write(block_path(self.folder, index), data)
        files.append_line(self._journal, msgspec.json.encode(entry))

    def finish(self) -> None:
        """Write `manifest.json`, then remove journals and orphans. Calling it again is harmless.

        Raises `StorageError` when blocks are missing.
        """
        entries = self._entries()
        chosen = [self._listed_entry(entries.get(i, [])) for i in range(self.n_blocks)]
        missing = [str(i) for i, entry in enumerate(chosen) if entry is None]
        if missing:
            raise StorageError(
                f"{self.folder}: {len(missing)} of {self.n_blocks} blocks are missing "
                f"({', '.join(missing[:10])}); run the same command again, only they are computed"
            )
        manifest = self.folder / "manifest.json"
        data = encode_index(_layout(self.key, self.block_size), chosen)
        if not manifest.exists() or manifest.read_bytes() != data:
            files.atomic_write(manifest, data)
        for path in [*self.folder.glob("journal-*.jsonl"), self.folder / "layout.json"]:
            files.remove(path)
        files.sweep(self.folder)

    def _entries(self) -> dict[int, list[Entry]]:
        journals = sorted(self.folder.glob("journal-*.jsonl"))
        return read_entries([self.folder / "manifest.json", *journals])

    def _check_arrays(self, arrays: Mapping[str, np.ndarray], n: int) -> None:
        if set(arrays) != set(self.columns):
            raise ValueError(f"columns {sorted(arrays)} given, {sorted(self.columns)} expected")
        for name, array in arrays.items():
            shape, dtype = (n, *self.columns[name].shape), np.dtype(self.columns[name].dtype)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"column {name}: {array.dtype} {array.shape} given, {dtype} {shape} expected"
                )

    def _sound_entry(self, claims: Sequence[Entry]) -> Entry | None:
        """The claim that the block's file fulfils, or None."""
        for entry in claims:
            try:
                block = Block(self.folder, entry)
                block.check(self.key.fingerprint)
            except StorageError:
                continue
            if np.array_equal(block.array(ROW), self.block_rows(entry.block)):
                return entry
        return None

    def _listed_entry(self, claims: Sequence[Entry]) -> Entry | None:
        """As `_sound_entry`; reads the contents only where several claims compete."""
        if len(claims) == 1 and _has_length(self.folder, claims[0]):
            return claims[0]
        return self._sound_entry(claims)


class StoreReader:
    """Reads a finished store. Every block is checked against the manifest once per process."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = manifest["identity"]
        self.fingerprint: str = manifest["fingerprint"]
        self.block_size: int = manifest["block_size"]
        columns = msgspec.convert(self.identity["columns"], list[Column])
        self.columns = {column.name: column for column in columns}
        self._entries: list[Entry] = manifest["blocks"]
        self._checked: set[int] = set()

    @classmethod
    def open(cls, folder: str | Path) -> StoreReader:
        """Open a finished store; raises `StorageError` naming what is missing or damaged."""
        folder = Path(folder)
        manifest = read_index(folder / "manifest.json")
        if manifest is None or manifest["fingerprint"] != fingerprint(manifest["identity"]):
            state = "damaged or edited" if (folder / "manifest.json").exists() else "absent"
            raise StorageError(
                f"{folder}: manifest.json is {state}; run the command that made this store again, "
                "only what is missing or damaged is computed"
            )
        reader = cls(folder, manifest)
        name = folder_name(reader.identity["signal"], reader.fingerprint)
        if folder.name != name:
            raise StorageError(f"{folder}: holds the store {name}; give the folder that name again")
        n_blocks = -(-len(reader) // reader.block_size)
        for i in range(n_blocks):
            entry = reader._entries[i] if i < len(reader._entries) else None
            if entry is None or entry.block != i or not _has_length(folder, entry):
                raise damaged(block_path(folder, i), "is missing or has another length")
        return reader

    def __len__(self) -> int:
        return self.identity["rows"]["n"]

    @property
    def rows(self) -> np.ndarray:
        """Pool row of every store row, (n,) int64."""
        parts = [Block(self.folder, entry).array(ROW) for entry in self._entries]
        rows = np.concatenate([np.zeros(0, np.int64), *parts])
        if rows_hash(rows) != self.identity["rows"]["xxh3_128"]:
            for i in range(len(self._entries)):
                self._block(i)  # raises the error that names the damaged one
        return rows

    @property
    def bad(self) -> list[dict[str, Any]]:
        """Samples without valid numbers, `{"row", "uid", "reason", ...}`, in store order."""
        return [note for entry in self._entries for note in entry.bad]

    @property
    def bad_rows(self) -> np.ndarray:
        """Pool rows of `bad`, (b,) int64."""
        return np.array([note["row"] for note in self.bad], np.int64)

    def column(self, name: str) -> np.ndarray:
        """The whole column, (n, *shape); for columns too large for memory use `blocks`."""
        out = np.empty((len(self), *self.columns[name].shape), self.columns[name].dtype)
        for part, array in self.blocks(name):
            out[part] = array
        return out

    def blocks(self, names: str | Sequence[str]) -> Iterator[tuple[slice, Any]]:
        """Stream `(slice of store rows, array)`, or a dict of arrays where several names are given.

        The arrays are read-only views of the file, so memory stays at one block as long as the
        caller keeps none of them.
        """
        read = self._known([names] if isinstance(names, str) else names)
        for i in range(len(self._entries)):
            block = self._block(i)
            arrays = {name: block.array(name) for name in read}
            start = i * self.block_size
            part = slice(start, min(start + self.block_size, len(self)))
            yield part, arrays[names] if isinstance(names, str) else arrays

    def take(self, name: str, positions: np.ndarray | Iterable[int]) -> np.ndarray:
        """Store rows `positions` (k,) of a column, in that order, (k, *shape).

        Reads only the blocks concerned.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions outside 0..{len(self) - 1}")
        self._known([name])
        out = np.empty((len(positions), *self.columns[name].shape), self.columns[name].dtype)
        owners = positions // self.block_size
        for i in np.unique(owners):
            places = np.flatnonzero(owners == i)
            array = self._block(int(i)).array(name)
            out[places] = array[positions[places] - i * self.block_size]
        return out

    def _known(self, names: Sequence[str]) -> Sequence[str]:
        unknown = sorted(set(names) - set(self.columns))
        if unknown:
            raise KeyError(f"{self.folder}: no column {unknown}; it has {sorted(self.columns)}")
        return names

    def _block(self, index: int) -> Block:
        block = Block(self.folder, self._entries[index])
        if index not in self._checked:
            block.check(self.fingerprint)
            self._checked.add(index)
        return block


def _layout(key: StoreKey, block_size: int) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "fingerprint": key.fingerprint,
        "block_size": block_size,
        "identity": key.identity,
    }


def _has_length(folder: Path, entry: Entry) -> bool:
    path = block_path(folder, entry.block)
    return path.is_file() and path.stat().st_size == entry.bytes
