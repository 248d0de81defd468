"""COINCIDE: every equation against the quadratic definition, and clusters of every kind."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava.errors import DataError, UsageError
from selection.methods import coincide
from selection.methods.base import stream
from selection.methods.coincide import (
    Coincide,
    Settings,
    check_sizes,
    greedy_mmd,
    kernel,
    transferability,
    water_fill,
)
from selection.rules.budget import top_k


def unit_rows(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("rows", [3, 1024])
def test_transferability_is_the_mean_cosine_to_other_skills(rows, monkeypatch):
    monkeypatch.setattr(coincide, "_ROWS", rows)
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(20, 4)).astype(np.float32)
    centroids[7] = 2 * centroids[3]  # a near copy
    unit = unit_rows(centroids.astype(np.float64))
    slow = []
    for i in range(20):
        cosines = [float(unit[i] @ unit[j]) for j in range(20) if j != i]
        slow.append(np.mean([c for c in cosines if c <= 0.9]))
    np.testing.assert_allclose(transferability(centroids), slow, atol=1e-6)


def test_transferability_where_all_or_none_are_copies():
    assert transferability(np.ones((3, 4), np.float32)).tolist() == [1, 1, 1]  # collapsed
    assert transferability(np.ones((1, 4), np.float32)).tolist() == [1]
    found = transferability(np.array([[0, 0], [1, 0], [0, 1]], np.float32))
    np.testing.assert_allclose(found, 0, atol=1e-12)


def test_kernel_is_its_definition():
    vectors = unit_rows(np.random.default_rng(0).normal(size=(7, 5)))
    found = kernel(torch.from_numpy(vectors))
    for i in range(7):
        for j in range(7):
            square = sum((a - b) ** 2 for a, b in zip(vectors[i], vectors[j], strict=True))
            assert found[i, j] == pytest.approx(math.exp(-square / 2), abs=1e-12)


def slow_fill(logits, sizes, k):
    """The released loop, with ratios as they are, then again among clusters with room."""
    filled = [0] * len(sizes)
    while k:
        room = [i for i in range(len(sizes)) if filled[i] < sizes[i]]
        room.sort(key=lambda i: -logits[i])
        ratios = [math.exp(logits[i] - max(logits)) for i in room]
        for place, i in enumerate(room):
            wanted = round(k * ratios[place] / sum(ratios[place:]))
            given = min(wanted, sizes[i] - filled[i], k)
            filled[i] += given
            k -= given
    return filled


def test_water_filling_is_the_released_loop_and_exact():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 9))
        sizes = rng.integers(0, 12, n)
        logits = rng.normal(size=n).round(1) * rng.choice([0.1, 3.0])
        k = int(rng.integers(0, sizes.sum() + 1))
        found = water_fill(logits, sizes, k)
        assert found.sum() == k and (found <= sizes).all() and (found >= 0).all()
        assert found.tolist() == slow_fill(logits, sizes, k)


def test_water_filling_of_extreme_shares():
    assert water_fill(np.array([700.0, -700.0, 0.0]), np.array([2, 5, 5]), 9).tolist() == [2, 2, 5]
    assert water_fill(np.zeros(4), np.array([9, 9, 9, 9]), 2).tolist() == [0, 1, 0, 1]
    assert water_fill(np.zeros(0), np.zeros(0, np.int64), 0).tolist() == []


def slow_mmd_order(similar, n):
    """The quadratic definition: MMD^2 of every candidate set from its own blocks of the kernel."""
    picked = []
    for _ in range(n):
        best, best_value = None, math.inf
        for c in range(len(similar)):
            if c in picked:
                continue
            chosen = [*picked, c]
            value = similar.mean() + similar[np.ix_(chosen, chosen)].mean()
            value -= 2 * similar[:, chosen].mean()
            if value < best_value - 1e-13:  # below that the sums' rounding decides
                best, best_value = c, value
        picked.append(best)
    return picked


@pytest.mark.parametrize("size", [1, 2, 13, 40])
def test_incremental_mmd_picks_what_the_definition_picks(size):
    rng = np.random.default_rng(size)
    for copies in (False, True):
        vectors = unit_rows(rng.normal(size=(size, 6)) + 1)
        if copies:
            vectors[size // 2 :] = vectors[: size - size // 2]
        similar = kernel(torch.from_numpy(vectors))
        assert greedy_mmd(similar, size).tolist() == slow_mmd_order(similar, size)


def test_mmd_of_equal_members_takes_them_in_order():
    assert greedy_mmd(np.ones((5, 5)), 5).tolist() == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------- whole method


def run(world, k=45, **settings):
    """Scores for budget `k`, artefacts too."""
    return Coincide(Settings(**settings)).run(replace(world.context(), k=k), 0, None)


def vectors_of(world):
    parts = [world.others["blocks"][name].astype(np.float64) for name in ("vision", "language")]
    return unit_rows(np.hstack(parts))


@pytest.mark.parametrize("k", [1, 45, 150])
def test_the_subset_is_the_slow_pipeline_over_the_reported_clusters(world, k):
    scored = run(world, k, temperature=0.5)
    labels, table = scored.artefacts["cluster_labels"], scored.artefacts["clusters"]
    vectors, chosen = vectors_of(world), []
    assert table["size"] == np.bincount(labels).tolist() and len(table["size"]) == 2
    for cluster, share in enumerate(table["share"]):
        rows = np.flatnonzero(labels == cluster)
        similar = kernel(torch.from_numpy(vectors[rows]))
        assert table["density"][cluster] == pytest.approx(similar.mean(), abs=1e-6)
        chosen += rows[slow_mmd_order(similar, share)].tolist()
    logits = np.array(table["transferability"]) / (np.array(table["density"]) * 0.5)
    assert table["share"] == water_fill(logits, np.array(table["size"]), k).tolist()
    assert top_k(scored.scores, k).rows.tolist() == sorted(chosen)
    assert (scored.scores >= -1).sum() == k


def test_transferability_reads_the_language_half_of_the_centroids(world):
    plain = run(world).artefacts["clusters"]
    context = world.context()
    keys = context.keys(stream(0, "coincide", "score"))
    made = coincide.cluster_rows(
        context.readers["blocks"], coincide.COLUMNS, np.ones(150, bool), keys, 10_000, 50
    )
    width = world.others["blocks"]["vision"].shape[1]
    slow = transferability(made.centroids[:, width:])
    np.testing.assert_allclose(plain["transferability"], slow)


def test_all_alike_is_one_cluster_taken_in_order(world):
    for column in world.others["blocks"].values():
        column[:] = column[3]
    scored = run(world, 20)
    assert scored.artefacts["clusters"]["size"] == [150]
    assert top_k(scored.scores, 20).rows.tolist() == list(range(20))


def test_a_pool_smaller_than_the_clusters(new_world):
    scored = run(new_world("tiny", n=5), 3)
    assert top_k(scored.scores, 3).cut >= -1


def test_too_large_a_cluster_is_refused():
    check_sizes(np.array([2**14, 3]))
    with pytest.raises(DataError, match="16385 of 16388 samples into one of 2 .*--n_clusters"):
        check_sizes(np.array([2**14 + 1, 3]))


@pytest.mark.parametrize(
    "wrong", [{"n_layers": 0}, {"n_clusters": 0}, {"n_iter": 0}, {"temperature": 0.0}]
)
def test_impossible_settings(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**wrong)
