"""D2 Pruning: messages by hand, the heap against the arg-max definition, the whole method."""

import math

import numpy as np
import pytest

from llava.errors import UsageError
from selection.methods.d2_pruning import D2Pruning, Settings, forward_messages, selection_order
from selection.rules.budget import top_k
from selection.vectors import neighbours


def slow_forward(importance, ids, weights):
    sent = [max(float(s), 1e-7) for s in importance]
    return [
        sent[i] + sum(w * sent[j] for j, w in zip(ids[i], weights[i], strict=True))
        for i in range(len(sent))
    ]


def slow_order(scores, ids, weights):
    """The definition: look for the largest, take it, send its messages, look again."""
    scores, order = [float(s) for s in scores], []
    left = [i for i in range(len(scores)) if not math.isnan(scores[i])]
    while left:
        best = max(left, key=lambda i: (scores[i], -i))
        order.append(best)
        left.remove(best)
        for j, weight in zip(ids[best], weights[best], strict=True):
            if weight and j in left:
                scores[j] -= weight * scores[best]
    return order


def random_graph(rng, n, k=3):
    ids = np.array([rng.permutation([j for j in range(n) if j != i])[:k] for i in range(n)])
    return ids, rng.random((n, k)) * (rng.random((n, k)) < 0.8)


def test_forward_messages_by_hand():
    rng = np.random.default_rng(0)
    ids, weights = random_graph(rng, 30)
    importance = rng.normal(size=30)
    found = forward_messages(importance, ids, weights)
    np.testing.assert_allclose(found, slow_forward(importance, ids, weights), rtol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_heap_takes_what_the_argmax_takes(seed):
    """Scores with ties and of both signs: below zero a message raises its receiver."""
    rng = np.random.default_rng(seed)
    ids, weights = random_graph(rng, 60)
    scores = rng.integers(-2, 6, 60).astype(float)
    scores[rng.random(60) < 0.1] = np.nan
    assert selection_order(scores, ids, weights).tolist() == slow_order(scores, ids, weights)


def slow_method(world, gamma_forward, gamma_reverse, normalize, k=5):
    vectors = world.forward["mean_state"].astype(np.float64)
    if normalize:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids, squares = [], []
    for i in range(len(vectors)):
        apart = ((vectors - vectors[i]) ** 2).sum(axis=1)
        near = sorted((d, j) for j, d in enumerate(apart) if j != i)[:k]
        ids.append([j for _, j in near])
        squares.append([d for d, _ in near])
    squares = np.array(squares)
    lifted = slow_forward(world.forward["aum"], ids, np.exp(-gamma_forward * squares))
    return slow_order(lifted, ids, np.exp(-gamma_reverse * squares))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize": False},
        {"gamma_forward": 0.0},
        {"gamma_reverse": 3.0, "n_neighbours": 9},
    ],
)
def test_the_method_is_the_definition_over_an_exact_graph(world, settings):
    scores = world.run(D2Pruning(Settings(**settings))).scores
    wanted = {"gamma_forward": 1.0, "gamma_reverse": 0.4, "normalize": True, **settings}
    wanted["k"] = wanted.pop("n_neighbours", 5)
    assert np.argsort(-scores).tolist() == slow_method(world, **wanted)


def test_far_apart_embeddings_leave_the_importance_alone(world):
    world.forward["mean_state"] = (100 * world.forward["mean_state"].astype(np.float32)).astype(
        np.float16
    )
    scores = world.run(D2Pruning(Settings(**D2Pruning.presets["as_released"]))).scores
    aum = np.maximum(world.forward["aum"], 1e-7)
    slow = sorted(range(150), key=lambda row: (-aum[row], row))
    assert np.argsort(-scores).tolist() == slow


def test_the_cells_of_the_search_are_saved(world, monkeypatch):
    """Every pair compared: one cell. With cells of about 15, ten of them, by k-means."""
    whole = world.run(D2Pruning()).artefacts["neighbour_cells"]
    assert whole.tolist() == [0] * len(world.pool)
    monkeypatch.setattr(neighbours, "EXACT", 100)
    monkeypatch.setattr(neighbours, "CELL", 15)
    cells = world.run(D2Pruning(Settings(n_probe=2))).artefacts["neighbour_cells"]
    assert set(cells.tolist()) == set(range(10))


def test_equal_scores_and_copies_are_decided_by_position(world):
    world.forward["aum"][:] = 0.5
    world.forward["mean_state"][:] = world.forward["mean_state"][3]
    scores = world.run(D2Pruning(Settings(gamma_reverse=0.0, gamma_forward=0.0))).scores
    assert top_k(scores, 1).rows.tolist() == [0]


def test_fewer_samples_than_neighbours(new_world):
    world = new_world("tiny", n=4)
    world.bad = [3]
    scores = world.run(D2Pruning()).scores
    assert sorted(scores[:3]) == [-3, -2, -1] and np.isnan(scores[3])


@pytest.mark.parametrize("wrong", [{"n_neighbours": 0}, {"gamma_reverse": -1}, {"n_probe": -1}])
def test_impossible_settings(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**wrong)
