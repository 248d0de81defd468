"""Arrays of a caller in the place of a signal: read like a finished store, from memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from llava.errors import UsageError
from selection.signals.forward import STATES
from selection.store.key import Column

if TYPE_CHECKING:
    from selection.pool.pool import Pool

BLOCK = 1024


class ArrayReader:
    """Columns (N, ...) of all samples of a pool, with the interface of `StoreReader`.

    A sample with a vector that is not finite is unusable, as in a store; in a column of one number
    NaN means that it does not apply. A state given alone serves whichever of `STATES` is read, if
    only one is: `notes` says so.
    """

    folder = Path("given arrays")
    block_size = BLOCK

    def __init__(self, name: str, arrays: Mapping[str, Any], pool: Pool) -> None:
        """Raises UsageError for arrays of another length than the pool's or of no number."""
        self.name = name
        self.arrays = {key: self._checked(key, given, len(pool)) for key, given in arrays.items()}
        self.columns = _Columns(self)
        self.rows = np.arange(len(pool))
        self.bad = self._unusable(pool.bad)
        self.notes: list[str] = []
        digest = xxhash.xxh3_128()
        for key, array in sorted(self.arrays.items()):
            digest.update(f"{key} {array.dtype} {array.shape}".encode())
            digest.update(array)
        self.fingerprint = digest.hexdigest()

    def _checked(self, key: str, given: Any, n: int) -> np.ndarray:
        try:
            array = np.ascontiguousarray(given)
        except (TypeError, ValueError, RuntimeError) as error:  # lists of lists, a GPU's tensor
            raise UsageError(f"arrays: {self.name}.{key} is no array: {error}") from None
        if len(array) != n:
            raise UsageError(
                f"arrays: {self.name}.{key} has shape {array.shape}; give one row for each of the "
                f"pool's {n} samples, in pool order"
            )
        if array.dtype.kind in "iub":
            return array.astype(np.int64)
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise UsageError(f"arrays: {self.name}.{key} is {array.dtype}; give numbers")
        return array

    def _unusable(self, unusable: Mapping[int, str]) -> list[dict[str, Any]]:
        """Samples that the pool says to be `unusable`, or without finite numbers, as a store lists
        them."""
        reasons = dict(unusable)
        for key, array in self.arrays.items():
            if array.dtype.kind == "f":
                flawed = ~np.isfinite(array) if array.ndim > 1 else np.isinf(array)
                for row in np.flatnonzero(flawed.reshape(len(array), -1).any(axis=1)).tolist():
                    reasons.setdefault(row, f"{key} is not finite in the given array")
        return [{"row": row, "reason": reasons[row]} for row in sorted(reasons)]

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
        states = [key for key in self if key in STATES]
        if name not in STATES or len(states) != 1:
            raise UsageError(
                f"arrays: {self.reader.name}.{name} is read too; give it beside "
                f"{', '.join(self.reader.arrays)}, or a model"
            )
        self[name] = self[states[0]]
        self.reader.notes.append(f"{states[0]} of the given arrays was read as {name}")
        return self[name]
