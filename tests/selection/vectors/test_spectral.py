"""Spectral clustering: scikit-learn's result on small graphs, planted clusters on large ones."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from llava.errors import DataError
from selection.vectors import spectral
from selection.vectors.spectral import (
    affinity,
    connected,
    distinct_rows,
    embedding,
    nearest,
    spectral_clusters,
)
from selection.vectors.stream import unit_rows


def planted(n: int, n_clusters: int, width: int = 24, noise: float = 0.15, seed: int = 0):
    """Unit rows (n, width) around random directions, and whose direction each is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_clusters, size=n)
    centres = unit_rows(rng.normal(size=(n_clusters, width)).astype(np.float32))
    rows = centres[labels] + noise * rng.normal(size=(n, width)).astype(np.float32)
    return unit_rows(rows), labels


def slow_affinity(rows: np.ndarray, k: int) -> np.ndarray:
    n, weights = len(rows), np.zeros((len(rows),) * 2)
    for i in range(n):
        cosines = rows @ rows[i]
        others = [j for j in np.argsort(-cosines, kind="stable") if j != i][:k]
        for j in others:
            weights[i, j] = (1 + cosines[j]) / 2
    return (weights + weights.T) / 2


@pytest.mark.parametrize("block", [spectral.BLOCK, 7])
def test_affinity_is_the_definition(monkeypatch, block):
    monkeypatch.setattr(spectral, "BLOCK", block)
    rows, _ = planted(80, 4)
    for k in (3, 10, 79, 200):
        np.testing.assert_allclose(affinity(rows, k).toarray(), slow_affinity(rows, k), atol=1e-6)


@pytest.mark.parametrize("n_clusters", [2, 5, 8])
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_equals_scikit_learn_on_small_graphs(n_clusters, noise):
    rows, _ = planted(400, n_clusters, noise=noise)
    graph = connected(affinity(rows, 15), rows, 15)
    theirs = SpectralClustering(n_clusters, affinity="precomputed", assign_labels="cluster_qr")
    expected = theirs.fit_predict(graph.toarray())
    assert adjusted_rand_score(spectral_clusters(rows, n_clusters, 15), expected) > 0.99


@pytest.mark.parametrize("iterations", [spectral.ROUND, 2])
def test_the_iterative_solver_finds_what_the_dense_one_does(monkeypatch, iterations):
    monkeypatch.setattr(spectral, "ROUND", iterations)
    rows, _ = planted(1400, 6, noise=0.25)
    dense = spectral_clusters(rows, 6, 15)
    monkeypatch.setattr(spectral, "DENSE", 0)
    iterative = spectral_clusters(rows, 6, 15)
    assert adjusted_rand_score(iterative, dense) > 0.99
    graph = connected(affinity(rows, 15), rows, 15)
    first = spectral.embedding(graph, 6)
    monkeypatch.setattr(spectral, "DENSE", 10**6)
    second = spectral.embedding(graph, 6)
    scale = np.sqrt(np.asarray(graph.sum(1)))
    overlap = np.linalg.svd((first * scale).T @ (second * scale))[1]
    np.testing.assert_allclose(overlap, 1, atol=1e-3)  # cosines of the angles between the spaces


def test_what_does_not_converge_is_an_error_and_what_does_is_silent(monkeypatch):
    monkeypatch.setattr(spectral, "DENSE", 0)
    rows, _ = planted(600, 4, noise=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        spectral_clusters(rows, 4)
        monkeypatch.setattr(spectral, "ROUND", 1)
        monkeypatch.setattr(spectral, "MAX_ROUNDS", 2)
        with pytest.raises(DataError, match=r"residual \d.* after 2 iterations, wanted 1e-05"):
            spectral_clusters(rows, 4)


def test_finds_planted_clusters_among_twenty_thousand_rows():
    rows, labels = planted(20_000, 20, width=48, noise=0.12)
    found = spectral_clusters(rows, 20)
    assert adjusted_rand_score(found, labels) > 0.99
    assert set(found) == set(range(20)) and found.dtype == np.int32


def test_deterministic_and_blind_to_the_global_generator(monkeypatch):
    monkeypatch.setattr(spectral, "DENSE", 0)
    rows, _ = planted(1000, 4, noise=0.3)
    np.random.seed(1)
    before = np.random.get_state()[1].tobytes()
    first = spectral_clusters(rows, 4)
    assert np.random.get_state()[1].tobytes() == before
    np.random.seed(2)
    np.testing.assert_array_equal(spectral_clusters(rows, 4), first)
    other = spectral_clusters(rows, 4, seed=7)
    assert adjusted_rand_score(other, first) > 0.99


@pytest.mark.bits
def test_the_number_of_threads_changes_no_bit(monkeypatch):
    rows, _ = planted(2000, 20, width=600, noise=0.1)
    cosines, vectors, labels = [], [], []

    def kept(*given):
        vectors.append(embedding(*given))
        return vectors[-1]

    monkeypatch.setattr(spectral, "embedding", kept)
    for n_threads in (1, 2):
        with threadpool_limits(n_threads):
            cosines.append(nearest(rows, rows, 5)[0])
            labels.append(spectral_clusters(rows, 20))
    for both in (cosines, vectors, labels):
        np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("dense", [0, 1500])
def test_a_disconnected_graph(monkeypatch, dense):
    monkeypatch.setattr(spectral, "DENSE", dense)
    rows, labels = planted(600, 6, noise=0.01)
    graph = affinity(rows, 10)
    assert connected_components(graph)[0] >= 6
    linked = connected(graph, rows, 10)
    assert connected_components(linked)[0] == 1
    assert abs(linked - linked.T).max() < 1e-12
    assert adjusted_rand_score(spectral_clusters(rows, 6, 10), labels) > 0.99


def test_more_parts_than_clusters():
    rows, labels = planted(600, 12, noise=0.01)
    found = spectral_clusters(rows, 4, 10)
    assert set(found) == set(range(4))
    for label in range(12):  # no part is torn
        assert len(set(found[labels == label])) == 1


def test_duplicates_share_a_cluster_and_do_not_use_one_up():
    rows, labels = planted(400, 4)
    copies = np.repeat(rows[:2], 60, axis=0)  # more copies than neighbours: a part of its own
    found = spectral_clusters(np.concatenate([copies, rows]), 4)
    for i in range(2):
        assert set(found[60 * i : 60 * (i + 1)]) == {found[120 + i]}
    np.testing.assert_array_equal(found[120:], spectral_clusters(rows, 4))
    assert adjusted_rand_score(found[120:], labels) > 0.99


def test_few_equal_or_zero_rows():
    rows = np.eye(3, 5, dtype=np.float32)[[2, 0, 2, 1]]
    assert spectral_clusters(rows, 20).tolist() == [0, 1, 0, 2]
    assert spectral_clusters(3 * rows, 20).tolist() == [0, 1, 0, 2]  # only directions count
    assert spectral_clusters(np.ones((50, 4), np.float32), 20).tolist() == [0] * 50
    zeros, _ = planted(100, 3)
    zeros[::2] = 0
    assert len(set(spectral_clusters(zeros, 3)[::2])) == 1
    assert distinct_rows(rows)[1].tolist() == [0, 1, 0, 2]
