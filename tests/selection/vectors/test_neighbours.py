"""Nearest neighbours against all distances in double precision, exact and by cells."""

import math

import numpy as np
import pytest

from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter
from selection.vectors import neighbours
from selection.vectors.neighbours import Neighbours


def store_of(folder, vectors, block_size=64):
    columns = [Column("v", vectors.shape[1:], vectors.dtype.name)]
    key = StoreKey("v", {}, np.arange(len(vectors)), columns)
    writer = StoreWriter.open(folder, key, block_size)
    for i in writer.missing_blocks():
        writer.write_block(i, {"v": vectors[writer.block_rows(i)]})
    writer.finish()
    return StoreReader.open(writer.folder)


def nearest_neighbours(reader, names, usable, keys, k, n_probe, normalize):
    graph = Neighbours(reader, names, usable, keys, n_probe, normalize)
    return graph.nearest(np.arange(len(usable)), usable, k)


def slow(vectors, usable, k, normalize):
    vectors = vectors.astype(np.float64)
    if normalize:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids, distances = np.full((len(vectors), k), -1), np.full((len(vectors), k), np.inf)
    for i in np.flatnonzero(usable):
        found = [
            (float(((vectors[i] - vectors[j]) ** 2).sum()), j)
            for j in np.flatnonzero(usable)
            if j != i
        ]
        for place, (distance, j) in enumerate(sorted(found)[:k]):
            ids[i, place], distances[i, place] = j, distance
    return ids, distances


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("candidates", "queries"), [(8192, 2048), (50, 32), (7, 10)])
def test_small_pools_are_exact(tmp_path, normalize, candidates, queries, monkeypatch):
    monkeypatch.setattr(neighbours, "_CANDIDATES", candidates)
    monkeypatch.setattr(neighbours, "_QUERIES", queries)
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(120, 9)) * rng.uniform(1, 9, (120, 1))).astype(np.float32)
    usable = rng.random(120) < 0.9
    ids, distances = nearest_neighbours(
        store_of(tmp_path, vectors), ["v"], usable, rng.random(120), 6, 8, normalize
    )
    slow_ids, slow_distances = slow(vectors, usable, 6, normalize)
    assert ids.tolist() == slow_ids.tolist()
    np.testing.assert_allclose(distances, slow_distances, rtol=1e-5, atol=1e-6)


def test_copies_are_at_distance_zero_however_long(tmp_path):
    vectors = (1000 * np.random.default_rng(0).normal(size=(30, 40))).astype(np.float16)
    vectors[20:] = vectors[:10]
    ids, distances = nearest_neighbours(
        store_of(tmp_path, vectors), ["v"], np.ones(30, bool), np.arange(30.0), 1, 8, False
    )
    assert ids[:10, 0].tolist() == list(range(20, 30)) and (distances[:10] == 0).all()


def test_fewer_others_than_neighbours(tmp_path):
    vectors = np.eye(4, dtype=np.float32)
    usable = np.array([True, False, True, True])
    ids, distances = nearest_neighbours(
        store_of(tmp_path, vectors), ["v"], usable, np.arange(4.0), 3, 8, True
    )
    assert sorted(ids[0, :2].tolist()) == [2, 3] and ids[0, 2] == -1
    assert (ids[1] == -1).all() and np.isinf(distances[1]).all()
    np.testing.assert_allclose(distances[0], [2, 2, np.inf])


def test_cells_find_most_neighbours_and_all_with_all_probed(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT", 100)
    monkeypatch.setattr(neighbours, "CELL", 40)
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(12, 16))
    vectors = (centres[rng.integers(12, size=600)] + 0.5 * rng.normal(size=(600, 16))).astype(
        np.float32
    )
    reader, usable = store_of(tmp_path, vectors), rng.random(600) < 0.95
    exact, _ = slow(vectors, usable, 5, True)
    keys, recall = rng.random(600), {}
    for n_probe in (1, 4, 0):
        ids, distances = nearest_neighbours(reader, ["v"], usable, keys, 5, n_probe, True)
        assert ((ids[usable] >= 0).sum(axis=1) == 5).mean() > 0.99
        assert (
            np.diff(distances[usable], axis=1)[np.isfinite(distances[usable])[:, 1:]] >= 0
        ).all()
        assert not (ids == np.arange(600)[:, None]).any() and (ids[~usable] == -1).all()
        hits = [len(set(a) & set(b)) for a, b in zip(ids[usable], exact[usable], strict=True)]
        recall[n_probe] = np.mean(hits) / 5
    assert recall[1] > 0.6 and recall[4] > 0.95 and recall[0] == 1


def test_some_rows_among_some_others(tmp_path):
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(80, 6)).astype(np.float32)
    usable, among = rng.random(80) < 0.9, rng.random(80) < 0.5
    graph = Neighbours(store_of(tmp_path, vectors), ["v"], usable, np.arange(80.0), 8, True)
    rows = np.flatnonzero(usable)[[9, 2, 30]]
    ids, _ = graph.nearest(rows, among & usable, 4)
    for row, found in zip(rows, ids, strict=True):
        mine = among & usable
        mine[row] = True
        assert found.tolist() == slow(vectors, mine, 4, True)[0][row].tolist()


def test_further_cells_are_searched_where_the_near_ones_are_used_up(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT", 100)
    monkeypatch.setattr(neighbours, "CELL", 20)
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(400, 6)).astype(np.float32)
    graph = Neighbours(
        store_of(tmp_path, vectors), ["v"], np.ones(400, bool), rng.random(400), 2, True
    )
    row, far = 7, np.zeros(400, bool)
    centroids = np.stack([vectors[graph.cells == c].mean(axis=0) for c in np.unique(graph.cells)])
    far[np.isin(graph.cells, np.argsort(centroids @ vectors[row])[:3])] = True
    ids, squares = graph.nearest(np.array([row]), far, 5)
    assert far[ids[0]].all() and len(set(ids[0].tolist())) == 5 and np.isfinite(squares).all()
    assert (graph.nearest(np.array([row]), far & (np.arange(400) < 0), 5)[0] == -1).all()


def test_cells_grow_in_number_with_the_root_of_a_large_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT", 50)
    monkeypatch.setattr(neighbours, "CELL", 2)
    vectors = np.random.default_rng(4).normal(size=(400, 6)).astype(np.float32)
    graph = Neighbours(
        store_of(tmp_path, vectors), ["v"], np.ones(400, bool), np.arange(400.0), 1, True
    )
    assert len(np.unique(graph.cells)) <= math.isqrt(400)
