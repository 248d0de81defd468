"""Budgets and the rule "take the best": how many samples, and which, when scores tie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava.errors import DataError, UsageError

_HELP = "give a fraction of the pool (0.3, 30%) or a count (5000)"


@dataclass(frozen=True)
class Selection:
    """Result of `top_k`.

    `rows` (k,) int64 ascending; `cut` is the lowest score taken; `margin` is how far the best
    score left out lies below it (inf when none is left, 0 when a tie is cut); of the `n_tied`
    rows that score exactly `cut`, `n_tied_taken` are taken.
    """

    rows: np.ndarray
    cut: float
    margin: float
    n_tied: int
    n_tied_taken: int


def budget_size(budget: str | float | int, n: int, rounding: str = "nearest") -> int:
    """Number of samples that `budget` means in a pool of `n`.

    A value with "%" or "." and every `float` is a fraction ("30%", 0.3, 1.0 = everything); an
    integer is a count (1 = one sample). A fraction is rounded to the `nearest` whole number (as
    Python's `round`: a half goes to the even one), or down with `floor`, as the released codes'
    `int(p * n)`. Raises UsageError for what is not a number, zero, negative, above the pool, or a
    fraction that rounds to no sample.
    """
    # The text tells: 1 is one sample and 1.0 all of them, from a shell as from YAML or Python.
    text = str(budget).strip().replace("_", "")
    try:
        if text.endswith("%"):
            amount, is_count = float(text[:-1]) / 100, False
        elif isinstance(budget, float) or not text.lstrip("+-").isdigit():
            amount, is_count = float(text), False
        else:
            amount, is_count = int(text), True
    except ValueError:
        raise UsageError(f"budget {budget!r} is not a number: {_HELP}") from None
    if is_count:
        if not 1 <= amount <= n:
            raise UsageError(f"budget {budget}: not between 1 and the pool's {n} samples: {_HELP}")
        return amount
    if not 0 < amount <= 1:  # also refuses nan
        raise UsageError(f"budget {budget}: a fraction must be above 0 and at most 1: {_HELP}")
    if rounding not in ("nearest", "floor"):
        raise UsageError(f"rounding {rounding!r}: choose nearest or floor")
    size = round(amount * n) if rounding == "nearest" else int(amount * n)
    if size == 0:
        raise UsageError(f"budget {budget} of {n} samples is less than one sample: {_HELP}")
    return size


def top_k(scores: np.ndarray, k: int, eligible: np.ndarray | None = None) -> Selection:
    """The `k` samples of highest score; of equal scores the earlier in the pool comes first.

    `scores` (N,) float64, NaN = cannot be selected; `eligible` (N,) bool marks further samples
    that cannot. Raises DataError when fewer than `k` samples can be selected.
    """
    scores = np.asarray(scores, dtype=np.float64)
    allowed = ~np.isnan(scores) if eligible is None else eligible & ~np.isnan(scores)
    candidates = np.flatnonzero(allowed)
    if k > len(candidates):
        raise DataError(
            f"{k} samples are to be selected but only {len(candidates)} of {len(scores)} can be "
            "(the others have no score or are excluded): lower --budget"
        )
    order = candidates[np.argsort(-scores[candidates], kind="stable")]  # stable: ties in pool order
    taken, left = order[:k], order[k:]
    cut = float(scores[taken[-1]]) if k else np.inf
    margin = np.inf
    if len(left):
        best_left = float(scores[left[0]])
        margin = 0.0 if best_left == cut else cut - best_left  # 0 also for equal infinities
    return Selection(
        rows=np.sort(taken),
        cut=cut,
        margin=margin,
        n_tied=int(np.count_nonzero(scores[candidates] == cut)),
        n_tied_taken=int(np.count_nonzero(scores[taken] == cut)),
    )
