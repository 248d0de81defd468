"""TIVE: quotas and instance values against slow loops, and draws that follow the softmax."""

import numpy as np
import pytest
from scipy import stats

from llava.errors import UsageError
from selection.methods.tive import Settings, Tive, instance_values, quotas, task_values


def test_task_values_are_mean_norms():
    norms, task = np.array([1.0, 3.0, 10.0]), np.array([0, 0, 2])
    np.testing.assert_array_equal(task_values(norms, task, 3), [2, 0, 10])


def slow_quotas(values, counts, k):
    """Give every task its proportion; a task that is full shares what it cannot take."""
    found, open_ = [0] * len(values), {t for t, n in enumerate(counts) if n}
    while True:
        left, total = k - sum(found), sum(values[t] for t in open_)
        ideal = {t: left * (values[t] / total if total else 1 / len(open_)) for t in open_}
        full = [t for t in open_ if ideal[t] >= counts[t]]
        if not full:
            break
        for t in full:
            found[t] = counts[t]
            open_.remove(t)
        if not open_:
            return found
    for t in open_:
        found[t] = int(ideal[t])
    order = sorted(open_, key=lambda t: (-(ideal[t] - int(ideal[t])), t))
    for t in order[: k - sum(found)]:
        found[t] += 1
    return found


def test_quotas_equal_a_slow_loop():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 7))
        counts, values = rng.integers(0, 30, n), rng.exponential(size=n)
        if not counts.sum():
            continue
        k = int(rng.integers(1, counts.sum() + 1))
        found = quotas(values, counts, k)
        assert found.sum() == k and (found <= counts).all()
        assert found.tolist() == slow_quotas(values.tolist(), counts.tolist(), k)


def test_quotas_of_tasks_without_gradient_are_equal():
    assert quotas(np.zeros(3), np.array([9, 9, 9]), 6).tolist() == [2, 2, 2]


def test_instance_values_are_mean_cosines_to_the_own_task(world):
    reader = world.context().readers["gradients"]
    task = np.random.default_rng(1).integers(-1, 4, size=150)
    unit = reader.column("gradient").astype(np.float64)
    found = instance_values(reader, task, 4)
    for i in range(150):
        if task[i] < 0:
            assert np.isnan(found[i])
        else:
            mine = [unit[i] @ unit[j] for j in range(150) if task[j] == task[i]]
            assert found[i] == pytest.approx(sum(mine) / len(mine), abs=1e-6)


def test_bad_rows_touch_nobody(world):
    clean = world.run(Tive()).artefacts["instance_values"]
    world.bad = [3]
    world.folder = world.folder / "bad"
    found = world.run(Tive()).artefacts["instance_values"]
    same_source = world.pool.sources == world.pool.sources[3]
    np.testing.assert_array_equal(found[~same_source], clean[~same_source])
    assert np.isnan(found[3]) and np.isfinite(np.delete(found, 3)).all()


def test_hard_tasks_get_more_and_sharp_draws_take_the_typical(world):
    sources = world.pool.sources
    world.others["gradients"]["norm"][sources == "source0"] = 50
    scored = world.run(Tive(Settings(q=1e6)))
    rows = Tive(Settings(q=1e6)).select(world.context(), scored.scores, 30)
    values = scored.artefacts["instance_values"]
    for name in np.unique(sources):
        mine, chosen = np.flatnonzero(sources == name), rows[sources[rows] == name]
        best = mine[np.argsort(-values[mine], kind="stable")][: len(chosen)]
        assert set(best) == set(chosen)
    assert (sources[rows] == "source0").mean() > 0.8


def test_draws_are_by_the_softmax_of_the_values(world):
    """The largest of logits + standard Gumbel numbers are a draw by their softmax."""
    noise = []
    for seed in (0, 1):
        scored = world.run(Tive(), seed)
        noise.append(scored.scores - 10 * scored.artefacts["instance_values"])
        assert stats.kstest(noise[-1], "gumbel_r").pvalue > 1e-3
    assert abs(np.corrcoef(noise)[0, 1]) < 0.33  # four standard errors of 150


def test_the_released_q_draws_as_good_as_uniformly(world):
    """softmax(0.001 v) with |v| <= 1: no weight differs from another by more than 0.2 %."""
    values = world.run(Tive()).artefacts["instance_values"]
    weights = np.exp(Tive.presets["as_released"]["q"] * values)
    assert weights.max() / weights.min() < 1.002


@pytest.mark.parametrize("q", [-1.0, float("nan"), float("inf")])
def test_impossible_settings_are_refused(q):
    with pytest.raises(UsageError, match="--q"):
        Settings(q=q)
