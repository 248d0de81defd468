"""Spherical k-means: known clusters are found, none is empty, bits do not depend on threads."""

import faiss
import numpy as np
import pytest
import torch

from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter
from selection.vectors import kmeans as cluster
from selection.vectors import stream
from selection.vectors.kmeans import cluster_groups, nearest, spherical_kmeans


def unit_rows(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def blobs():
    """60 unit vectors around each of 5 far-apart directions, and which direction each is near."""
    rng = np.random.default_rng(1)
    centres = np.eye(5, 16)
    truth = np.repeat(np.arange(5), 60)
    return unit_rows(centres[truth] + 0.05 * rng.normal(size=(300, 16))), truth


def store_of(folder, vectors, block_size=64):
    columns = [Column("v", vectors.shape[1:], vectors.dtype.name)]
    identity = {"block_size": block_size}
    key = StoreKey("v", identity, np.arange(len(vectors)), columns)
    writer = StoreWriter.open(folder, key, block_size)
    for i in writer.missing_blocks():
        writer.write_block(i, {"v": vectors[writer.block_rows(i)]})
    writer.finish()
    return StoreReader.open(writer.folder)


def test_known_clusters_are_found_by_the_best_of_ten_seeds(blobs):
    vectors, truth = blobs
    fits = {}
    for seed in range(10):
        products = vectors @ spherical_kmeans(vectors, 5, 20, seed).T
        fits[products.max(axis=1).sum()] = products.argmax(axis=1)
    labels = fits[max(fits)]
    pairs = set(zip(labels.tolist(), truth.tolist(), strict=True))
    assert len(pairs) == len({label for label, _ in pairs}) == 5


def test_centroids_are_normalised_means_of_their_members(blobs):
    """Lloyd's fixed point, by a slow loop; converged blobs, so one more step changes nothing."""
    vectors, _ = blobs
    centroids = spherical_kmeans(vectors, 5, 30, seed=0)
    labels = [int(np.argmax([float(v @ c) for c in centroids])) for v in vectors]
    for label, centroid in enumerate(centroids):
        members = [v for v, mine in zip(vectors, labels, strict=True) if mine == label]
        mean = np.mean(members, axis=0)
        np.testing.assert_allclose(centroid, mean / np.linalg.norm(mean), atol=1e-5)


def test_no_cluster_is_empty_even_when_faiss_leaves_some():
    """40 copies of three vectors: more clusters than distinct vectors are reduced to three."""
    distinct = unit_rows(np.random.default_rng(0).normal(size=(3, 8)))
    centroids = spherical_kmeans(distinct[np.arange(120) % 3], 10, 5, seed=0)
    assert len(centroids) == 3
    best = (distinct @ centroids.T).max(axis=1)
    np.testing.assert_allclose(best, 1, atol=1e-6)


def test_an_empty_cluster_moves_to_the_vector_that_is_served_worst():
    a, b, c = np.eye(3, dtype=np.float32)
    near_b = unit_rows(b + 0.1 * a)
    sample = np.stack([a, a, near_b, c, b])
    repaired = cluster._fill_empty(sample, np.stack([a, b, b]))
    np.testing.assert_array_equal(repaired, np.stack([a, b, c]))


def test_fewer_vectors_than_clusters():
    vectors = unit_rows(np.random.default_rng(0).normal(size=(4, 8)))
    assert len(spherical_kmeans(vectors, 10)) == 4


def test_nearest_follows_groups_ties_and_missing_values():
    centroids = np.eye(4, dtype=np.float32)
    vectors = np.array(
        [[9, 1, 0, 5], [1, 2, 99, 0], [3, 3, 0, 0], [1, 1, 1, 1], [np.nan, 1, 0, 0], [1, 0, 0, 0]],
        dtype=np.float32,
    )
    groups = np.array([1, 0, 0, -1, 0, 2])
    owner = np.array([0, 0, 1, 1])
    labels = nearest([torch.from_numpy(vectors)], centroids, groups, owner)
    assert labels.tolist() == [3, 1, 0, -1, -1, -1]


@pytest.mark.parametrize("block_size", [7, 64, 300])
def test_groups_are_clustered_apart_and_streaming_equals_one_pass(tmp_path, blobs, block_size):
    vectors, _ = blobs
    groups = np.where(np.arange(300) % 7 == 0, -1, np.arange(300) % 2)
    keys = np.random.default_rng(5).random(300)
    reader = store_of(tmp_path, vectors, block_size)
    found = cluster_groups(reader, ["v"], groups, keys, k=5)
    assert (found.labels[groups < 0] == -1).all()
    inside = groups >= 0
    assert (found.owner[found.labels[inside]] == groups[inside]).all()
    for group in (0, 1):
        mine = np.flatnonzero(found.owner == group)
        rows = np.flatnonzero(groups == group)
        nearest = mine[(vectors[rows] @ found.centroids[mine].T).argmax(axis=1)]
        assert found.labels[rows].tolist() == nearest.tolist()
    whole = cluster_groups(store_of(tmp_path, vectors, 299), ["v"], groups, keys, k=5)
    assert whole.centroids.tobytes() == found.centroids.tobytes()
    assert whole.labels.tolist() == found.labels.tolist()


def test_length_of_a_vector_does_not_matter(tmp_path, blobs):
    vectors, _ = blobs
    # powers of two: scaling is exact, so the labels must be equal and not only alike
    scale = np.float32(2.0) ** np.random.default_rng(2).integers(-9, 9, size=(300, 1))
    groups, keys = np.zeros(300, np.int64), np.arange(300.0)
    plain = cluster_groups(store_of(tmp_path / "a", vectors), ["v"], groups, keys, k=5)
    scaled = cluster_groups(store_of(tmp_path / "b", vectors * scale), ["v"], groups, keys, k=5)
    assert plain.labels.tolist() == scaled.labels.tolist()


def test_rows_that_are_not_finite_neither_move_a_centroid_nor_get_a_label(tmp_path, blobs):
    vectors = blobs[0].copy()
    vectors[3, 2], vectors[8, 0] = np.nan, np.inf
    groups, keys = np.zeros(300, np.int64), np.arange(300.0)
    found = cluster_groups(store_of(tmp_path, vectors), ["v"], groups, keys, k=5)
    assert np.flatnonzero(found.labels < 0).tolist() == [3, 8]
    assert np.isfinite(found.centroids).all()


def test_nothing_to_cluster(tmp_path, blobs):
    groups = np.full(300, -1)
    found = cluster_groups(store_of(tmp_path, blobs[0]), ["v"], groups, np.zeros(300), k=5)
    assert found.centroids.shape == (0, 16) and (found.labels == -1).all()


@pytest.mark.bits
def test_same_bits_for_one_and_two_threads(set_threads):
    sample = unit_rows(np.random.default_rng(0).normal(size=(2000, 700)))
    zeros = np.zeros(2000, np.int64)
    results = set()
    for n_threads in (1, 2):
        set_threads(n_threads)
        faiss.omp_set_num_threads(n_threads)
        centroids = spherical_kmeans(sample, 30, 10, seed=3)
        labels = nearest([torch.from_numpy(sample)], centroids, zeros, zeros[:30])
        results.add(centroids.tobytes() + labels.tobytes())
    faiss.omp_set_num_threads(1)
    assert len(results) == 1


def test_unit_sample_is_what_take_gives(tmp_path, blobs):
    reader = store_of(tmp_path, blobs[0].astype(np.float16))
    taken = stream.unit(stream.take(reader, ["v"], np.array([5, 2]))).numpy()
    np.testing.assert_allclose(taken, blobs[0][[5, 2]], atol=1e-3)  # half precision: 2^-11


def test_many_empty_clusters_are_filled_as_one_at_a_time_from_scratch():
    rng = np.random.default_rng(3)
    sample = unit_rows(rng.normal(size=(200, 6)))
    sample[150:] = sample[:50]  # copies
    centroids = unit_rows(np.repeat(rng.normal(size=(4, 6)), 6, axis=0))  # 4 of 24 have members
    slow = centroids.copy()
    for _ in range(48):
        cosines = sample @ slow.T
        empty = [m for m in range(24) if m not in cosines.argmax(axis=1)]
        if not empty:
            break
        slow[empty[0]] = sample[cosines.max(axis=1).argmin()]
    np.testing.assert_array_equal(cluster._fill_empty(sample, centroids), slow)


def test_a_small_pool_has_fewer_clusters():
    assert cluster.cluster_count(10_000, 665_298) == 10_000
    assert cluster.cluster_count(10_000, 6_400) == 100
    assert cluster.cluster_count(10_000, 3) == 1
    assert cluster.cluster_count(5, 6_400) == 5


@pytest.mark.parametrize("batch_bytes", [1, 2000, 10**6])
def test_members_come_cluster_by_cluster(tmp_path, blobs, batch_bytes, monkeypatch):
    monkeypatch.setattr(cluster, "BATCH_BYTES", batch_bytes)
    vectors = blobs[0]
    labels = np.random.default_rng(0).choice([-1, 0, 2, 7], 300)
    found = list(cluster.members(store_of(tmp_path, vectors), ["v"], labels))
    assert [label for label, _, _ in found] == [0, 2, 7]
    for label, rows, part in found:
        assert rows.tolist() == np.flatnonzero(labels == label).tolist()
        np.testing.assert_array_equal(part.numpy(), vectors[rows])
