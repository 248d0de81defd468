"""Every aggregation against a slow loop written from the paper's equations, and what breaks one."""

import itertools

import numpy as np
import pytest

from llava.errors import NonFiniteError, UsageError
from selection.rules.consensus import (
    aggregate,
    check,
    decided_by_rank,
    mean_rank,
    percentile_ranks,
    thresholds,
    total_votes,
    votes,
)

ONES = np.ones(4)
KINDS = ("vote", "merge", "max", "merge_gausnorm", "merge_sumnorm", "round_robin", "minrank")


def tables(ties: bool = True):
    """Influences (n, 4): some with many ties, some without, some of one sample."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 30):
        for _ in range(5):
            yield rng.normal(size=(n, 4))
            if ties:
                yield rng.integers(1, 4, size=(n, 4)).astype(float)


def top(scores, k):
    """The k best, earlier rows first among equals."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def quantile(column, q):
    """Linear interpolation between order statistics."""
    ordered, place = sorted(column), q * (len(column) - 1)
    low = int(place)
    high = min(low + 1, len(column) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def slow_votes(table, p):
    found = np.zeros(len(table))
    for k in range(table.shape[1]):
        tau = quantile(table[:, k], 1 - p)
        for i in range(len(table)):
            found[i] += table[i, k] >= tau - 1e-12 * abs(tau)
    return found


def slow_percentile(column, i):
    below = sum(x < column[i] for x in column)
    equal = sum(x == column[i] for x in column)
    return (below + (equal - 1) / 2) / len(column)


def slow_mean_rank(table):
    n, k = table.shape
    return [sum(slow_percentile(table[:, c], i) for c in range(k)) / k for i in range(n)]


def test_percentile_ranks_count_the_samples_below_and_half_of_the_equals():
    for table in tables():
        np.testing.assert_allclose(mean_rank(table, ONES), slow_mean_rank(table), atol=1e-12)
        assert (percentile_ranks(table) < 1).all() and (percentile_ranks(table) >= 0).all()


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 1.0])
def test_votes_are_those_above_the_percentile(p):
    for table in tables():
        np.testing.assert_array_equal(votes(table, p).sum(axis=1), slow_votes(table, p))
        np.testing.assert_allclose(
            thresholds(table, p), [quantile(column, 1 - p) for column in table.T]
        )


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 1.0])
def test_vote_is_most_votes_then_mean_rank_then_pool_order(p):
    for table in tables():
        scores, counted = aggregate("vote", table, ONES, p), slow_votes(table, p)
        ranked = np.round(slow_mean_rank(table), 12)
        slow = sorted(range(len(table)), key=lambda i: (-counted[i], -ranked[i], i))
        assert np.argsort(-scores, kind="stable").tolist() == slow
        np.testing.assert_array_equal(np.floor(scores), counted)


def test_when_nearly_nothing_passes_every_task_still_votes_for_its_best():
    table = np.random.default_rng(1).normal(size=(1000, 4))
    best = table.argmax(axis=0)
    assert total_votes(table, ONES, 1e-6).sum() == 4
    assert top(aggregate("vote", table, ONES, 1e-6), len(set(best))) == set(best)


def test_weights_are_counted_with_the_votes():
    table = np.random.default_rng(2).normal(size=(40, 3))
    weights = np.array([0.1, 0.2, 0.3])
    total = total_votes(table, weights, 0.3)
    slow = [sum(w for w, v in zip(weights, row, strict=True) if v) for row in votes(table, 0.3)]
    np.testing.assert_allclose(total, slow)
    assert len(np.unique(total)) <= 7  # 0.1 + 0.2 is 0.3
    scores, ranked = aggregate("vote", table, weights, 0.3), mean_rank(table, weights)
    for i, j in itertools.permutations(range(40), 2):
        if (total[i], ranked[i]) > (total[j], ranked[j]):
            assert scores[i] > scores[j]
    doubled = np.repeat(table, [1, 2, 3], axis=1)  # a weight of 2 is a task that is there twice
    np.testing.assert_allclose(total, total_votes(doubled, np.ones(6), 0.3) / 10)
    np.testing.assert_allclose(ranked, mean_rank(doubled, np.ones(6)), atol=1e-12)


def test_how_many_the_tie_rule_decides():
    for table in tables():
        total = total_votes(table, ONES, 0.3)
        for k in range(1, len(table) + 1):
            cut = sorted(total)[-k]
            inside = [i for i in top(total, k) if total[i] == cut]
            outside = [i for i in range(len(table)) if total[i] == cut and i not in inside]
            assert decided_by_rank(total, k) == (len(inside) if outside else 0)


def slow_score_based(kind, table):
    scores = []
    for row in table:
        terms = []
        for k, x in enumerate(row):
            column = table[:, k]
            mean = sum(column) / len(column)
            spread = (sum((y - mean) ** 2 for y in column) / len(column)) ** 0.5
            terms.append(
                {
                    "merge": x,
                    "max": x,
                    "merge_sumnorm": x / sum(column),
                    "merge_gausnorm": (x - mean) / spread if spread > 1e-12 else 0.0,
                }[kind]
            )
        scores.append(max(terms) if kind == "max" else sum(terms))
    return scores


@pytest.mark.parametrize("kind", ["merge", "max", "merge_gausnorm", "merge_sumnorm"])
def test_score_based_rules_equal_a_slow_loop(kind):
    for table in tables():
        np.testing.assert_allclose(
            aggregate(kind, table, ONES, 0.2), slow_score_based(kind, table), atol=1e-9, rtol=1e-9
        )


def slow_ranks(table):
    order = [sorted(range(len(table)), key=lambda i: (-column[i], i)) for column in table.T]
    return np.array([[mine.index(i) + 1 for mine in order] for i in range(len(table))])


def test_round_robin_lets_the_tasks_take_turns():
    for table in tables():
        ranks, taken, task = slow_ranks(table), [], 0
        while len(taken) < len(table):
            left = [i for i in range(len(table)) if i not in taken]
            taken.append(min(left, key=lambda i: ranks[i, task % 4]))
            task += 1
        scores = aggregate("round_robin", table, ONES, 0.2)
        assert np.argsort(-scores, kind="stable").tolist() == taken


def test_minrank_leaves_out_what_no_task_ranks_high():
    """Equation 5: no subset of the size has a larger smallest rank among what it leaves out."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        table = rng.normal(size=(8, 4))
        ranks = slow_ranks(table)
        scores = aggregate("minrank", table, ONES, 0.2)
        for k in range(1, 8):

            def objective(subset, ranks=ranks):
                return min(ranks[i].min() for i in range(8) if i not in subset)

            best = max(objective(subset) for subset in itertools.combinations(range(8), k))
            assert objective(top(scores, k)) == best


def test_equal_minima_go_by_the_mean_rank():
    table = np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [0.0, 2.5]])
    assert np.argsort(-aggregate("minrank", table, np.ones(2), 0.5)).tolist()[:2] == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_one_task_is_its_specialist(kind):
    column = np.random.default_rng(4).normal(size=(50, 1)) + 5
    scores = aggregate(kind, column, np.ones(1), 0.2)
    assert top(scores, 10) == top(column[:, 0], 10)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("max", "round_robin", "minrank")]
)
def test_a_task_to_which_all_samples_are_alike_decides_nothing(kind):
    table = np.random.default_rng(5).normal(size=(50, 3)) + 1
    flat = np.column_stack([table, np.full(50, 0.7)])
    for p in (0.1, 0.5):
        with_it, without = aggregate(kind, flat, ONES, p), aggregate(kind, table, np.ones(3), p)
        assert top(with_it, 20) == top(without, 20)


def test_all_columns_constant_is_pool_order():
    table = np.full((9, 4), 0.1)
    for kind in KINDS:
        assert top(aggregate(kind, table, ONES, 0.3), 3) == {0, 1, 2}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_influence_is_an_error_that_names_the_task(value):
    table = np.zeros((5, 2))
    table[3, 1] = value
    with pytest.raises(NonFiniteError, match="target task pope: .* 1 samples .* sample 3"):
        check(table, ["mme", "pope"])
    check(table[:3], ["mme", "pope"])


def test_what_has_no_place_for_weights_refuses_them():
    table = np.random.default_rng(6).normal(size=(5, 2))
    for kind in ("max", "round_robin", "minrank"):
        with pytest.raises(UsageError, match=f"{kind}.*weights"):
            aggregate(kind, table, np.array([1.0, 2.0]), 0.2)


def test_sums_of_zero_cannot_normalise():
    with pytest.raises(UsageError, match="task 1 .*add up to zero"):
        aggregate("merge_sumnorm", np.array([[1.0, -1.0], [1.0, 1.0]]), np.ones(2), 0.5)


def test_scaling_a_task_changes_no_rank_based_rule():
    table = np.random.default_rng(7).normal(size=(60, 4))
    scaled = table * [1, 100, 0.01, 7] + [0, 3, -2, 1]
    for kind in ("vote", "round_robin", "minrank"):
        np.testing.assert_array_equal(
            aggregate(kind, table, ONES, 0.2), aggregate(kind, scaled, ONES, 0.2)
        )
