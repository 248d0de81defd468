"""What is counted of answers under attack: arrays in, arrays or numbers out.

An item is asked in several orders of its options (`llava.eval.question.orders`); order 0 is the
given one. Items differ in their number of orders, so arrays (I, O) come with `asked` (I, O), true
where that order was put to the model.

    clean      right in the given order                              one bool an item
    worst      right in every order that was asked: PA               one bool an item
    broken     right in the given order, wrong in another            one bool an item
    mean       share of orders answered right                        one float an item
    bootstrap  interval of the mean over items
    mcnemar    are two runs on the same items different?

A benchmark's number is the mean over items, and mean(broken) = Clean - PA. Under other symbols the
same functions give SA (`clean`) and SA+PA (`worst`).

Sources: PA is Zong et al., "Fool Your (Vision and) Language Model With Embarrassingly Simple
Permutations"; recall per position and RStd are Zheng et al., "Large Language Models Are Not Robust
Multiple Choice Selectors"; the test is McNemar's (1947), exact.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.integer]
Floats = NDArray[np.float64]

UNREAD = -1
"""chosen position of an answer in which no option could be read"""
_CELLS = 1 << 22  # of int64 in one block of resamples: 32 MiB


def clean(correct: Bools, asked: Bools) -> Bools:
    """Right in the given order, (I,). ValueError if an item was not asked in it."""
    if not asked[:, 0].all():
        raise ValueError(f"item {int(np.argmin(asked[:, 0]))} was not asked in the given order")
    return correct[:, 0]


def worst(correct: Bools, asked: Bools) -> Bools:
    """Right in every order asked, (I,): permutation accuracy PA is its mean.

    ValueError for an item not asked in the given order: without it, PA <= Clean would not hold.
    """
    return clean(correct, asked) & (correct | ~asked).all(axis=1)


def broken(correct: Bools, asked: Bools) -> Bools:
    """Right in the given order and wrong in another, (I,): attack success is its mean."""
    return clean(correct, asked) & ~worst(correct, asked)


def mean_over_orders(correct: Bools, asked: Bools) -> Floats:
    """Share of an item's orders answered right, (I,) in 0..1; every item weighs the same.

    Means something only where no order was skipped after a first wrong answer.
    """
    clean(correct, asked)
    return (correct & asked).sum(axis=1) / asked.sum(axis=1)


def position_counts(chosen: Ints, n_positions: int) -> NDArray[np.int64]:
    """How often each position was chosen, (n_positions,); UNREAD answers are not in it.

    `chosen` (N,) holds one answer an order, `chosen[asked]`.
    """
    return np.bincount(chosen[chosen != UNREAD], minlength=n_positions)


def position_recall(chosen: Ints, gold: Ints, n_positions: int) -> Floats:
    """Of the answers whose right option stood at a position, the share that chose it, (P,) in 0..1.

    `chosen` and `gold` (N,) are positions. An unread answer is wrong. NaN where the right option
    never stood.
    """
    stood = np.bincount(gold, minlength=n_positions)
    hits = np.bincount(gold[chosen == gold], minlength=n_positions)
    return np.divide(hits, stood, out=np.full(n_positions, np.nan), where=stood > 0)


def recall_std(recall: Floats) -> float:
    """RStd: population standard deviation of the recalls, in 0..0.5; 0 is no preference.

    Positions without a recall (NaN) are left out; NaN if none has one.
    """
    known = recall[~np.isnan(recall)]
    return float(known.std()) if len(known) else math.nan


def failure_rate(chosen: Ints) -> float:
    """Share of answers (N,) in which no option could be read, 0..1; NaN for no answers."""
    return float((chosen == UNREAD).mean()) if len(chosen) else math.nan


def bootstrap(
    values: NDArray[np.generic],
    generator: np.random.Generator,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (I,) over items drawn with return.

    For the difference of two runs on the same items, pass the difference of their values. Items
    with equal values are interchangeable, so a resample is one multinomial draw of how often each
    distinct value occurs: the same distribution as drawing rows, at the price of a few numbers.
    Raises ValueError for no items or a level outside 0..1.
    """
    if not len(values) or not 0 < level < 1:
        raise ValueError(f"{len(values)} items, level {level}: both must be above 0, level below 1")
    distinct, counts = np.unique(values.astype(np.float64), return_counts=True)
    block = max(1, _CELLS // len(distinct))
    means = np.empty(n_resamples)
    for start in range(0, n_resamples, block):
        rows = means[start : start + block]
        draws = generator.multinomial(len(values), counts / len(values), size=len(rows))
        rows[:] = draws @ distinct / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(first: Bools, second: Bools) -> tuple[int, int, float]:
    """Items (I,) only the first run has right, only the second, and the exact two-sided p.

    Under the null hypothesis the items on which the runs differ fall to either side like a fair
    coin. Raises ValueError if the runs do not have the same number of items.
    """
    from scipy.stats import binomtest  # a second and a half to load, for this test alone

    if first.shape != second.shape:
        raise ValueError(f"runs over {len(first)} and {len(second)} items: not the same items")
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    n = only_first + only_second
    p = float(binomtest(only_first, n).pvalue) if n else 1.0
    return only_first, only_second, p
