"""The nearest neighbours of every stored vector, without a table of all pairs.

Up to `EXACT` vectors every pair is compared. Above, vectors are put into cells of about `CELL` by
spherical k-means and compared with those of the `n_probe` nearest cells: time grows with the
number of vectors, and nearly all of the true neighbours are found (docs/Performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import faiss
import numpy as np
import torch

from selection import stream
from selection.cluster import cluster_groups

if TYPE_CHECKING:
    from selection.store import StoreReader

EXACT = 2**16
CELL = 1024
N_ITER = 10
_CANDIDATES = 8192  # rows that are read at a time
_BYTES = 2**26


def nearest_neighbours(
    reader: StoreReader,
    names: Sequence[str],
    usable: np.ndarray,
    keys: np.ndarray,
    k: int,
    n_probe: int,
    normalize: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest others of each `usable` (n,) bool store row, nearest first.

    Returns their store rows (n, k) int64, -1 where there are not as many, and squared Euclidean
    distances (n, k) float32, inf there. `normalize` brings vectors to length one before, so that a
    distance is 2 - 2 cosine. `keys` (n,) decide which vectors the cells are fitted on; `n_probe`
    0 compares every pair whatever the size.
    """
    ids = np.full((len(usable), k), -1)
    distances = np.full((len(usable), k), np.inf, np.float32)
    for rows, candidates in _cells(reader, names, usable, keys, n_probe):
        queries = _take(reader, names, rows, normalize)
        ids[rows], distances[rows] = _search(reader, names, rows, queries, candidates, k, normalize)
    return ids, distances


def _cells(
    reader: StoreReader, names: Sequence[str], usable: np.ndarray, keys: np.ndarray, n_probe: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of each cell, and the rows to compare them with, ascending."""
    everything = np.flatnonzero(usable)
    n_cells = len(everything) // CELL
    if n_probe == 0 or len(everything) <= EXACT or n_probe >= n_cells:
        for start in range(0, len(everything), CELL):
            yield everything[start : start + CELL], everything
        return
    made = cluster_groups(reader, names, np.where(usable, 0, -1), keys, n_cells, N_ITER)
    order = np.argsort(made.labels, kind="stable")
    cells = np.split(order, np.searchsorted(made.labels[order], np.arange(len(made.centroids))))[1:]
    near = torch.from_numpy(made.centroids @ made.centroids.T).topk(n_probe, dim=1).indices
    for rows, probed in zip(cells, near.tolist(), strict=True):
        for start in range(0, len(rows), 2 * CELL):  # a cell may be much larger than the others
            yield (
                rows[start : start + 2 * CELL],
                np.sort(np.concatenate([cells[i] for i in probed])),
            )


def _search(
    reader: StoreReader,
    names: Sequence[str],
    rows: np.ndarray,
    queries: torch.Tensor,
    candidates: np.ndarray,
    k: int,
    normalize: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest `candidates` (c,) of each of `queries` (q, D), which are rows `rows` (q,)."""
    ids = torch.full((len(rows), k), -1)
    distances = torch.full((len(rows), k), torch.inf)
    for start in range(0, len(candidates), _CANDIDATES):
        part = candidates[start : start + _CANDIDATES]
        found = _nearest(rows, queries, part, _take(reader, names, part, normalize), k)
        distances = torch.cat([distances, found[1]], dim=1)
        ids = torch.cat([ids, found[0]], dim=1)
        distances, order = distances.sort(dim=1, stable=True)
        distances, ids = distances[:, :k], ids.gather(1, order[:, :k])
    return ids.numpy(), distances.numpy()


def _nearest(
    rows: np.ndarray, queries: torch.Tensor, others: np.ndarray, vectors: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_search`, of `others` (c,) with their `vectors` (c, D); up to k + 1, not in order."""
    _, places = faiss.knn(queries.numpy(), vectors.numpy(), min(k + 1, len(others)))
    found = torch.from_numpy(others[places])  # (q, k + 1), itself among them
    distances = torch.empty(found.shape)
    step = max(1, _BYTES // (4 * vectors.shape[1] * found.shape[1]))
    for start in range(0, len(rows), step):  # by differences: exact where vectors are long
        part = slice(start, start + step)
        apart = queries[part, None] - vectors[places[part]]
        distances[part] = apart.square().sum(dim=2)
    itself = found == torch.from_numpy(rows)[:, None]
    return found.masked_fill(itself, -1), distances.masked_fill(itself, torch.inf)


def _take(
    reader: StoreReader, names: Sequence[str], rows: np.ndarray, normalize: bool
) -> torch.Tensor:
    vectors = stream.take(reader, names, rows)
    return stream.unit(vectors) if normalize else vectors
