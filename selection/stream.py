"""Stored vectors as float32, a chunk of rows at a time, in memory that does not grow with the pool.

Rows come in chunks of a fixed size counted from the start of the store, whatever its block size.
Every later product thus runs on the same operands in the same order, and gives the same bits, for
any block size; PyTorch's CPU kernels used on them give the same bits for any number of threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from selection.store import StoreReader

CHUNK = 128  # 128 x 8192 float32 are 4 MiB: stays in cache between conversion and products


def chunks(
    reader: StoreReader,
    names: Sequence[str],
    normalize_parts: bool = False,
    size: int = CHUNK,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Stream `(slice of store rows, vectors (n, D) float32)`: the columns `names` side by side.

    With `normalize_parts` each column is L2-normalised on its own first. The tensor is one buffer
    that is overwritten by the next chunk: copy what has to stay.
    """
    n = len(reader)
    buffer = torch.empty(min(size, n), _width(reader, names))
    parts = _parts(buffer, reader, names)
    filled = start = 0
    for _, arrays in _ahead(reader.blocks(list(names))):
        block = [_tensor(arrays[name]) for name in names]
        taken, length = 0, len(block[0])
        while taken < length:
            step = min(length - taken, len(buffer) - filled)
            for part, column in zip(parts, block, strict=True):
                part[filled : filled + step] = column[taken : taken + step]
            taken, filled = taken + step, filled + step
            if filled == len(buffer) or start + filled == n:
                yield slice(start, start + filled), _finish(buffer[:filled], parts, normalize_parts)
                start, filled = start + filled, 0


def take(
    reader: StoreReader,
    names: Sequence[str],
    positions: np.ndarray,
    normalize_parts: bool = False,
) -> torch.Tensor:
    """The vectors at store rows `positions` (k,), in that order, (k, D) float32."""
    out = torch.empty(len(positions), _width(reader, names))
    parts = _parts(out, reader, names)
    for name, part in zip(names, parts, strict=True):
        part.copy_(_tensor(reader.take(name, positions)))
    return _finish(out, parts, normalize_parts)


def norms(vectors: torch.Tensor) -> torch.Tensor:
    """L2 norm of every row of `vectors` (n, D), (n,) float32."""
    return torch.linalg.vector_norm(vectors, dim=1)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Rows of `vectors` (n, D) divided by their norm; a zero row stays zero."""
    return vectors / norms(vectors).clamp_min(1e-30)[:, None]


def cosines(vectors: torch.Tensor, columns: torch.Tensor) -> np.ndarray:
    """Products of `vectors` (n, D) over their length with `columns` (D,) or (D, C), float64.

    Cosines when the columns have length one. NaN for a row that is zero or not finite.
    """
    lengths = norms(vectors).double()
    lengths[~lengths.isfinite()] = torch.nan
    products = (vectors @ columns).double()
    return (products / (lengths if products.ndim == 1 else lengths[:, None])).numpy()


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made while the caller works on the one before: a block of a store is
    read and checked on one core beside the products on the other."""
    with ThreadPoolExecutor(1) as executor:
        coming = executor.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = executor.submit(next, items, None)
            yield item


def _width(reader: StoreReader, names: Sequence[str]) -> int:
    return sum(reader.columns[name].shape[0] for name in names)


def _parts(whole: torch.Tensor, reader: StoreReader, names: Sequence[str]) -> list[torch.Tensor]:
    return list(whole.split([reader.columns[name].shape[0] for name in names], dim=1))


def _finish(
    vectors: torch.Tensor, parts: Sequence[torch.Tensor], normalize_parts: bool
) -> torch.Tensor:
    if normalize_parts:
        for part in parts:
            rows = part[: len(vectors)]
            rows /= norms(rows).clamp_min(1e-30)[:, None]
    return vectors


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the array's memory. PyTorch converts halves 12 times faster than NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only view of a file; never written to
        return torch.from_numpy(array)
