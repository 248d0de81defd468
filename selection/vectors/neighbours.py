"""The nearest neighbours of stored vectors, without a table of all pairs.

Up to `EXACT` vectors every pair is compared. Above, vectors are put into cells of about `CELL` by
spherical k-means and compared with those of the `n_probe` nearest cells, which hold most of the
true neighbours (docs/methods/d2_pruning.md says how many). For n vectors there are n / `CELL`
cells, but at most the root of n, so that no step takes time quadratic in n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llava.lazy import Lazy
from selection.vectors import stream
from selection.vectors.kmeans import cluster_groups

if TYPE_CHECKING:
    from selection.store.store import StoreReader

torch = Lazy("torch")
faiss = Lazy("faiss")


EXACT = 2**16
CELL = 1024
N_ITER = 10
_QUERIES = 2048  # rows that are compared with others at a time
_CANDIDATES = 8192  # rows that are read at a time


class Neighbours:
    """Finds the nearest of the `usable` (n,) bool store rows by Euclidean distance.

    `normalize` brings vectors to length one before, so that a squared distance is 2 - 2 cosine.
    `keys` (n,) decide which vectors the cells are fitted on; `n_probe` 0 compares every pair
    whatever the size.
    """

    def __init__(
        self,
        reader: StoreReader,
        names: Sequence[str],
        usable: np.ndarray,
        keys: np.ndarray,
        n_probe: int,
        normalize: bool,
    ) -> None:
        self._reader, self._names, self._normalize = reader, names, normalize
        self._n_probe = n_probe
        n = int(np.count_nonzero(usable))
        n_cells = min(n // CELL, math.isqrt(n))
        if n_probe == 0 or n <= EXACT or n_probe >= n_cells:
            self.cells = np.where(usable, 0, -1)
            self._centroids = np.zeros((1, 1), np.float32)
        else:
            groups = np.where(usable, 0, -1)
            clustered = cluster_groups(reader, names, groups, keys, n_cells, N_ITER)
            self.cells, self._centroids = clustered.labels, clustered.centroids
        order = np.argsort(self.cells, kind="stable")
        bounds = np.searchsorted(self.cells[order], np.arange(len(self._centroids)))
        self._members = np.split(order, bounds)[1:]

    def nearest(self, rows: np.ndarray, among: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest others of each of `rows` (m,) where `among` (n,) bool, nearest first.

        Returns their store rows (m, k) int64, -1 where there are not as many, and squared distances
        (m, k) float32, inf there. Where fewer than k are to be had in the `n_probe` nearest cells,
        further cells are searched. A row in no cell has no neighbours.
        """
        ids = np.full((len(rows), k), -1)
        squares = np.full((len(rows), k), np.inf, np.float32)
        homes = self.cells[rows]
        for cell in np.unique(homes[homes >= 0]):
            candidates = self._candidates(int(cell), among, k)
            places = np.flatnonzero(homes == cell)
            for start in range(0, len(places), _QUERIES):
                part = places[start : start + _QUERIES]
                ids[part], squares[part] = self._search(rows[part], candidates, k)
        return ids, squares

    def _candidates(self, cell: int, among: np.ndarray, k: int) -> np.ndarray:
        """Rows of the cells nearest to `cell` where `among`, ascending."""
        searched, n = [], 0
        near = np.argsort(-(self._centroids @ self._centroids[cell]), kind="stable")
        for place, other in enumerate(near):
            if place >= self._n_probe and n > k:
                break
            members = self._members[other]
            searched.append(members[among[members]])
            n += len(searched[-1])
        return np.sort(np.concatenate(searched))

    def _search(
        self, rows: np.ndarray, candidates: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest of `candidates` (c,) to each of `rows` (q,), and squared distances."""
        queries = self._take(rows)
        ids, squares = torch.full((len(rows), k), -1), torch.full((len(rows), k), torch.inf)
        for start in range(0, len(candidates), _CANDIDATES):
            part = candidates[start : start + _CANDIDATES]
            new_ids, new_squares = _nearest(rows, queries, part, self._take(part), k)
            ids, squares = torch.cat([ids, new_ids], 1), torch.cat([squares, new_squares], 1)
            squares, order = squares.sort(dim=1, stable=True)
            squares, ids = squares[:, :k], ids.gather(1, order[:, :k])
        return ids.numpy(), squares.numpy()

    def _take(self, rows: np.ndarray) -> torch.Tensor:
        vectors = stream.take(self._reader, self._names, rows)
        return stream.unit(vectors) if self._normalize else vectors


def _nearest(
    rows: np.ndarray, queries: torch.Tensor, others: np.ndarray, vectors: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `others` (c,) with `vectors` (c, D) up to k + 1 near `queries` (q, D), not in order.

    `rows` (q,) are the queries' own; where one finds itself, that is -1 at an infinite distance.
    """
    n = min(k + 1, len(others))
    _, places = faiss.knn(queries.numpy(), vectors.numpy(), n)
    squares = torch.empty(len(rows), n)
    # By differences: products round too coarsely where vectors are long. Fused, so that the
    # q x n x D differences are never written: a thirtieth of the time.
    faiss.fvec_L2sqr_by_idx(
        faiss.swig_ptr(squares.numpy()),
        faiss.swig_ptr(queries.numpy()),
        faiss.swig_ptr(vectors.numpy()),
        faiss.swig_ptr(places),
        queries.shape[1],
        len(rows),
        n,
    )
    ids = torch.from_numpy(others[places])
    itself = ids == torch.from_numpy(rows)[:, None]
    return ids.masked_fill(itself, -1), squares.masked_fill(itself, torch.inf)
