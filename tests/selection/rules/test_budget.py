"""Laws of budgets and of taking the best."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import DataError, UsageError
from selection.rules.budget import budget_size, top_k


@pytest.mark.parametrize(
    ("budget", "n", "nearest", "floor"),
    [
        ("0.3", 665_298, 199_589, 199_589),
        (0.3, 10, 3, 3),
        ("30%", 10, 3, 3),
        (" 30 % ", 10, 3, 3),
        ("12.5%", 12, 2, 1),
        (0.25, 10, 2, 2),  # 2.5: a half goes to the even number
        (0.35, 10, 4, 3),  # 3.5
        (".5", 3, 2, 1),
        ("1e-1", 20, 2, 2),
        (1.0, 7, 7, 7),
        ("1.0", 7, 7, 7),
        ("100%", 7, 7, 7),
        (1, 7, 1, 1),
        ("1", 7, 1, 1),
        ("5000", 5000, 5000, 5000),
        ("133_000", 665_298, 133_000, 133_000),
        (np.int64(4), 7, 4, 4),
        (np.float64(0.5), 8, 4, 4),
    ],
)
def test_budget_size(budget, n, nearest, floor):
    assert budget_size(budget, n) == nearest
    assert budget_size(budget, n, "floor") == floor


@pytest.mark.parametrize(
    "budget",
    ["0", 0, 0.0, "0%", "-1", -1, -0.3, "-30%", 101, "101", "1.01", 1.5, "101%", 1e9]
    + ["", "much", "30 percent", "nan", "inf", "%", None, "0.001"],
)
def test_impossible_budget_is_refused_in_one_line(budget):
    with pytest.raises(UsageError) as caught:
        budget_size(budget, 100)
    assert "budget" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_unknown_rounding_is_refused():
    with pytest.raises(UsageError, match="nearest or floor"):
        budget_size(0.3, 10, "up")


scores_strategy = st.lists(
    st.one_of(st.just(math.nan), st.sampled_from([0.0, -0.0, 1.0, 2.0]), st.floats(allow_nan=True)),
    max_size=30,
)


@given(scores_strategy, st.data())
def test_top_k_against_a_slow_loop(values, data):
    scores = np.array(values, np.float64)
    n = len(scores)
    eligible = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool)
    allowed = [i for i in range(n) if eligible[i] and not math.isnan(scores[i])]
    k = data.draw(st.integers(0, len(allowed)))
    left, taken = list(allowed), []
    for _ in range(k):  # the best of what is left, the earliest of equals
        best = left[0]
        for i in left:
            if scores[i] > scores[best]:
                best = i
        left.remove(best)
        taken.append(best)
    result = top_k(scores, k, eligible)
    assert result.rows.tolist() == sorted(taken) and result.rows.dtype == np.int64
    if k:
        assert result.cut == min(scores[taken])
        assert result.n_tied == sum(scores[i] == result.cut for i in allowed)
        assert result.n_tied_taken == sum(scores[i] == result.cut for i in taken)
        assert result.margin >= 0
        assert (result.margin == 0) == any(scores[i] == result.cut for i in left)


def test_cut_is_described():
    result = top_k(np.array([1.0, 3.0, 2.0, 2.0, np.nan, 0.5]), 2)
    assert result.rows.tolist() == [1, 2]
    assert (result.cut, result.margin, result.n_tied, result.n_tied_taken) == (2.0, 0.0, 2, 1)
    result = top_k(np.array([1.0, 3.0, 2.0, 2.0, np.nan, 0.5]), 3)
    assert (result.cut, result.margin, result.n_tied, result.n_tied_taken) == (2.0, 1.0, 2, 2)
    assert top_k(np.array([1.0]), 1).margin == math.inf


def test_margin_without_anything_left_is_infinite():
    assert top_k(np.array([-np.inf, np.nan]), 1).margin == np.inf
    assert top_k(np.array([-np.inf, -np.inf]), 1).margin == 0


def test_many_ties_go_by_pool_position():
    scores = np.tile([0.0, 1.0], 5000)  # long enough for an unstable sort to show
    assert np.array_equal(top_k(scores, 7000).rows[:4000], np.arange(4000))
    assert np.array_equal(top_k(scores, 3000).rows, np.arange(1, 6000, 2))


def test_smaller_budget_is_part_of_a_larger_one():
    scores = np.random.default_rng(0).integers(0, 5, 50).astype(float)
    subsets = [set(top_k(scores, k).rows) for k in range(51)]
    assert all(a < b for a, b in zip(subsets, subsets[1:], strict=False))


def test_too_few_samples_to_choose_from():
    with pytest.raises(DataError, match="only 1 of 3 can be"):
        top_k(np.array([1.0, np.nan, 2.0]), 2, np.array([True, True, False]))
