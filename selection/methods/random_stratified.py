"""Random within sources: every source keeps its share of the pool, exactly to rounding.

Source shares are n_s = k N_s / N, rounded to whole samples that sum to k by largest remainders
(Hamilton's rule); inside a source the draw is uniform without replacement. N_s counts the samples
that can be selected.

Differs from CoIDO's quota rule (`max(1, int(p N_s))`, the rest to the largest source): no source is
favoured and the size is exact.
"""

from __future__ import annotations

import numpy as np

from selection.methods.base import Context, Method, Scored
from selection.rules.budget import top_k


def largest_remainder(counts: np.ndarray, k: int) -> np.ndarray:
    """Shares of `k` proportional to `counts` (S,) int64, whole, summing to `k`, each <= its count.

    Equal remainders go to the earlier entry. Needs 0 <= k <= counts.sum().
    """
    total = int(counts.sum())
    shares, remainders = np.divmod(counts * k, max(total, 1))
    order = np.argsort(-remainders, kind="stable")
    shares[order[: k - int(shares.sum())]] += 1
    return shares


class RandomStratified(Method):
    """Uniform draw within each source, sources in proportion."""

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """Independent uniform keys; they rank the samples of one source."""
        return Scored(context.keys(rng))

    def select(self, context: Context, scores: np.ndarray, k: int) -> np.ndarray:
        """The best `largest_remainder` share of every source."""
        names, source = np.unique(np.asarray(context.pool.sources), return_inverse=True)
        counts = np.bincount(source[~np.isnan(scores)], minlength=len(names))
        if k > counts.sum():
            return top_k(scores, k).rows  # raises: there are too few to choose from
        parts = [
            top_k(np.where(source == s, scores, np.nan), share).rows
            for s, share in enumerate(largest_remainder(counts, k))
            if share
        ]
        return np.sort(np.concatenate(parts))
