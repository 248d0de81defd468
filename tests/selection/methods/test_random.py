"""Random: every subset of a size is equally likely, budgets are nested, place does not matter."""

from itertools import combinations

import numpy as np
from scipy import stats

from selection.methods.random import Random


def test_every_pair_of_a_small_pool_is_equally_likely(new_world):
    context = new_world("tiny", n=6).context()
    method = Random()
    counts = dict.fromkeys(combinations(range(6), 2), 0)
    n_seeds = 3000
    for seed in range(n_seeds):
        scores = method.run(context, seed, None).scores
        counts[tuple(method.select(context, scores, 2).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_a_smaller_budget_is_part_of_a_larger_one(world):
    method, context = Random(), world.context()
    scores = world.run(method, seed=4).scores
    rows = [set(method.select(context, scores, k).tolist()) for k in (1, 10, 75, 150)]
    assert all(small < large for small, large in zip(rows, rows[1:], strict=False))
    assert rows[-1] == set(range(150))


def test_another_seed_draws_other_samples(world):
    method, context = Random(), world.context()
    first, second = (
        method.select(context, world.run(method, seed=seed).scores, 75) for seed in (0, 1)
    )
    # hypergeometric: 37.5 in common on average, standard deviation 3.1
    assert abs(len(np.intersect1d(first, second)) - 37.5) < 16
