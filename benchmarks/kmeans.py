"""Clusters of a store as large as LLaVA-665K's: time of each step and memory.

    python benchmarks/kmeans.py [--rows 665298] [--width 8192] [--groups 6] [--k 10] [--dir DIR]

Writes a real store (10.9 GB by default, removed at the end), then, as ARDS does it: takes 256 k
vectors of each group, fits spherical k-means to them, and gives every row its nearest centroid in
one pass. Beside it, plain reading of the same files, and Lloyd's algorithm written with NumPy on
the sample of one group, from faiss' final centroids, as a check that they are a fixed point.
Takes about five minutes. Two threads.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

import faiss
import numpy as np
import torch
from score_store import COLUMNS, read, seconds, write_store

from selection.vectors import stream
from selection.vectors.kmeans import POINTS_PER_CENTROID, cluster_groups, nearest, spherical_kmeans


def lloyd_step(sample: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """One iteration of spherical k-means: unit means of the members of each centroid."""
    labels = (sample @ centroids.T).argmax(axis=1)
    means = np.stack([sample[labels == m].sum(axis=0) for m in range(len(centroids))])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def measure(folder: Path, n_rows: int, width: int, n_groups: int, k: int, n_iter: int) -> None:
    reader = write_store(folder, n_rows, width)
    n_bytes = sum(path.stat().st_size for path in reader.folder.glob("block-*"))
    rng = np.random.default_rng(0)
    groups, keys = rng.integers(n_groups, size=n_rows), rng.random(n_rows)
    print(f"{n_rows} x {width} halves, {n_bytes / 1e9:.2f} GB; {n_groups} groups x {k} clusters")

    def take() -> None:
        rows = np.flatnonzero(groups == 0)
        rows = rows[np.argsort(keys[rows])][: POINTS_PER_CENTROID * k]
        made["sample"] = stream.unit(stream.take(reader, COLUMNS, rows)).numpy()

    def fit() -> None:
        made["centroids"] = spherical_kmeans(made["sample"], k, n_iter)

    def label() -> None:
        centroids = np.concatenate([made["centroids"]] * n_groups)
        owner = np.repeat(np.arange(n_groups), len(made["centroids"]))
        for _ in stream.apply(
            reader, COLUMNS, lambda part, rows: nearest(rows, centroids, groups[part], owner)
        ):
            pass

    made: dict[str, np.ndarray] = {}
    steps = {
        "read the files": lambda: read(reader.folder),
        "take the sample of a group": take,
        f"fit it, {n_iter} iterations": fit,
        "label every row": label,
        "all of it": lambda: cluster_groups(reader, COLUMNS, groups, keys, k, n_iter),
    }
    for name, work in steps.items():
        wall, cpu = seconds(work)
        print(f"{name:28} {wall:8.2f} s, {cpu:.2f} s of CPU")
    again = lloyd_step(made["sample"], made["centroids"])
    cosines = (again * made["centroids"]).sum(axis=1)
    print(f"sample of a group: {len(made['sample'])} vectors, {made['sample'].nbytes / 1e9:.2f} GB")
    print(f"one more iteration moves a centroid by at most {1 - cosines.min():.1e} (1 - cosine)")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=665_298, help="rows of the store")
    parser.add_argument("--width", type=int, default=8192, help="values a row, both columns")
    parser.add_argument("--groups", type=int, default=6, help="groups clustered on their own")
    parser.add_argument("--k", type=int, default=10, help="clusters of a group")
    parser.add_argument("--n_iter", type=int, default=20, help="iterations")
    parser.add_argument("--dir", type=Path, help="where to write the store (default: temporary)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        measure(Path(folder), args.rows, args.width, args.groups, args.k, args.n_iter)


if __name__ == "__main__":
    main()
