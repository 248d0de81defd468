"""Spherical k-means over stored vectors: centroids from a sample, labels for all by streaming.

The centroids come from faiss on at most 256 vectors a cluster (its own default) and are the same
bits for one and two threads; they do depend on the version of faiss, so callers keep centroids and
labels with their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import faiss
import numpy as np
import torch

from selection import stream

if TYPE_CHECKING:
    from selection.store import StoreReader

POINTS_PER_CENTROID = 256
SAME = 1e-6  # cosines this close to 1 are equal in float32: two copies of one vector


@dataclass(frozen=True)
class Clusters:
    """`labels` (n,) int64 for every store row (-1: none), unit `centroids` (M, D) float32, and the
    group every cluster was made in, `owner` (M,) int64."""

    labels: np.ndarray
    centroids: np.ndarray
    owner: np.ndarray


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
    centroids, owner = [], []
    for group in np.unique(groups[groups >= 0]):
        rows = np.flatnonzero(groups == group)
        rows = rows[np.argsort(keys[rows], kind="stable")][: POINTS_PER_CENTROID * k]
        sample = stream.unit(stream.take(reader, names, rows, normalize_parts)).numpy()
        sample = sample[np.isfinite(sample).all(axis=1)]
        if len(sample):
            centroids.append(spherical_kmeans(sample, k, n_iter, seed))
            owner += [group] * len(centroids[-1])
    labels = np.full(len(groups), -1, np.int64)
    if not centroids:
        width = sum(reader.columns[name].shape[0] for name in names)
        return Clusters(labels, np.zeros((0, width), np.float32), np.zeros(0, np.int64))
    matrix, owner = np.concatenate(centroids), np.asarray(owner, np.int64)

    def label(part: slice, parts: stream.Parts) -> np.ndarray:
        return nearest(parts, matrix, groups[part], owner)

    for part, found in stream.apply(reader, names, label, normalize_parts):
        labels[part] = found
    return Clusters(labels, matrix, owner)


def _fill_empty(sample: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Move every centroid without members onto the vector that its own centroid fits worst.

    Where no vector is left that is not already a centroid, the empty ones are dropped.
    """
    centroids = centroids.copy()
    for _ in range(2 * len(centroids)):
        cosines = _products(sample, centroids)
        empty = np.flatnonzero(~np.isin(np.arange(len(centroids)), cosines.argmax(axis=1)))
        fit = cosines.max(axis=1)
        if not len(empty) or fit.min() > 1 - SAME:
            break
        centroids[empty[0]] = sample[fit.argmin()]
    return centroids[np.unique(_products(sample, centroids).argmax(axis=1))]


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()
