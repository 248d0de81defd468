"""Spectral clustering that scales: a nearest-neighbour graph and a few of its eigenvectors.

    neighbours   each row's k nearest by cosine, itself left out; exact, every pair (faiss)
    affinity     w_ij = (1 + cos) / 2 for neighbours, symmetric by the mean of both directions
    Laplacian    L = I - D^-1/2 W D^-1/2
    embedding    its M lowest eigenvectors: LOBPCG with an algebraic multigrid preconditioner
                 (Knyazev 2001, pyamg), dense for small graphs; divided by sqrt(degree). Lanczos
                 (scipy's eigsh) is faster and was found to miss one of several nearly equal ones
    labels       pivoted QR of the embedding (Damle, Minden and Ying 2019): no restarts, no seed

The result is that of scikit-learn's SpectralClustering(assign_labels="cluster_qr") on the same
affinity, in memory that grows with n (D + k); of the time only the neighbours' grows with n^2.
Equal rows count once, and a part of the graph without a way out is linked to the largest one, so
that a few repeated samples do not use up the clusters. The number of threads changes no label: only
the neighbours use more than one, each on rows of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import faiss
import numpy as np
import pyamg
import scipy.sparse as sp
import xxhash
from scipy.linalg import eigh, qr, svd
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import lobpcg
from threadpoolctl import threadpool_limits

from llava.errors import DataError
from selection.vectors.stream import unit_rows

N_NEIGHBOURS = 30
BLOCK = 4096  # rows whose neighbours one thread looks for at a time
DENSE = 1500  # rows up to which all eigenvectors are computed at once
GUARD = 8  # more vectors than are asked for, for faster convergence
TOLERANCE = 1e-5  # largest residual |L v - lambda v| of a vector that is asked for
ROUND = 10  # iterations between two looks at the residuals
MAX_ROUNDS = 50


def spectral_clusters(
    rows: np.ndarray, n_clusters: int, n_neighbours: int = N_NEIGHBOURS, seed: int = 0
) -> np.ndarray:
    """Cluster of every row of `rows` (n, D) float32, 0 to `n_clusters` - 1, (n,) int32.

    Only directions count; rows of zeros are equal to one another. With no more distinct rows than
    clusters every distinct row is its own. `seed` starts the eigensolver and changes rounding only.
    DataError where the eigensolver does not converge.
    """
    distinct, member = distinct_rows(unit_rows(rows))
    if len(distinct) <= n_clusters:
        return member.astype(np.int32)
    with threadpool_limits(1, "blas"):  # sums depend on how many threads share them
        graph = connected(affinity(distinct, n_neighbours), distinct, n_neighbours)
        return cluster_qr(embedding(graph, n_clusters, seed)).astype(np.int32)[member]


def distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct of `rows` (n, D) in the order of their first, (u, D), and which each is (n,)."""
    hashes = b"".join(xxhash.xxh3_128_digest(row) for row in np.ascontiguousarray(rows))
    _, first, member = np.unique(
        np.frombuffer(hashes, "V16"), return_index=True, return_inverse=True
    )
    rank = np.argsort(np.argsort(first))
    return rows if len(first) == len(rows) else rows[np.sort(first)], rank[member]


def affinity(rows: np.ndarray, n_neighbours: int) -> sp.csr_matrix:
    """Symmetric (n, n) weights in 0..1 of each unit row (n, D) with its nearest others."""
    k = min(n_neighbours, len(rows) - 1)
    cosines, ids = nearest(rows, rows, k + 1)
    itself = ids == np.arange(len(rows))[:, None]
    itself[~itself.any(1), -1] = True  # pushed out by equal ones: the farthest goes instead
    weights = (1 + cosines[~itself].clip(-1, 1)) / 2
    starts = np.arange(len(rows) + 1) * k
    directed = sp.csr_matrix((weights, ids[~itself], starts), shape=(len(rows),) * 2, dtype=float)
    return ((directed + directed.T) / 2).tocsr()


def nearest(rows: np.ndarray, others: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (n, k) of each unit row (n, D) with its `k` nearest `others`, and which they are.

    Each block of rows is one thread's, so that rounding does not depend on their number.
    """

    def search(start: int) -> tuple[np.ndarray, np.ndarray]:
        part = rows[start : start + BLOCK]
        return faiss.knn(part, others, k, metric=faiss.METRIC_INNER_PRODUCT)

    n_threads = faiss.omp_get_max_threads()
    with ThreadPoolExecutor(n_threads, "", faiss.omp_set_num_threads, (1,)) as pool:
        cosines, ids = zip(*pool.map(search, range(0, len(rows), BLOCK)), strict=True)
    return np.concatenate(cosines), np.concatenate(ids)


def connected(graph: sp.csr_matrix, rows: np.ndarray, n_links: int) -> sp.csr_matrix:
    """`graph` (n, n) with every smaller component linked to the largest one.

    The row nearest to the component's mean is linked to its `n_links` nearest there.
    """
    n_parts, part = connected_components(graph, directed=False)
    if n_parts == 1:
        return graph
    largest = np.bincount(part).argmax()
    inside = np.flatnonzero(part == largest)
    centres = np.array([_centre(rows, np.flatnonzero(part == p)) for p in range(n_parts)])
    centres = np.delete(centres, largest)
    k = min(n_links, len(inside))
    cosines, places = nearest(rows[centres], rows[inside], k)
    pairs = np.repeat(centres, k), inside[places.ravel()]
    weights = (1 + cosines.ravel().clip(-1, 1)) / 4  # the mean of one direction and none
    links = sp.coo_matrix((weights, pairs), shape=graph.shape)
    return (graph + links + links.T).tocsr()


def _centre(rows: np.ndarray, members: np.ndarray) -> int:
    return int(members[np.argmax(rows[members] @ rows[members].mean(0))])


def embedding(graph: sp.csr_matrix, n_vectors: int, seed: int = 0) -> np.ndarray:
    """Lowest eigenvectors of the normalised Laplacian over sqrt(degree), (n, n_vectors) float64."""
    scale = 1 / np.sqrt(np.asarray(graph.sum(1)).ravel())
    laplacian = sp.eye(len(scale)) - sp.diags(scale) @ graph @ sp.diags(scale)
    if len(scale) <= max(DENSE, 5 * (n_vectors + GUARD)):
        vectors = eigh(laplacian.toarray(), subset_by_index=[0, n_vectors - 1])[1]
    else:
        vectors = _lowest(laplacian.tocsr(), scale, n_vectors, seed)
    return vectors * scale[:, None]


def _lowest(laplacian: sp.csr_matrix, scale: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The `n` lowest eigenvectors; the first of them is known, 1 / `scale`."""
    vectors = np.random.default_rng(seed).standard_normal((len(scale), n + GUARD))
    vectors[:, 0] = 1 / scale
    with _own_randomness(seed):
        shifted = laplacian + 1e-5 * sp.eye(len(scale))  # the multigrid needs it regular
        solver = pyamg.smoothed_aggregation_solver(shifted.tocsr(), B=(1 / scale)[:, None])
    for _ in range(MAX_ROUNDS):  # the guards would take several times as long to converge
        values, vectors = _improved(laplacian, vectors, solver)
        lowest = vectors[:, :n]
        residual = np.linalg.norm(laplacian @ lowest - lowest * values[:n], axis=0).max()
        if residual <= TOLERANCE:
            return lowest
    raise DataError(
        f"spectral clusters: residual {residual:.1e} of the eigenvectors after "
        f"{MAX_ROUNDS * ROUND} iterations, wanted {TOLERANCE}; ask for more neighbours or "
        "another number of clusters"
    )


def _improved(
    laplacian: sp.csr_matrix, vectors: np.ndarray, solver: pyamg.multilevel.MultilevelSolver
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and vectors after a round of LOBPCG from `vectors` (n, m)."""
    with warnings.catch_warnings():  # of what has not converged, the guards mostly
        warnings.simplefilter("ignore", UserWarning)
        values, vectors = lobpcg(
            laplacian,
            vectors,
            M=solver.aspreconditioner(),
            tol=TOLERANCE,
            largest=False,
            maxiter=ROUND,
        )
    order = np.argsort(values, kind="stable")
    return values[order], vectors[:, order]


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """pyamg draws from NumPy's global generator: here from one of its own."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def cluster_qr(vectors: np.ndarray) -> np.ndarray:
    """Cluster of each row of `vectors` (n, M): of M rows far apart, the one it points along."""
    n_clusters = vectors.shape[1]
    chosen = qr(vectors.T, pivoting=True, mode="economic")[2][:n_clusters]
    left, _, right = svd(vectors[chosen].T)
    return np.abs(vectors @ (left @ right)).argmax(1)
