"""Which end of a ranking to keep: scores whose k best are the lowest, middle or highest values."""

from __future__ import annotations

from typing import Literal

import numpy as np

Band = Literal["low", "middle", "high"]


def band_scores(values: np.ndarray, keep: Band) -> np.ndarray:
    """Scores (N,) float64 of `values` (N,), NaN where they are.

    The best k are the `keep` ones of the n values that are no NaN: the k lowest or highest, or
    the middle, places n//2 - k//2 up to n//2 - k//2 + k of the ascending order. A middle of fewer
    samples is thus part of one of more. Equal values are ordered by position.
    """
    values = np.asarray(values, dtype=np.float64)
    if keep != "middle":
        return values if keep == "high" else -values
    n = np.count_nonzero(~np.isnan(values))
    ranked = np.argsort(values, kind="stable")[:n]  # NaN comes last
    scores = np.full(len(values), np.nan)
    # A quarter off centre: the place below the middle comes before the one above it.
    scores[ranked] = -np.abs(np.arange(n) - n // 2 + 0.25)
    return scores
