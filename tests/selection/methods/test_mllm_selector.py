"""MLLM-Selector: groups, the draw inside them, exact totals, the seed set, each reading of s."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llava.errors import DataError, UsageError
from selection.methods.mllm_selector import (
    MllmSelector,
    Settings,
    effective_size,
    group_of,
    gumbel,
    necessity,
)
from selection.methods.random import Random

K = 45


def made(**settings) -> MllmSelector:
    return MllmSelector(Settings(**settings))


def chosen(world, method: MllmSelector, seed: int = 0, k: int = K) -> np.ndarray:
    return method.select(world.context(), world.run(method, seed).scores, k)


def pair_probabilities(logits: np.ndarray) -> dict[tuple[int, int], float]:
    """Of every pair that two draws without replacement can give, from the definition."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    found = {}
    for i, j in itertools.combinations(range(len(p)), 2):
        found[i, j] = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
    return found


def test_largest_keys_are_draws_without_replacement():
    """Chi-square over all pairs of six samples, k = 2."""
    logits, rng, n = np.array([0.0, 0.7, -1.0, 1.5, 0.2, -0.4]), np.random.default_rng(0), 20_000
    keys = logits + gumbel(rng.random((n, len(logits))))
    pairs = np.sort(np.argsort(-keys, axis=1)[:, :2], axis=1)
    exact = pair_probabilities(logits)
    observed = [np.count_nonzero((pairs == pair).all(1)) for pair in exact]
    assert stats.chisquare(observed, n * np.array(list(exact.values()))).pvalue > 1e-3
    even = [n / len(exact)] * len(exact)
    assert stats.chisquare(observed, even).pvalue < 1e-6  # the test can tell


def test_whole_method_draws_with_those_probabilities(new_world):
    """The same through `score` and `select`: one group of six, one seed sample, two more."""
    world = new_world("tiny", n=7)
    method, context = made(n_seed="1", temperature=2.0), world.context()
    counts, n = {}, 3000
    seed_row = int(method.run(context, 0, dict).artefacts["seed_rows"][0])
    others = np.flatnonzero(np.arange(7) != seed_row)
    for seed in range(n):
        rows = method.select(context, method.run(context, seed, dict).scores, 3)
        pair = tuple(np.searchsorted(others, [row for row in rows if row != seed_row]).tolist())
        counts[pair] = counts.get(pair, 0) + 1
    exact = pair_probabilities(world.forward["nll_sum"][others].astype(np.float64) / 2)
    probable = {pair: n * p for pair, p in exact.items() if n * p >= 5}
    observed = [counts.get(pair, 0) for pair in probable]
    expected = np.array(list(probable.values()))
    rest = n - expected.sum()
    assert stats.chisquare([*observed, n - sum(observed)], [*expected, rest]).pvalue > 1e-3


def test_never_degenerate_at_log_probabilities_of_minus_ten_thousand():
    logits = np.r_[np.zeros(3), np.full(500, -1e4)]
    assert np.count_nonzero(np.exp(logits)) == 3  # probabilities themselves are gone
    keys = logits + gumbel(np.random.default_rng(0).random(len(logits)))
    assert np.isfinite(keys).all() and len(np.unique(keys)) == len(keys)
    assert set(np.argsort(-keys)[:3]) == {0, 1, 2}
    assert np.isfinite(gumbel(np.array([0.0, 2.0**-53, 1 - 2.0**-53]))).all()


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.integers(1, 12))
def test_groups_are_consecutive_ranks(values, size):
    scores = np.array([*values, np.nan])
    groups = group_of(scores, size)
    slow = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert groups[-1] == -1
    assert [groups[i] for i in slow] == [rank // size for rank in range(len(values))]


def test_effective_size_is_the_number_of_equal_samples():
    assert effective_size(np.full(7, -1e4)) == pytest.approx(7)
    assert effective_size(np.array([0.0, 0.0, -1e4])) == pytest.approx(2)
    p = np.array([0.5, 0.3, 0.2])
    assert effective_size(np.log(p)) == pytest.approx(1 / sum(x * x for x in p))


def test_the_readings_of_equation_3():
    nll = np.array([0.0, 1.0, 30.0])
    assert necessity(nll, "nll").tolist() == necessity(nll, "nll_mean").tolist() == [0, 1, 30]
    assert necessity(nll, "literal").tolist() == [0, -1, -30]
    np.testing.assert_allclose(necessity(nll, "perplexity"), np.exp([0, 1, 30]))


@pytest.mark.parametrize("kind", ["nll", "nll_mean", "literal", "perplexity"])
@pytest.mark.parametrize("strategy", ["top", "bottom"])
def test_top_and_bottom_take_the_extremes_after_the_seed(world, kind, strategy):
    method = made(necessity=kind, strategy=strategy, n_seed="10")
    rows = chosen(world, method)
    seed = world.run(method).artefacts["seed_rows"]
    column = world.forward["nll_sum" if kind in ("nll", "literal") else "nll_mean"]
    hardest_first = (kind == "literal") == (strategy == "bottom")
    left = sorted(set(range(150)) - set(seed.tolist()), key=lambda row: column[row])
    best = left[::-1][: K - 10] if hardest_first else left[: K - 10]
    assert rows.tolist() == sorted([*seed.tolist(), *best])


@pytest.mark.parametrize("group_size", [1, 7, 40, 139, 140, 1000])
@pytest.mark.parametrize("k", [11, 45, 149])
def test_totals_are_exact_and_groups_have_their_share(world, group_size, k):
    """150 samples, 10 of them the seed: sizes that do not divide, a last group that is partial."""
    method = made(group_size=group_size, n_seed="10")
    rows, groups = chosen(world, method, k=k), world.run(method).artefacts["group"]
    assert len(rows) == k
    sizes = np.bincount(groups[groups >= 0])
    drawn = np.bincount(groups[rows][groups[rows] >= 0], minlength=len(sizes))
    assert (np.abs(drawn - (k - 10) * sizes / sizes.sum()) < 1).all()


def test_seed_set_is_that_of_random_and_always_part_of_the_mixture(world):
    random = Random()
    for draw in (0, 3):
        method = made(n_seed="0.1", seed_draw=draw)
        seed = world.run(method, seed=5).artefacts["seed_rows"]
        same = random.select(world.context(), world.run(random, seed=draw).scores, 15)
        assert seed.tolist() == same.tolist()
        assert set(seed) <= set(chosen(world, method, seed=5))


def test_a_seed_sample_without_a_score_is_replaced_and_totals_hold(world):
    method = made(n_seed="10")
    world.bad = Random().select(world.context(), world.run(Random()).scores, 10)[:2].tolist()
    rows = method.select(world.context(7), world.run(method, block_size=7).scores, K)
    assert len(rows) == K and not set(world.bad) & set(rows)


def test_facts_of_the_groups(world):
    run = world.run(made(group_size=60, n_seed="10"))
    needed, group = run.artefacts["necessity"], run.artefacts["group"]
    assert [fact["n_samples"] for fact in run.artefacts["groups"]] == [60, 60, 20]
    for g, fact in enumerate(run.artefacts["groups"]):
        inside = needed[group == g]
        assert (fact["lowest"], fact["highest"]) == (inside.min(), inside.max())
        p = np.exp(inside - inside.max()) / np.exp(inside - inside.max()).sum()
        assert fact["effective_size"] == pytest.approx(1 / (p**2).sum())
    assert "3 groups" in run.notes[0]


@pytest.mark.parametrize("bad", [{"group_size": 0}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_settings_that_cannot_be(bad):
    with pytest.raises(UsageError, match=f"--{next(iter(bad))}"):
        made(**bad)


def test_budgets_that_cannot_be(world):
    with pytest.raises(UsageError, match="leave nothing of a budget of 20"):
        chosen(world, made(n_seed="20"), k=20)
    with pytest.raises(DataError, match="only"):
        chosen(world, made(n_seed="20"), k=151)
