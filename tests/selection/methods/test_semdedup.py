"""SemDeDup: M by a slow double loop, one pass against a sweep over eps, copies, odd clusters."""

import numpy as np
import pytest
import torch

from llava.errors import UsageError
from selection.methods import semdedup
from selection.methods.base import stream
from selection.methods.semdedup import COLUMNS, Semdedup, Settings, keep_order, nearest_before
from selection.rules.budget import top_k
from selection.vectors.kmeans import cluster_rows


def unit_rows(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_nearest_before_is_a_double_loop(chunk, monkeypatch):
    monkeypatch.setattr(semdedup, "_CHUNK", chunk)
    vectors = unit_rows(np.random.default_rng(0).normal(size=(40, 5)))
    found = nearest_before(torch.from_numpy(vectors).float())
    slow = [max([float(vectors[i] @ vectors[j]) for i in range(j)], default=-1) for j in range(40)]
    np.testing.assert_allclose(found, slow, atol=1e-6)  # float32 products of 5 terms
    assert nearest_before(torch.ones(1, 4) / 2).tolist() == [-1]


def test_order_is_far_first_or_near_first_and_stable():
    cosines = np.array([0.5, 0.9, 0.1, 0.5])
    assert keep_order(cosines, "hard").tolist() == [2, 0, 3, 1]
    assert keep_order(cosines, "easy").tolist() == [1, 0, 3, 2]


def slow_kept(vectors, labels, centroids, eps, keep):
    """The released loop for one eps: rows that survive, over all clusters."""
    kept = []
    for label, centroid in enumerate(centroids):
        rows = [row for row in range(len(vectors)) if labels[row] == label]
        sign = 1 if keep == "hard" else -1
        rows.sort(key=lambda row: sign * float(vectors[row] @ centroid))
        for place, row in enumerate(rows):
            before = [float(vectors[row] @ vectors[other]) for other in rows[:place]]
            if max(before, default=-1) <= 1 - eps:
                kept.append(row)
    return sorted(kept)


@pytest.mark.parametrize("keep", ["hard", "easy"])
def test_one_pass_equals_a_sweep_over_eps(world, keep):
    scored = world.run(Semdedup(Settings(keep=keep)), seed=2)
    context = world.context()
    keys = context.keys(stream(2, "semdedup", "score"))
    made = cluster_rows(context.readers["forward"], COLUMNS, np.ones(150, bool), keys, 10_000, 50)
    vectors = unit_rows(world.forward["last_state"].astype(np.float32))
    labels, sizes = scored.artefacts["cluster_labels"], set()
    assert made.labels.tolist() == labels.tolist()
    for eps in np.linspace(0.02, 1.2, 25):
        kept = slow_kept(vectors, labels, made.centroids, eps, keep)
        assert top_k(scored.scores, len(kept)).rows.tolist() == kept
        sizes.add(len(kept))
    assert len(sizes) > 5


def test_the_cut_is_eps(world):
    scores = world.run(Semdedup()).scores
    selection = top_k(scores, 60)
    eps = 1 + selection.cut
    assert np.count_nonzero(-scores <= 1 - eps) == 60 + selection.n_tied - selection.n_tied_taken


def test_copies_are_the_first_to_go(world):
    states = world.forward["last_state"]
    states[100:120] = states[0:20]
    rows = set(top_k(world.run(Semdedup()).scores, 130).rows.tolist())
    assert all((i in rows) != (i + 100 in rows) for i in range(20))


def test_all_alike_is_one_cluster_decided_by_position(world):
    world.forward["last_state"][:] = world.forward["last_state"][3]
    scored = world.run(Semdedup())
    assert set(scored.artefacts["cluster_labels"]) == {0}
    assert top_k(scored.scores, 1).rows.tolist() == [0]
    # One is kept first; all others are copies of it, up to rounding of a float32 cosine.
    np.testing.assert_allclose(np.sort(scored.scores)[:-1], -1, atol=1e-6)


def test_a_pool_smaller_than_the_clusters_has_one(new_world):
    scored = new_world("tiny", n=5).run(Semdedup())
    assert scored.artefacts["cluster_labels"].tolist() == [0] * 5
    assert scored.notes == ("1 clusters of 5 to 5 samples",)


@pytest.mark.parametrize("wrong", [{"n_clusters": 0}, {"n_iter": 0}])
def test_impossible_settings(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**wrong)
