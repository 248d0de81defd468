"""Rows that finished stores hold already: a pool that has grown costs its new samples only.

A store answers for one exact list of samples, so a pool with one sample more gets a new store. A
row's numbers depend on the sample, the model and the signal's settings, not on the rest of the
pool: where all these are equal, the row is copied. Beside its blocks an extraction leaves the
uids of its samples, which are checked against the digest in the store's identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from llava import files
from llava.errors import StorageError
from selection.pool.pool import Pool
from selection.store.key import StoreKey
from selection.store.store import StoreReader

UIDS = "uids.bin"


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
    def find(cls, root: str | Path, key: StoreKey, pool: Pool) -> Known:
        """Look for the pool rows of `key` in the stores below `root` that answer alike."""
        known, rows = cls(len(pool)), key.rows
        for folder in sorted(Path(root).glob(f"{key.signal}-*")):
            left = rows[known.lacks(rows)]
            if folder == key.folder(root) or not len(left):
                continue
            reader = _open(folder)
            if reader is None or not key.answers_alike(reader.identity):
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
                stored = self._owner[rows] == i
                whole[stored] = reader.take(name, self._position[rows[stored]])
        return out

    def _add(self, reader: StoreReader, uids: np.ndarray, pool: Pool, rows: np.ndarray) -> None:
        """Note which of `rows` the store, of samples `uids`, has numbers of."""
        sound = ~np.isin(reader.rows, reader.bad_rows)
        stored, first = np.unique(_keys(uids[sound]), return_index=True)
        asked = _keys(pool.uids[rows])
        there = np.isin(asked, stored)
        places = np.searchsorted(stored, asked[there])
        self._owner[rows[there]] = len(self._readers)
        self._position[rows[there]] = np.flatnonzero(sound)[first[places]]
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
