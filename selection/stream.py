"""Stored vectors as float32, a chunk of rows at a time, in memory that does not grow with the pool.

Rows come in chunks of a fixed size counted from the start of the store, whatever its block size,
and each chunk is worked on by one thread. Every product thus runs on the same operands in the same
order, and gives the same bits, for any block size and any number of threads.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from selection.store import StoreReader

CHUNK = 128  # 128 x 8192 float32 are 4 MiB: stays in cache between conversion and products
Result = TypeVar("Result")


def apply(
    reader: StoreReader,
    names: Sequence[str],
    function: Callable[[slice, torch.Tensor], Result],
    normalize_parts: bool = False,
    size: int = CHUNK,
) -> Iterator[tuple[slice, Result]]:
    """Stream `(slice of store rows, function(slice, vectors))`, in order.

    `vectors` (n, D) float32 are the columns `names` side by side; with `normalize_parts` each is
    L2-normalised on its own first. They are overwritten when `function` returns, so its result
    must not refer to them. Chunks are worked on beside one another, on as many threads as PyTorch
    has, while the next block is read and checked.
    """
    n, threads = len(reader), torch.get_num_threads()
    local = threading.local()

    def work(part: slice, pieces: list[list[torch.Tensor]]) -> Result:
        if not hasattr(local, "buffer"):
            local.buffer = torch.empty(min(size, n), _width(reader, names))
        vectors = local.buffer[: part.stop - part.start]
        filled = 0
        parts = _parts(vectors, reader, names)
        for piece in pieces:
            for target, column in zip(parts, piece, strict=True):
                target[filled : filled + len(column)] = column
            filled += len(piece[0])
        return function(part, _finish(vectors, parts, normalize_parts))

    # Splitting each of these small operations over threads costs more in waiting for one another
    # than it gains, and many times that on a machine that is busy.
    coming: deque = deque()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        try:
            for part, pieces in _pieces(reader, names, size):
                coming.append((part, executor.submit(work, part, pieces)))
                if len(coming) > 2 * threads:
                    done, future = coming.popleft()
                    yield done, future.result()
            for done, future in coming:
                yield done, future.result()
        finally:
            torch.set_num_threads(threads)  # the workers' number is also that of later threads


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


def _pieces(
    reader: StoreReader, names: Sequence[str], size: int
) -> Iterator[tuple[slice, list[list[torch.Tensor]]]]:
    """Each chunk's rows, and the parts of blocks that it is made of, one tensor per column."""
    pieces, start, stop = [], 0, 0
    for _, arrays in reader.blocks(list(names)):
        block = [_tensor(arrays[name]) for name in names]
        taken, length = 0, len(block[0])
        while taken < length:
            step = min(length - taken, start + size - stop)
            pieces.append([column[taken : taken + step] for column in block])
            taken, stop = taken + step, stop + step
            if stop - start == size or stop == len(reader):
                yield slice(start, stop), pieces
                pieces, start = [], stop


def _width(reader: StoreReader, names: Sequence[str]) -> int:
    return sum(reader.columns[name].shape[0] for name in names)


def _parts(whole: torch.Tensor, reader: StoreReader, names: Sequence[str]) -> list[torch.Tensor]:
    return list(whole.split([reader.columns[name].shape[0] for name in names], dim=1))


def _finish(
    vectors: torch.Tensor, parts: Sequence[torch.Tensor], normalize_parts: bool
) -> torch.Tensor:
    if normalize_parts:
        for part in parts:
            part /= norms(part).clamp_min(1e-30)[:, None]
    return vectors


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the array's memory. PyTorch converts halves 12 times faster than NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only view of a file; never written to
        return torch.from_numpy(array)
