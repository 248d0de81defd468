"""What several target tasks agree on: one score from the influences on each of them (ICONS).

Xindi Wu et al. ICONS: Influence Consensus for Vision-Language Data Selection. 2025. Section 2.4.

    vote             sum_k 1[I_k(z) >= tau_k], tau_k the (1 - p) percentile    equation 6
    merge            sum_k I_k(z)                                              equation 3
    max              max_k I_k(z)                                              equation 4
    minrank          samples with the best rank for any task                   equation 5
    round_robin      the tasks take turns and take their best sample left
    merge_gausnorm   sum_k (I_k(z) - mu_k) / sigma_k                           section 3.3
    merge_sumnorm    sum_k I_k(z) / sum_j I_k(z_j)                             section 3.3

All take `influence` (n, K) float64 of samples that could be scored, and give scores (n,) float64,
higher is better; samples of equal score are taken in pool order. Votes are few whole numbers, so
most of the boundary is a tie: it goes by the mean percentile rank over the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from llava.errors import NonFiniteError, UsageError

Aggregation = Literal[
    "vote", "merge", "max", "merge_gausnorm", "merge_sumnorm", "round_robin", "minrank"
]


def check(influence: np.ndarray, names: Sequence[str]) -> None:
    """Raise NonFiniteError naming the task and the first sample without a finite influence: such a
    task would lose its vote."""
    for name, column in zip(names, influence.T, strict=True):
        broken = np.flatnonzero(~np.isfinite(column))
        if len(broken):
            raise NonFiniteError(
                f"target task {name}: the influence of {len(broken)} samples is not finite (first: "
                f"sample {broken[0]}); extract the signals again with --dtype float32"
            )


def thresholds(influence: np.ndarray, p: float) -> np.ndarray:
    """tau_k: the (1 - p) quantile of each column, interpolated linearly, (K,)."""
    return np.quantile(influence, 1 - p, axis=0)


def votes(influence: np.ndarray, p: float) -> np.ndarray:
    """1[I_k(z) >= tau_k], (n, K) bool. The best sample of a task always has its vote."""
    return influence >= thresholds(influence, p)


def percentile_ranks(influence: np.ndarray) -> np.ndarray:
    """Share of samples below each, equals counting half, in each column: (n, K) in [0, 1)."""
    ranks = np.empty_like(influence)
    for k, column in enumerate(influence.T):
        _, group, counts = np.unique(column, return_inverse=True, return_counts=True)
        below = np.cumsum(counts) - counts
        ranks[:, k] = ((below + (counts - 1) / 2) / len(column))[group]
    return ranks


def mean_rank(influence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean percentile rank over tasks, (n,) in [0, 1); what ties go by. Equal means are equal
    numbers: rounding hides in which order they were added, far below the step of 1 / 2nK."""
    return np.round((percentile_ranks(influence) * weights).sum(axis=1) / weights.sum(), 12)


def total_votes(influence: np.ndarray, weights: np.ndarray, p: float) -> np.ndarray:
    """Votes of every sample by the tasks' weights, (n,); equal sums are equal numbers."""
    return np.round((votes(influence, p) * weights).sum(axis=1), 9)


def vote(influence: np.ndarray, weights: np.ndarray, p: float) -> np.ndarray:
    """Total votes, plus the mean rank scaled to less than the smallest difference of two totals:
    with weights of 1 the whole part is the votes and the fraction the mean rank."""
    total = total_votes(influence, weights, p)
    gap = np.diff(np.unique(total)).min(initial=1.0)
    return total + gap * mean_rank(influence, weights)


def decided_by_rank(total: np.ndarray, k: int) -> int:
    """How many of the `k` samples with the most votes, `total` (n,), have no more votes than some
    sample left out: the tie rule chose them."""
    cut = np.sort(total)[::-1][k - 1]
    chosen = k - int((total > cut).sum())
    return 0 if chosen == (total == cut).sum() else chosen


def merge(influence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum over tasks."""
    return (influence * weights).sum(axis=1)


def merge_gausnorm(influence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum of standard scores; a task to which all samples are alike adds nothing."""
    # A column of equal numbers has a spread of rounding errors; all get the same with 1.
    spread = np.where(np.ptp(influence, axis=0) == 0, 1.0, influence.std(axis=0))
    return merge((influence - influence.mean(axis=0)) / spread, weights)


def merge_sumnorm(influence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum of influences over their totals; a task with a negative total counts backwards.

    Raises UsageError for a total of zero.
    """
    totals = influence.sum(axis=0)
    if (totals == 0).any():
        raise UsageError(
            f"--aggregation merge_sumnorm: the influences on task {np.flatnonzero(totals == 0)[0]} "
            "(counted from 0) add up to zero; choose another aggregation"
        )
    return merge(influence / totals, weights)


def ranks(influence: np.ndarray) -> np.ndarray:
    """rank_k(z), 1 is the highest influence, equals in pool order: (n, K) int64."""
    order = np.argsort(-influence, axis=0, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(1, len(order) + 1)[:, None], axis=0)
    return places


def minrank(influence: np.ndarray) -> np.ndarray:
    """Minus the best rank for any task; equals, at most one a task, by the mean rank."""
    return mean_rank(influence, np.ones(influence.shape[1])) - ranks(influence).min(axis=1)


def round_robin(influence: np.ndarray) -> np.ndarray:
    """n for the sample taken first, 1 for the last; the tasks begin in their order."""
    orders = [iter(order) for order in np.argsort(-influence, axis=0, kind="stable").T.tolist()]
    left = len(influence)
    scores = [0] * left
    while left:
        for order in orders[:left]:
            scores[next(row for row in order if not scores[row])] = left
            left -= 1
    return np.array(scores, np.float64)


def maximum(influence: np.ndarray) -> np.ndarray:
    """Largest influence on any task."""
    return influence.max(axis=1)


_WEIGHTED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "merge": merge,
    "merge_gausnorm": merge_gausnorm,
    "merge_sumnorm": merge_sumnorm,
}
_UNWEIGHTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max": maximum,
    "round_robin": round_robin,
    "minrank": minrank,
}


def aggregate(kind: Aggregation, influence: np.ndarray, weights: np.ndarray, p: float):
    """Scores (n,) by one rule; `weights` (K,) of the tasks, `p` the share that each votes for.

    Raises UsageError for unequal weights where the rule has no place for them.
    """
    if kind == "vote":
        return vote(influence, weights, p)
    if kind in _WEIGHTED:
        return _WEIGHTED[kind](influence, weights)
    if len(np.unique(weights)) > 1:
        raise UsageError(
            f"--aggregation {kind}: knows no weights, but those of the target tasks are "
            f"{np.unique(weights).tolist()}; choose vote, {', '.join(_WEIGHTED)} or equal weights"
        )
    return _UNWEIGHTED[kind](influence)
