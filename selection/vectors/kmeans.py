"""Spherical k-means over stored vectors: centroids from a sample, labels for all by streaming.

The centroids come from faiss on at most 256 vectors a cluster (its own default) and are the same
bits for one and two threads; they do depend on the version of faiss, so callers keep centroids and
labels with their results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava.lazy import Lazy
from selection.vectors import stream

if TYPE_CHECKING:
    from selection.store.store import StoreReader

torch = Lazy("torch")
faiss = Lazy("faiss")


POINTS_PER_CENTROID = 256
SAMPLES_PER_CLUSTER = 64  # COINCIDE: 10,000 clusters of 665,298 samples
SAME = 1e-6  # cosines this close to 1 are equal in float32: two copies of one vector
BATCH_BYTES = 2**28


@dataclass(frozen=True)
class Clusters:
    """`labels` (n,) int64 for every store row (-1: none), unit `centroids` (M, D) float32, and the
    group every cluster was made in, `owner` (M,) int64."""

    labels: np.ndarray
    centroids: np.ndarray
    owner: np.ndarray

    @property
    def note(self) -> str:
        """How many clusters there are and how large: a collapse shows here."""
        sizes = np.bincount(self.labels[self.labels >= 0], minlength=1)
        return f"{len(self.centroids)} clusters of {sizes.min()} to {sizes.max()} samples"


def spherical_kmeans(sample: np.ndarray, k: int, n_iter: int = 20, seed: int = 0) -> np.ndarray:
    """Unit centroids (k', D) float32 of unit rows `sample` (n, D) by cosine, none without members.

    k' is smaller than `k` only when the sample has fewer distinct vectors. The first centroids are
    drawn by `seed`; the result depends on the order of the rows.
    """
    sample = np.ascontiguousarray(sample, dtype=np.float32)
    k = min(k, len(sample))
    kmeans = faiss.Kmeans(
        sample.shape[1],
        k,
        niter=n_iter,
        seed=seed,
        spherical=True,
        max_points_per_centroid=max(POINTS_PER_CENTROID, len(sample)),  # the caller has sampled
        min_points_per_centroid=1,
    )
    kmeans.train(sample)
    return _fill_empty(sample, kmeans.centroids)


def nearest(
    parts: stream.Parts, centroids: np.ndarray, groups: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """Nearest centroid by cosine among those of the row's own group, (n,) int64.

    `parts` make up vectors (n, D), `centroids` are (M, D) float32; `groups` (n,) gives the group
    of every row, -1 for rows to leave out, `owner` (M,) that of every centroid. Ties go to the
    first centroid. Rows left out, rows with a value that is not finite and rows whose group has no
    centroid get -1.
    """
    # The length of a row scales all its products alike: no need to divide by it.
    products = stream.products(parts, torch.from_numpy(centroids).T).numpy()  # (n, M)
    open_to = groups[:, None] == owner[None, :]
    best = np.where(open_to, products, -np.inf).argmax(axis=1)
    usable = open_to.any(axis=1) & np.isfinite(products).all(axis=1)
    return np.where(usable, best, -1)


def cluster_groups(
    reader: StoreReader,
    names: Sequence[str],
    groups: np.ndarray,
    keys: np.ndarray,
    k: int,
    n_iter: int = 20,
    seed: int = 0,
    normalize_parts: bool = False,
) -> Clusters:
    """Cluster every group of store rows on its own into `k` clusters.

    `groups` (n,) int64 >= 0, -1 for rows to leave out. The centroids are fitted on the 256 k rows
    of a group with the smallest `keys` (n,), in that order.
    """
    # Centroids of every group, from its own sample: the pool is too large to be held for fitting.
    centroids, owner = [], []
    for group in np.unique(groups[groups >= 0]):
        rows = np.flatnonzero(groups == group)
        rows = rows[np.argsort(keys[rows], kind="stable")][: POINTS_PER_CENTROID * k]
        sample = _unit_rows(reader, names, rows, normalize_parts)
        if len(sample):
            centroids.append(spherical_kmeans(sample, k, n_iter, seed))
            owner += [group] * len(centroids[-1])
    labels = np.full(len(groups), -1, np.int64)
    if not centroids:
        width = sum(reader.columns[name].shape[0] for name in names)
        return Clusters(labels, np.zeros((0, width), np.float32), np.zeros(0, np.int64))
    # Then one pass labels the rows of all groups, each among the centroids of its own.
    matrix, owner = np.concatenate(centroids), np.asarray(owner, np.int64)

    def label(part: slice, parts: stream.Parts) -> np.ndarray:
        return nearest(parts, matrix, groups[part], owner)

    for part, part_labels in stream.apply(reader, names, label, normalize_parts):
        labels[part] = part_labels
    return Clusters(labels, matrix, owner)


def cluster_rows(
    reader: StoreReader,
    names: Sequence[str],
    usable: np.ndarray,
    keys: np.ndarray,
    k: int,
    n_iter: int,
) -> Clusters:
    """Cluster the `usable` (n,) bool store rows together into `cluster_count` of `k` clusters."""
    groups = np.where(usable, 0, -1)
    return cluster_groups(reader, names, groups, keys, cluster_count(k, usable.sum()), n_iter)


def cluster_count(k: int, n: int) -> int:
    """`k` clusters, but for `n` samples no more than one for every 64 of them, and at least one."""
    return int(max(1, min(k, n // SAMPLES_PER_CLUSTER)))


def members(
    reader: StoreReader, names: Sequence[str], labels: np.ndarray
) -> Iterator[tuple[int, np.ndarray, torch.Tensor]]:
    """Stream `(label, store rows (m,) ascending, vectors (m, D) float32)` of every cluster.

    `labels` (n,) int64, -1 for rows to leave out. Reads about `BATCH_BYTES` of vectors at a time,
    or one cluster if that is more.
    """
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    present, starts = np.unique(labels[order], return_index=True)
    stops = [*starts[1:].tolist(), len(order)]
    width = sum(reader.columns[name].shape[0] for name in names)
    most, first = max(1, BATCH_BYTES // (4 * width)), 0
    # Many clusters at a time: one lies in nearly every block, and a read for each of 10,000 would
    # go through the store as often.
    while first < len(present):
        last = first + 1
        while last < len(present) and stops[last] - starts[first] <= most:
            last += 1
        rows = order[starts[first] : stops[last - 1]]
        vectors = stream.take(reader, names, rows)
        for i in range(first, last):
            part = slice(starts[i] - starts[first], stops[i] - starts[first])
            yield int(present[i]), rows[part], vectors[part]
        first = last


def _unit_rows(
    reader: StoreReader, names: Sequence[str], rows: np.ndarray, normalize_parts: bool
) -> np.ndarray:
    """The finite vectors among `rows` (n,), scaled to length one, (n', D) float32, held once."""
    width = sum(reader.columns[name].shape[0] for name in names)
    sample = np.empty((len(rows), width), np.float32)
    step, filled = max(1, BATCH_BYTES // (4 * width)), 0
    for start in range(0, len(rows), step):
        part = stream.unit(stream.take(reader, names, rows[start : start + step], normalize_parts))
        part = part[part.isfinite().all(dim=1)].numpy()
        sample[filled : filled + len(part)] = part
        filled += len(part)
    return sample[:filled]


def _fill_empty(sample: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Move every centroid without members onto the vector that its own centroid fits worst.

    Where no vector is left that is not already a centroid, the empty ones are dropped.
    """
    centroids = centroids.copy()
    labels, fit = _fits(sample, centroids)
    for _ in range(2 * len(centroids)):
        empty = np.flatnonzero(np.bincount(labels, minlength=len(centroids)) == 0)
        worst = fit.argmin()
        if not len(empty) or fit[worst] > 1 - SAME:
            break
        centroids[empty[0]] = sample[worst]
        # Nobody's nearest moved away, so only those that the new place serves better change.
        cosines = _products(sample, centroids[empty[:1]])[:, 0]
        better = cosines > fit
        labels[better], fit[better] = empty[0], cosines[better]
    return centroids[np.unique(labels)]


def _fits(sample: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of every row of `sample`, (n,) int64, and its cosine (n,) float32."""
    labels, fit = np.empty(len(sample), np.int64), np.empty(len(sample), np.float32)
    step = max(1, BATCH_BYTES // (4 * len(centroids)))
    for start in range(0, len(sample), step):
        cosines = _products(sample[start : start + step], centroids)
        labels[start : start + step] = cosines.argmax(axis=1)
        fit[start : start + step] = cosines.max(axis=1)
    return labels, fit


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()
