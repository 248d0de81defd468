"""Metrics against slow loops, and against what oracle answer patterns give on paper."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llava.eval import metrics
from llava.eval.metrics import UNREAD
from llava.eval.question import orders

N_OPTIONS = [2, 3, 4, 2, 4, 3] * 8


def rng(seed=0):
    return np.random.default_rng(seed)


def asked_orders(counts):
    """(I, O) true for the first `counts[i]` orders of item i."""
    return np.arange(max(counts)) < np.array(counts)[:, None]


def shown(n_options=N_OPTIONS):
    """`gold` (I, O): where the right option stands in each order; item i's is option i modulo n."""
    lists = [orders(n, str(i)) for i, n in enumerate(n_options)]
    asked = asked_orders([len(each) for each in lists])
    gold = np.zeros(asked.shape, int)
    for i, each in enumerate(lists):
        gold[i, : len(each)] = [order.index(i % n_options[i]) for order in each]
    return gold, asked


def random_run(seed=0):
    draw = rng(seed)
    counts = draw.integers(1, 7, 50)
    asked = asked_orders([*counts, 6])
    gold = draw.integers(0, 4, asked.shape)
    chosen = np.where(draw.random(asked.shape) < 0.6, gold, draw.integers(-1, 4, asked.shape))
    return chosen, gold, asked


# ---- oracles


def test_always_first():
    """Clean is the share of items whose right option stands first; no item survives its orders."""
    gold, asked = shown()
    correct = gold == 0
    at_first = sum(i % n == 0 for i, n in enumerate(N_OPTIONS)) / len(N_OPTIONS)
    assert metrics.clean(correct, asked).mean() == at_first
    assert not metrics.worst(correct, asked).any()
    assert metrics.broken(correct, asked).mean() == at_first
    np.testing.assert_allclose(metrics.mean_over_orders(correct, asked), 1 / np.array(N_OPTIONS))
    recall = metrics.position_recall(np.zeros(asked.sum(), int), gold[asked], 4)
    np.testing.assert_array_equal(recall, [1, 0, 0, 0])
    assert metrics.recall_std(recall) == pytest.approx(math.sqrt(3) / 4)


def test_perfect():
    gold, asked = shown()
    correct = asked.copy()
    assert metrics.clean(correct, asked).all()
    assert metrics.worst(correct, asked).all()
    assert not metrics.broken(correct, asked).any()
    assert (metrics.mean_over_orders(correct, asked) == 1).all()
    recall = metrics.position_recall(gold[asked], gold[asked], 4)
    assert (recall == 1).all()
    assert metrics.recall_std(recall) == 0


@pytest.mark.parametrize(("n", "n_orders"), [(2, 2), (3, 3), (4, 2)])
def test_random_answers(n, n_orders):
    """Guessing among n options is right with 1/n, and in all of m orders with 1/n^m."""
    n_items, draw = 20_000, rng(n)
    asked = np.ones((n_items, n_orders), bool)
    correct = draw.integers(0, n, asked.shape) == 0
    expected = {metrics.clean: 1 / n, metrics.worst: n**-n_orders, metrics.mean_over_orders: 1 / n}
    for metric, value in expected.items():
        # Seeds are fixed; five standard errors leave 6e-7 to chance had they not been.
        margin = 5 * math.sqrt(value * (1 - value) / n_items)
        assert abs(metric(correct, asked).mean() - value) < margin


# ---- slow loops


def test_against_loops():
    chosen, gold, asked = random_run()
    correct = chosen == gold
    cells = [
        [(c, g) for c, g, a in zip(*row, strict=True) if a]
        for row in zip(chosen, gold, asked, strict=True)
    ]
    for i, row in enumerate(cells):
        right = [c == g for c, g in row]
        assert metrics.clean(correct, asked)[i] == right[0]
        assert metrics.worst(correct, asked)[i] == all(right)
        assert metrics.broken(correct, asked)[i] == (right[0] and not all(right))
        assert metrics.mean_over_orders(correct, asked)[i] == sum(right) / len(right)
    flat = [cell for row in cells for cell in row]
    for position in range(4):
        count = metrics.position_counts(chosen[asked], 4)[position]
        assert count == sum(c == position for c, _ in flat)
        here = [c == g for c, g in flat if g == position]
        recall = metrics.position_recall(chosen[asked], gold[asked], 4)[position]
        assert recall == sum(here) / len(here)
    failed = sum(c == UNREAD for c, _ in flat)
    assert failed > 0
    assert metrics.failure_rate(chosen[asked]) == failed / len(flat)


@pytest.mark.parametrize("seed", range(20))
def test_worst_is_never_above_clean(seed):
    chosen, gold, asked = random_run(seed)
    correct = chosen == gold
    clean, worst = metrics.clean(correct, asked), metrics.worst(correct, asked)
    assert not (worst & ~clean).any()
    broken = metrics.broken(correct, asked)
    assert broken.sum() == clean.sum() - worst.sum()


def test_answers_that_were_not_asked_change_nothing():
    chosen, gold, asked = random_run()
    correct = chosen == gold
    for metric in (metrics.clean, metrics.worst, metrics.broken, metrics.mean_over_orders):
        np.testing.assert_array_equal(
            metric(correct & asked, asked), metric(correct | ~asked, asked)
        )


def test_an_item_without_the_given_order_is_refused():
    asked = np.array([[True, True], [False, True]])
    for metric in (metrics.clean, metrics.worst, metrics.broken, metrics.mean_over_orders):
        with pytest.raises(ValueError, match="item 1 was not asked in the given order"):
            metric(asked, asked)


def test_positions_never_gold_have_no_recall_and_do_not_count():
    recall = metrics.position_recall(np.array([0, 1, UNREAD]), np.array([0, 0, 1]), 4)
    np.testing.assert_array_equal(recall, [0.5, 0, np.nan, np.nan])
    assert metrics.recall_std(recall) == 0.25
    assert math.isnan(metrics.recall_std(recall[2:]))
    assert math.isnan(metrics.failure_rate(np.array([], int)))


# ---- bootstrap


def test_bootstrap_is_that_of_drawn_rows():
    """Same quantiles as the plain loop over resampled items."""
    values = rng(1).choice([0, 0.25, 0.5, 1], 60)
    draw = rng(2)
    slow = [values[draw.integers(0, 60, 60)].mean() for _ in range(10_000)]
    fast = metrics.bootstrap(values, rng(3))
    # The quantile of 10,000 draws from a normal of deviation s has an error of about 0.027 s at
    # 2.5 %; s is 0.05 here, so five errors of the difference are 0.0095, a twentieth of the width.
    np.testing.assert_allclose(fast, np.quantile(slow, [0.025, 0.975]), atol=0.0095)


def test_bootstrap_covers():
    """Nominal 90 % intervals of a share of 0.6 over 200 items hold it in about 90 % of runs."""
    draw = rng(4)
    runs = 400
    intervals = [metrics.bootstrap(draw.random(200) < 0.6, draw, level=0.9) for _ in range(runs)]
    covered = sum(low <= 0.6 <= high for low, high in intervals) / runs
    # A standard error of 400 runs is 0.015; the percentile interval of a share covers 0.88 to 0.91.
    assert 0.85 < covered < 0.95


def test_bootstrap_is_repeatable_and_blocks_do_not_matter(monkeypatch):
    values = rng(5).random(300)
    whole = metrics.bootstrap(values, rng(6), n_resamples=1000)
    assert whole == metrics.bootstrap(values, rng(6), n_resamples=1000)
    assert whole != metrics.bootstrap(values, rng(7), n_resamples=1000)
    monkeypatch.setattr(metrics, "_CELLS", 300 * 7)
    # One product with a matrix of another height may be summed in another order.
    assert metrics.bootstrap(values, rng(6), n_resamples=1000) == pytest.approx(whole, rel=1e-12)


def test_bootstrap_of_equal_values_is_a_point():
    assert metrics.bootstrap(np.ones(9, bool), rng()) == (1, 1)


@pytest.mark.parametrize(("n", "level"), [(0, 0.95), (3, 0), (3, 1)])
def test_bootstrap_refuses(n, level):
    with pytest.raises(ValueError, match=f"{n} items, level {level}"):
        metrics.bootstrap(np.ones(n), rng(), level=level)


# ---- McNemar


def paired(both, only_first, only_second, neither):
    cells = [(1, 1)] * both + [(1, 0)] * only_first + [(0, 1)] * only_second + [(0, 0)] * neither
    first, second = np.array(cells, bool).reshape(-1, 2).T
    return first, second


def test_mcnemar_by_enumeration():
    """p is the share of all 2^n ways for the differing items to fall that are as lopsided."""
    for first, second in itertools.product(range(6), range(6)):
        n = first + second
        sides = [sum(bits) for bits in itertools.product((0, 1), repeat=n)]
        lopsided = sum(abs(2 * side - n) >= abs(first - second) for side in sides) / 2**n
        assert metrics.mcnemar(*paired(3, first, second, 2)) == (first, second, lopsided)


def test_mcnemar_known_values():
    # 10 against 2: 2 (1 + 12 + 66) / 4096
    assert metrics.mcnemar(*paired(0, 10, 2, 0))[2] == 158 / 4096
    assert metrics.mcnemar(*paired(5, 0, 0, 5)) == (0, 0, 1.0)
    assert metrics.mcnemar(*paired(0, 3000, 1, 0))[2] == pytest.approx(0, abs=1e-300)
    assert metrics.mcnemar(*paired(0, 2000, 2000, 0))[2] == 1.0


def test_mcnemar_needs_the_same_items():
    with pytest.raises(ValueError, match="runs over 2 and 3 items"):
        metrics.mcnemar(np.ones(2, bool), np.ones(3, bool))
