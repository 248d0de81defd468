"""COINCIDE: a share of every cluster of skills, larger where it transfers and is less dense.

Jaewoo Lee, Boyang Li, Sung Ju Hwang. Concept-skill Transferability-based Data Selection for Large
Vision-Language Models. EMNLP 2024. https://arxiv.org/abs/2406.10995

    vision and language blocks of several layers        signals/attention_means.py
    spherical k-means of all of them                    vectors/kmeans.py
    S_i = mean cosine of centroid i to other centroids  transferability
    D_i = mean over pairs of exp(-d(x, y)^2 / 2)        kernel, its mean
    P_i = softmax(S_i / (tau D_i))                      water_fill, in logarithms
    n_i = share of cluster i, at most its size          water_fill
    inside a cluster argmin MMD^2, one by one           greedy_mmd

MMD^2 of the picked set is updated from running sums, so a pick costs one pass over the cluster
instead of one over all pairs picked so far, and picks the same samples.

Differs from the paper and from the released code: docs/methods/coincide.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava.errors import DataError, UsageError, at_least
from llava.lazy import Lazy
from selection.methods.base import Context, Method, Scored
from selection.signals.attention_means import Blocks
from selection.vectors import stream
from selection.vectors.kmeans import cluster_rows, members

if TYPE_CHECKING:
    from selection.store.store import StoreReader

torch = Lazy("torch")


COLUMNS = ("vision", "language")
SAME_SKILL = 0.9
LARGEST = 2**14
"""Members of a cluster; the kernel of more would take over 2 GiB."""
_DECIMALS = 12
_ROWS = 1024


@dataclass(frozen=True)
class Settings:
    """How COINCIDE clusters and shares; defaults are the paper's for LLaVA-665K."""

    n_layers: int = 5
    """layers that are read, evenly spaced; five of 24 are the released 3, 7, 11, 15 and 19"""
    n_clusters: int = 10_000
    """clusters of the pool, but no more than one for every 64 samples"""
    n_iter: int = 50
    """iterations of k-means"""
    temperature: float = 0.1
    """tau: a larger one makes the shares of the clusters more alike"""

    def __post_init__(self) -> None:
        at_least(1, self, "n_layers", "n_clusters", "n_iter")
        if not self.temperature > 0:
            raise UsageError(f"--temperature {self.temperature}: give a number above 0")


def transferability(centroids: np.ndarray) -> np.ndarray:
    """S_i (M,) float64: mean cosine of each row of `centroids` (M, D) to those below 0.9.

    Itself and near copies are thereby left out; 1 where all others are near copies. A zero row has
    cosine 0 to all. Takes 1024 rows of the table of cosines at a time.
    """
    unit = stream.unit(torch.from_numpy(centroids))
    transfers = np.empty(len(unit))
    for start in range(0, len(unit), _ROWS):
        cosines = (unit[start : start + _ROWS] @ unit.T).double()
        others = cosines <= SAME_SKILL
        others[torch.arange(len(cosines)), start + torch.arange(len(cosines))] = False
        n_others = others.sum(dim=1)
        means = (cosines * others).sum(dim=1) / n_others.clamp_min(1)
        transfers[start : start + _ROWS] = torch.where(n_others > 0, means, 1.0).numpy()
    return transfers


def kernel(vectors: torch.Tensor) -> np.ndarray:
    """exp(-|x - y|^2 / 2) of all pairs of unit rows `vectors` (n, D): (n, n) float64.

    Rounded to 12 decimals, so that copies of a sample have the same numbers to the last bit.
    """
    exact = vectors.double()
    squares = (2 - 2 * (exact @ exact.T)).clamp_min_(0)
    return np.round(squares.mul_(-0.5).exp_().numpy(), _DECIMALS)


def water_fill(logits: np.ndarray, sizes: np.ndarray, k: int) -> np.ndarray:
    """Shares of `k` in proportion to exp(`logits`) (M,), none above `sizes` (M,) int64: (M,) int64.

    Clusters are visited by falling share; each gets its share of what is left among those not
    visited, rounded, and passes on what it has no room for. What then remains goes round again
    among those with room, so that the shares sum to k. Needs k <= sizes.sum().
    """
    filled = np.zeros(len(sizes), np.int64)
    order = np.argsort(-logits, kind="stable")
    while k > 0:
        order = order[filled[order] < sizes[order]]
        # log of the sum of exp over this cluster and all after it
        rest = np.logaddexp.accumulate(logits[order][::-1])[::-1]
        for cluster, log_rest in zip(order, rest, strict=True):
            share = round(k * float(np.exp(logits[cluster] - log_rest)))
            given = min(share, int(sizes[cluster] - filled[cluster]), k)
            filled[cluster] += given
            k -= given
    return filled


def greedy_mmd(similar: np.ndarray, n: int) -> np.ndarray:
    """The first `n` members in the order in which COINCIDE picks them, (n,) int64.

    Each is the one with which the picked set Y has the smallest MMD^2 to the cluster X, mean K_XX
    + mean K_YY - 2 mean K_XY, ties to the first; `similar` (m, m) is K_XX.
    """
    to_itself, to_cluster = np.diag(similar), similar.mean(axis=0)
    to_picked = np.zeros(len(similar))  # sum over y in Y of K[c, y]
    picked = np.empty(n, np.int64)
    left = np.ones(len(similar), bool)
    for step in range(n):  # what all candidates have in common is left out
        size = step + 1
        distance = (2 * to_picked + to_itself) / size**2 - 2 * to_cluster / size
        best = int(np.where(left, distance, np.inf).argmin())
        to_picked += similar[best]
        picked[step], left[best] = best, False
    return picked


class Coincide(Method):
    """A share of every cluster of skills, larger where it transfers and is less dense."""

    Settings = Settings

    def signals(self) -> dict[str, Blocks]:
        return {"blocks": Blocks(self.settings.n_layers)}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """-(place in the picking order of its cluster, from 1) / (share of the cluster).

        So the samples with -1 or more are the subset of this budget. Artefacts: the cluster of
        every sample, and size, S, D and share of every cluster.
        """
        settings, reader = self.settings, context.readers["blocks"]
        rows = reader.rows
        usable = ~np.isin(rows, reader.bad_rows)
        keys = context.keys(rng)[rows]
        skills = cluster_rows(reader, COLUMNS, usable, keys, settings.n_clusters, settings.n_iter)
        sizes = np.bincount(skills.labels[skills.labels >= 0], minlength=len(skills.centroids))
        check_sizes(sizes)
        # S compares the language halves alone, D and the picking order whole vectors.
        transfers = transferability(skills.centroids[:, reader.columns["vision"].shape[0] :])
        densities, orders = _densities_and_orders(reader, skills.labels, len(sizes))
        logits = transfers / (np.maximum(densities, 1e-12) * settings.temperature)
        shares = water_fill(logits, sizes, min(context.k, int(sizes.sum())))
        # No share counts as half a place, so that such a cluster comes after all that is chosen.
        labels, scores = np.full(len(context.pool), -1), np.full(len(context.pool), np.nan)
        labels[rows] = skills.labels
        for cluster, positions, places in orders:
            scores[rows[positions]] = -(places + 1.0) / max(shares[cluster], 0.5)
        table = {"size": sizes, "transferability": transfers, "density": densities, "share": shares}
        report = {name: values.tolist() for name, values in table.items()}
        return Scored(scores, {"cluster_labels": labels, "clusters": report}, (skills.note,))


def check_sizes(sizes: np.ndarray) -> None:
    """Raise DataError when a cluster of `sizes` (M,) is too large for its kernel."""
    if len(sizes) and sizes.max() > LARGEST:
        raise DataError(
            f"k-means put {sizes.max()} of {sizes.sum()} samples into one of {len(sizes)} "
            f"clusters; at most {LARGEST} can be compared with one another: raise --n_clusters, "
            "or see whether the proxy tells the samples apart at all"
        )


def _densities_and_orders(
    reader: StoreReader, labels: np.ndarray, n_clusters: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray, np.ndarray]]]:
    """D_i (M,), and per cluster (label, store rows, place of each in the picking order)."""
    densities, orders = np.ones(n_clusters), []
    for cluster, positions, vectors in members(reader, COLUMNS, labels):
        similar = kernel(stream.unit(vectors))
        densities[cluster] = similar.mean()
        places = np.empty(len(positions), np.int64)
        places[greedy_mmd(similar, len(positions))] = np.arange(len(positions))
        orders.append((cluster, positions, places))
    return densities, orders
