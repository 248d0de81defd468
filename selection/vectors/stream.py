"""Stored vectors as float32, a chunk of rows at a time, in memory that does not grow with the pool.

Rows come in chunks of a fixed size counted from the start of the store, whatever its block size,
and each chunk is worked on by one thread. Every product thus runs on the same operands in the same
order, and gives the same bits, for any block size and any number of threads.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llava.lazy import Lazy

if TYPE_CHECKING:
    from torch import Tensor

    from selection.store.store import StoreReader

torch = Lazy("torch")


CHUNK = 128  # 128 x 8192 float32 are 4 MiB: stays in cache between conversion and products
TASK = 8  # chunks that a thread takes at a time
Parts = Sequence["Tensor"]  # vectors (n, D) by column of the store: (n, H) each, float32
Result = TypeVar("Result")


def apply(
    reader: StoreReader,
    names: Sequence[str],
    function: Callable[[slice, Parts], Result],
    normalize_parts: bool = False,
    size: int = CHUNK,
) -> Iterator[tuple[slice, Result]]:
    """Stream `(slice of store rows, function(slice, parts))`, in order.

    `parts` are the columns `names` of these rows; with `normalize_parts` each is L2-normalised.
    They are overwritten when `function` returns, so its result must not refer to them. Chunks are
    worked on beside one another, on as many threads as PyTorch has, while the next block is read
    and checked.
    """
    threads, local = torch.get_num_threads(), threading.local()

    # A thread fills the same buffers again and again, so that they stay in its cache.
    def work(task: list[tuple[slice, list[Parts]]]) -> list[tuple[slice, Result]]:
        if not hasattr(local, "buffers"):
            widths = [reader.columns[name].shape[0] for name in names]
            local.buffers = [torch.empty(min(size, len(reader)), width) for width in widths]
        done = []
        for part, pieces in task:
            vectors = [buffer[: part.stop - part.start] for buffer in local.buffers]
            _fill(vectors, pieces)
            if normalize_parts:
                for column in vectors:
                    column /= _safe(norms([column]))[:, None]
            done.append((part, function(part, vectors)))
        return done

    # Splitting each of these small operations over threads costs more in waiting for one another
    # than it gains, and many times that on a machine that is busy.
    coming: deque = deque()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        try:
            for task in _tasks(_pieces(reader, names, size)):
                coming.append(executor.submit(work, task))
                if len(coming) > 2 * threads:
                    yield from coming.popleft().result()
            for future in coming:
                yield from future.result()
        finally:
            torch.set_num_threads(threads)  # the workers' number is also that of later threads


def take(
    reader: StoreReader,
    names: Sequence[str],
    positions: np.ndarray,
    normalize_parts: bool = False,
) -> torch.Tensor:
    """The vectors at store rows `positions` (k,), in that order, (k, D) float32."""
    parts = [_tensor(reader.take(name, positions)).float() for name in names]
    return torch.cat([unit(part) for part in parts] if normalize_parts else parts, dim=1)


def norms(parts: Parts) -> torch.Tensor:
    """L2 norm of every row, (n,) float32."""
    lengths = [torch.linalg.vector_norm(part, dim=1) for part in parts]
    return lengths[0] if len(lengths) == 1 else torch.stack(lengths).square_().sum(dim=0).sqrt_()


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Rows of `vectors` (n, D) divided by their norm; a zero row stays zero."""
    return vectors / _safe(norms([vectors]))[:, None]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """`unit` in NumPy, whose norms are rounded in another way: (n, D) float32 of float32."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, where=lengths > 0, out=np.zeros(rows.shape, np.float32))


def products(parts: Parts, columns: torch.Tensor) -> torch.Tensor:
    """Products of every row with `columns` (D,) or (D, C) float32, (n,) or (n, C) float32."""
    slices = columns.split([part.shape[1] for part in parts])
    return sum(part @ rows for part, rows in zip(parts, slices, strict=True))


def cosines(parts: Parts, columns: torch.Tensor) -> np.ndarray:
    """Products of every row, divided by its length, with `columns` (D,) or (D, C), float64.

    Cosines when the columns have length one. NaN for a row that is zero or not finite.
    """
    lengths = norms(parts).numpy().astype(np.float64)
    lengths[~np.isfinite(lengths) | (lengths == 0)] = np.nan
    inner = products(parts, columns).numpy()
    return inner / (lengths if inner.ndim == 1 else lengths[:, None])


def _safe(lengths: torch.Tensor) -> torch.Tensor:
    return lengths.clamp_min(1e-30)


def _fill(vectors: Parts, pieces: list[Parts]) -> None:
    """Convert the pieces of a chunk into its rows of the buffers, one after the other."""
    filled = 0
    for piece in pieces:
        for target, column in zip(vectors, piece, strict=True):
            target[filled : filled + len(column)] = column
        filled += len(piece[0])


def _tasks(chunks: Iterator[Result]) -> Iterator[list[Result]]:
    while task := list(itertools.islice(chunks, TASK)):
        yield task


def _pieces(
    reader: StoreReader, names: Sequence[str], size: int
) -> Iterator[tuple[slice, list[Parts]]]:
    """Each chunk's rows, and the parts of blocks that it is made of, one tensor per column."""
    # Chunks are counted from the first row, so one may be made of pieces of several blocks.
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


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the array's memory. PyTorch converts halves 12 times faster than NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only view of a file; never written to
        return torch.from_numpy(array)
