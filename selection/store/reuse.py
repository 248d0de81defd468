"""Rows that finished stores hold already: a pool that has grown costs its new samples only.

A store answers for one exact list of samples, so a pool with one sample more gets a new store. A
row's numbers depend on the sample, the model and the signal's settings, not on the rest of the
pool: where all these are equal, the row is copied. Beside its blocks an extraction leaves the
uids of its samples, which are checked against the digest in the store's identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llava import files
from llava.errors import StorageError
from selection.pool.pool import Pool
from selection.store.store import Column, StoreReader, full_identity, store_folder

UIDS = "uids.bin"
_OF_ROWS = ("pool", "rows")  # what in a store's identity says which samples it holds


def write_uids(folder: Path, pool: Pool, rows: np.ndarray) -> None:
    """Leave the uids of the samples in a store's folder, 16 bytes each, in store order."""
    files.atomic_write(folder / UIDS, np.ascontiguousarray(pool.uids[rows]).tobytes())


class Known:
    """Where the numbers of pool rows already are."""

    def __init__(self, n_rows: int) -> None:
        self._readers: list[StoreReader] = []
        self._owner = np.full(n_rows, -1)
        self._position = np.zeros(n_rows, np.int64)

    @classmethod
    def find(
        cls,
        root: str | Path,
        name: str,
        identity: Mapping[str, Any],
        pool: Pool,
        rows: np.ndarray,
        columns: Sequence[Column],
    ) -> Known:
        """Look for pool `rows` (n,) in the stores below `root` that answer for the same inputs."""
        known = cls(len(pool))
        own = store_folder(root, name, identity, rows, columns)
        wanted = _of_samples(full_identity(name, identity, rows, columns))
        for folder in sorted(Path(root).glob(f"{name}-*")):
            left = rows[known.lacks(rows)]
            reader = _open(folder) if folder != own and len(left) else None
            if reader is None or _of_samples(reader.identity) != wanted:
                continue
            if (uids := _uids(reader)) is not None:
                known._add(reader, uids, pool, left)
        return known

    def lacks(self, rows: np.ndarray) -> np.ndarray:
        """Which of pool `rows` (n,) have to be computed, (n,) bool."""
        return self._owner[rows] < 0

    def completed(
        self, arrays: Mapping[str, np.ndarray], rows: np.ndarray, fresh: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The columns of pool `rows` (n,): `arrays` where `fresh` (n,) bool, else as stored."""
        out = {name: np.empty((len(rows), *a.shape[1:]), a.dtype) for name, a in arrays.items()}
        for name, whole in out.items():
            whole[fresh] = arrays[name]
            for i, reader in enumerate(self._readers):
                mine = self._owner[rows] == i
                whole[mine] = reader.take(name, self._position[rows[mine]])
        return out

    def _add(self, reader: StoreReader, uids: np.ndarray, pool: Pool, rows: np.ndarray) -> None:
        """Note which of `rows` the store, of samples `uids`, has numbers of."""
        sound = ~np.isin(reader.rows, [note["row"] for note in reader.bad])
        theirs, first = np.unique(_keys(uids[sound]), return_index=True)
        mine = _keys(pool.uids[rows])
        there = np.isin(mine, theirs)
        found = np.searchsorted(theirs, mine[there])
        self._owner[rows[there]] = len(self._readers)
        self._position[rows[there]] = np.flatnonzero(sound)[first[found]]
        self._readers.append(reader)


def _open(folder: Path) -> StoreReader | None:
    """The store in `folder` if it is finished."""
    try:
        return StoreReader.open(folder)
    except StorageError:
        return None


def _uids(reader: StoreReader) -> np.ndarray | None:
    """The uids of a store's samples, (n, 16) uint8, if they are there and sound."""
    path = reader.folder / UIDS
    data = path.read_bytes() if path.is_file() else b""
    if xxhash.xxh3_128_hexdigest(data) != reader.identity.get("pool"):
        return None
    return np.frombuffer(data, np.uint8).reshape(-1, 16)


def _keys(uids: np.ndarray) -> np.ndarray:
    """(n, 16) uint8 as (n,) values that can be sorted."""
    return np.ascontiguousarray(uids).view("S16").ravel()


def _of_samples(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in _OF_ROWS}
