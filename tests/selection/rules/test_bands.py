"""Bands of a ranking against slices of a sorted list."""

import numpy as np
import pytest

from selection.rules.bands import band_scores
from selection.rules.budget import top_k


@pytest.mark.parametrize("keep", ["low", "middle", "high"])
@pytest.mark.parametrize("n", [1, 2, 9, 10])
def test_the_best_k_are_a_slice_of_the_sorted_values(keep, n):
    values = np.random.default_rng(n).permutation(n).astype(float)
    order = sorted(range(n), key=lambda i: values[i])
    for k in range(1, n + 1):
        start = {"low": 0, "middle": n // 2 - k // 2, "high": n - k}[keep]
        slow = sorted(order[start : start + k])
        assert top_k(band_scores(values, keep), k).rows.tolist() == slow


@pytest.mark.parametrize("keep", ["low", "middle", "high"])
def test_missing_values_have_no_score_and_no_place(keep):
    values = np.array([3.0, np.nan, 1.0, 2.0, np.nan, 5.0, 4.0])
    scores = band_scores(values, keep)
    assert np.isnan(scores).tolist() == np.isnan(values).tolist()
    there = ~np.isnan(values)
    np.testing.assert_array_equal(scores[there], band_scores(values[there], keep))
    assert np.isnan(band_scores(np.full(3, np.nan), keep)).all()


def test_equal_values_are_ordered_by_position():
    assert top_k(band_scores(np.zeros(9), "middle"), 3).rows.tolist() == [3, 4, 5]
    assert top_k(band_scores(np.zeros(9), "low"), 3).rows.tolist() == [0, 1, 2]
