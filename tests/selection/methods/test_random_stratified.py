"""Random within sources: exact shares, exact size, uniform inside a source."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llava.errors import DataError
from selection.methods.random_stratified import RandomStratified, largest_remainder


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.floats(0, 1))
def test_shares_sum_to_k_and_are_within_one_of_proportional(counts, fraction):
    counts = np.array(counts, np.int64)
    k = int(fraction * counts.sum())
    shares = largest_remainder(counts, k)
    assert shares.sum() == k
    assert (shares >= 0).all() and (shares <= counts).all()
    assert (np.abs(shares - k * counts / max(counts.sum(), 1)) < 1).all()


def test_largest_remainders_win_and_ties_go_to_the_first():
    # 10 of 3, 3, 3, 1: exact shares of 5 are 1.5, 1.5, 1.5, 0.5; two are left over
    assert largest_remainder(np.array([3, 3, 3, 1]), 5).tolist() == [2, 2, 1, 0]
    # 1.2, 0.8, 1.0
    assert largest_remainder(np.array([6, 4, 5]), 3).tolist() == [1, 1, 1]


def test_equals_the_rule_done_by_hand():
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = rng.integers(0, 30, size=rng.integers(1, 8))
        k = int(rng.integers(0, counts.sum() + 1))
        exact = [k * c / max(counts.sum(), 1) for c in counts]
        shares = [int(e + 1e-9) for e in exact]
        order = sorted(range(len(counts)), key=lambda s: (-round(exact[s] - shares[s], 9), s))
        for s in order[: k - sum(shares)]:
            shares[s] += 1
        assert largest_remainder(counts, k).tolist() == shares


def test_sources_keep_their_shares_and_the_draw_inside_is_uniform(new_world):
    world = new_world("w", n=30)
    context, method, sources = world.context(), RandomStratified(), world.pool.sources
    names, counts = np.unique(sources, return_counts=True)
    drawn = np.zeros(30)
    n_seeds = 1500
    for seed in range(n_seeds):
        rows = method.select(context, method.run(context, seed, None).scores, 10)
        got = [np.count_nonzero(sources[rows] == name) for name in names]
        assert got == largest_remainder(counts, 10).tolist()
        drawn[rows] += 1
    for name, share in zip(names, got, strict=True):
        inside = drawn[sources == name]
        assert inside.sum() == share * n_seeds
        # draws without replacement vary less than independent ones, so the test is on the safe side
        assert stats.chisquare(inside).pvalue > 1e-4


def test_samples_that_cannot_be_selected_count_for_nothing(world):
    context, method = world.context(), RandomStratified()
    scores = method.run(context, 0, None).scores
    scores[world.pool.sources == "source0"] = np.nan
    scores[:40] = np.nan
    left = np.flatnonzero(~np.isnan(scores))
    assert method.select(context, scores, len(left)).tolist() == left.tolist()
    assert set(method.select(context, scores, 11)) <= set(left)
    with pytest.raises(DataError, match=f"only {len(left)} "):
        method.select(context, scores, len(left) + 1)


def test_a_smaller_share_of_a_source_is_part_of_a_larger_one(world):
    context, method = world.context(), RandomStratified()
    scores = method.run(context, 0, None).scores
    small, large = (set(method.select(context, scores, k)) for k in (30, 120))
    assert small < large
