"""Arrays of a caller in the place of a signal: read like a finished store, from memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llava.errors import UsageError
from selection.store.key import Column

BLOCK = 1024


class ArrayReader:
    """Columns (N, ...) of all samples of a pool, with the interface of `StoreReader`.

    A sample with a NaN in a column of more than one number is unusable, as in a store; in a column
    of one number NaN means that it does not apply.
    """

    folder = Path("given arrays")
    block_size = BLOCK

    def __init__(self, name: str, arrays: Mapping[str, np.ndarray], n: int) -> None:
        """Raises UsageError for arrays of another length than the pool's `n` or of no number."""
        self.name = name
        self.arrays: dict[str, np.ndarray] = {}
        for key, given in arrays.items():
            array = np.ascontiguousarray(given)
            if array.ndim == 0 or len(array) != n:
                raise UsageError(
                    f"arrays: {name}.{key} has shape {array.shape}; give one row for each of the "
                    f"pool's {n} samples, in pool order"
                )
            if array.dtype.kind in "iub":
                array = array.astype(np.int64)
            elif array.dtype not in (np.float16, np.float32, np.float64):
                raise UsageError(f"arrays: {name}.{key} is {array.dtype}; give numbers")
            self.arrays[key] = array
        self.columns = _Columns(self)
        self.rows = np.arange(n)
        self.bad = self._unusable()
        digest = xxhash.xxh3_128()
        for key, array in sorted(self.arrays.items()):
            digest.update(f"{key} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        self.fingerprint = digest.hexdigest()

    def _unusable(self) -> list[dict[str, Any]]:
        """Samples with a vector that is not finite, as a store lists them."""
        unusable: dict[int, str] = {}
        for key, array in self.arrays.items():
            if array.ndim > 1 and array.dtype.kind == "f":
                finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
                for row in np.flatnonzero(~finite).tolist():
                    unusable.setdefault(row, f"{key} is not finite in the given array")
        return [{"row": row, "reason": unusable[row]} for row in sorted(unusable)]

    @property
    def bad_rows(self) -> np.ndarray:
        """Rows of `bad`, (b,) int64."""
        return np.array([note["row"] for note in self.bad], np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """The whole column, (N, *shape)."""
        return self.arrays[self.columns[name].name]

    def blocks(self, names: str | Sequence[str]) -> Iterator[tuple[slice, Any]]:
        """Stream `(slice of rows, array)`, or a dict of arrays where several names are given."""
        for start in range(0, len(self), BLOCK):
            part = slice(start, min(start + BLOCK, len(self)))
            if isinstance(names, str):
                yield part, self.column(names)[part]
            else:
                yield part, {name: self.column(name)[part] for name in names}

    def take(self, name: str, positions: np.ndarray | Iterable[int]) -> np.ndarray:
        """Rows `positions` (k,) of a column, in that order, (k, *shape)."""
        return self.column(name)[np.asarray(positions, dtype=np.int64)]


class _Columns(dict):
    """Columns by name; UsageError for one that was not given."""

    def __init__(self, reader: ArrayReader) -> None:
        arrays = reader.arrays.items()
        super().__init__({key: Column(key, a.shape[1:], a.dtype.name) for key, a in arrays})
        self.reader = reader

    def __missing__(self, name: str) -> Column:
        raise UsageError(
            f"arrays: {self.reader.name}.{name} is read too; give it beside {', '.join(self)}, "
            "or a model"
        )
