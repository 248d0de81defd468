"""What a store answers for: everything that made its numbers, and the folder named by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from selection.store.files import DTYPES

SCHEMA = 1
ROW = "row"  # every block also stores which pool row each of its rows is
_OF_SAMPLES = ("pool", "rows")  # what in an identity says which samples it holds


@dataclass(frozen=True)
class Column:
    """One named array of a store: shape of a row (without the sample axis) and NumPy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if np.dtype(self.dtype) not in DTYPES.values():
            raise ValueError(f"column {self.name}: dtype {self.dtype} cannot be stored")
        if self.name == ROW:
            raise ValueError(f"the column name {ROW!r} is taken by the store")

    @property
    def row_bytes(self) -> int:
        """Bytes one sample takes in this column."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class StoreKey:
    """The inputs of one store.

    `inputs` is what decides the numbers, JSON-serialisable: settings, model, contents of the
    samples. `rows` (n,) int64 are pool rows, in the order in which the store keeps them.
    """

    signal: str
    inputs: Mapping[str, Any]
    rows: np.ndarray
    columns: Sequence[Column]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All of it as JSON values, hashed once."""
        whole = {
            **self.inputs,
            "signal": self.signal,
            "columns": [asdict(column) for column in self.columns],
            "rows": {"n": len(self.rows), "xxh3_128": rows_hash(self.rows)},
            "store_schema": SCHEMA,
        }
        return msgspec.json.decode(msgspec.json.encode(whole))

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    def folder(self, root: str | Path) -> Path:
        """Where the store lies below `root`, whether it exists or not."""
        return Path(root) / folder_name(self.signal, self.fingerprint)

    def answers_alike(self, identity: Mapping[str, Any]) -> bool:
        """Whether a store of `identity` holds the same numbers, of whatever samples."""
        return _of_any_samples(identity) == _of_any_samples(self.identity)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """xxh3-128 hex of an identity; key order does not matter, every value does."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(identity, order="deterministic"))


def folder_name(signal: str, digest: str) -> str:
    """What the folder of a store is called."""
    return f"{signal}-{digest[:16]}"


def rows_hash(rows: np.ndarray) -> str:
    """xxh3-128 hex of pool rows (n,), in their order."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(rows, dtype="<i8"))


def _of_any_samples(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in _OF_SAMPLES}
