"""SemDeDup: of samples that mean nearly the same, one.

Amro Abbas, Kushal Tirumala, Dániel Simig, Surya Ganguli, Ari S. Morcos. SemDeDup: Data-efficient
learning at web-scale through semantic deduplication. 2023. https://arxiv.org/abs/2303.09540

    embedding: the proxy's last state               signals/forward.py
    k-means of the unit embeddings                  vectors/kmeans.py
    inside a cluster, far from the centroid first   keep_order
    M_j = max_(i before j) cos(i, j)                nearest_before, distinctness
    j is dropped when M_j > 1 - eps                 score = -M_j: the cut of the budget is eps - 1

The kept count falls with M alone, so the eps of a budget is a quantile of M: one pass, no search.

Differs from the paper and from the code run on LLaVA-665K: docs/methods/semdedup.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from llava.errors import at_least
from llava.lazy import Lazy
from selection.methods.base import Context, Method, Scored
from selection.signals.forward import Forward
from selection.vectors import stream
from selection.vectors.kmeans import cluster_rows, members

torch = Lazy("torch")


COLUMNS = ("last_state",)
_CHUNK = 1024


@dataclass(frozen=True)
class Settings:
    """How SemDeDup clusters; defaults as COINCIDE ran it on LLaVA-665K."""

    n_clusters: int = 10_000
    """clusters of the pool, but no more than one for every 64 samples"""
    n_iter: int = 50
    """iterations of k-means"""
    keep: Literal["hard", "easy"] = "hard"
    """of near copies keep the one far from the centroid (hard) or close to it (easy)"""

    def __post_init__(self) -> None:
        at_least(1, self, "n_clusters", "n_iter")


def keep_order(cosines: np.ndarray, keep: Literal["hard", "easy"]) -> np.ndarray:
    """Positions (m,) in the order in which a cluster's members are kept.

    `cosines` (m,) to the centroid; equal ones stay in order.
    """
    return np.argsort(cosines if keep == "hard" else -cosines, kind="stable")


def nearest_before(vectors: torch.Tensor) -> np.ndarray:
    """M_j (m,) float64: largest cosine of unit row j of `vectors` (m, D) to an earlier row.

    -1 for the first row. Holds `_CHUNK` columns of the table of cosines at a time.
    """
    largest = np.full(len(vectors), -1.0)
    for start in range(0, len(vectors), _CHUNK):
        part = vectors[start : start + _CHUNK]
        cosines = vectors[: start + len(part)] @ part.T  # (i, j - start)
        later = torch.arange(len(cosines))[:, None] >= start + torch.arange(len(part))
        best = cosines.masked_fill_(later, -1.0).amax(dim=0)
        largest[start : start + len(part)] = best.clamp(-1, 1).numpy()
    return largest


def distinctness(
    vectors: torch.Tensor, centroid: torch.Tensor, keep: Literal["hard", "easy"]
) -> np.ndarray:
    """-M_j (m,) float64 of the members `vectors` (m, D) of a cluster around `centroid` (D,)."""
    vectors = stream.unit(vectors)
    order = keep_order((vectors @ centroid).numpy(), keep)
    scores = np.empty(len(vectors))
    scores[order] = -nearest_before(vectors[torch.from_numpy(order)])
    return scores


def score_clusters(
    context: Context,
    settings: Any,
    rng: np.random.Generator,
    score: Callable[[torch.Tensor, torch.Tensor], np.ndarray],
) -> Scored:
    """What `score` gives the members of each cluster of the last states; artefact: the clusters.

    `score` maps vectors (m, D) float32 and their unit centroid (D,) to (m,) float64. `settings`
    have `n_clusters` and `n_iter`.
    """
    reader = context.readers["forward"]
    rows = reader.rows
    usable = ~np.isin(rows, reader.bad_rows)
    keys = context.keys(rng)[rows]
    clusters = cluster_rows(reader, COLUMNS, usable, keys, settings.n_clusters, settings.n_iter)
    scores, labels = np.full(len(context.pool), np.nan), np.full(len(context.pool), -1)
    labels[rows] = clusters.labels
    for label, positions, vectors in members(reader, COLUMNS, clusters.labels):
        scores[rows[positions]] = score(vectors, torch.from_numpy(clusters.centroids[label]))
    return Scored(scores, {"cluster_labels": labels}, (clusters.note,))


class Semdedup(Method):
    """Of samples that mean nearly the same, the one kept first; the most distinct samples."""

    Settings = Settings

    def signals(self) -> dict[str, Forward]:
        return {"forward": Forward()}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """-M_j of every sample; artefact: its cluster."""
        score = partial(distinctness, keep=self.settings.keep)
        return score_clusters(context, self.settings, rng, score)
