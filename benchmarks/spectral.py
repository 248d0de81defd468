"""Spectral clustering beside scikit-learn's: time and peak memory on made-up CLIP features.

    python benchmarks/spectral.py [--rows 133000] [--width 1539] [--reference 5000]

Rows lie around 400 directions of 20 kinds, 20 clusters are asked for. First both at `--reference`
rows, which scikit-learn (arpack on the same graph, its own defaults otherwise) can do, then ours
alone at `--rows`: neighbours, eigenvectors and labels apart. Each part runs in its own process.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np

CLUSTERS, DIRECTIONS = 20, 400


def features(n: int, width: int) -> np.ndarray:
    """Unit rows (n, width) float32, filled a piece at a time."""
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((CLUSTERS, width), np.float32)
    centres = 0.3 * rng.standard_normal((DIRECTIONS, width), np.float32)
    centres += kinds[np.arange(DIRECTIONS) % CLUSTERS]
    rows = np.empty((n, width), np.float32)
    for start in range(0, n, 4096):
        part = rows[start : start + 4096]
        part[:] = centres[rng.integers(DIRECTIONS, size=len(part))]
        part += 1.5 * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def ours(n: int, width: int) -> None:
    """The steps of `spectral_clusters`, timed."""
    from selection import spectral

    rows = features(n, width)
    times = [time.monotonic()]
    distinct, _ = spectral.distinct_rows(rows)
    del rows
    graph = spectral.affinity(distinct, spectral.N_NEIGHBOURS)
    times.append(time.monotonic())
    graph = spectral.connected(graph, distinct, spectral.N_NEIGHBOURS)
    vectors = spectral.embedding(graph, CLUSTERS)
    times.append(time.monotonic())
    labels = spectral.cluster_qr(vectors)
    times.append(time.monotonic())
    parts = zip(("neighbours", "eigenvectors", "labels"), np.diff(times), strict=True)
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts)
    print(f"ours, {n} x {width}: {times[-1] - times[0]:.1f} s ({told}), {_peak()}")
    print(f"  clusters of {np.bincount(labels).min()} to {np.bincount(labels).max()} rows")


def reference(n: int, width: int) -> None:
    """scikit-learn's SpectralClustering on its own nearest-neighbour graph."""
    from sklearn.cluster import SpectralClustering

    rows = features(n, width)
    started = time.monotonic()
    SpectralClustering(
        CLUSTERS,
        affinity="nearest_neighbors",
        n_neighbors=30,
        assign_labels="discretize",
        random_state=0,
    ).fit(rows)
    print(f"scikit-learn, {n} x {width}: {time.monotonic() - started:.1f} s, {_peak()}")


def _peak() -> str:
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=133_000)
    parser.add_argument("--width", type=int, default=1539)
    parser.add_argument("--reference", type=int, default=5000)
    parser.add_argument("--part", choices=("ours", "reference"))
    args = parser.parse_args()
    if args.part:
        globals()[args.part](args.rows, args.width)
        return
    for part, n in (("reference", args.reference), ("ours", args.reference), ("ours", args.rows)):
        flags = ["--part", part, "--rows", str(n), "--width", str(args.width)]
        subprocess.run([sys.executable, __file__, *flags], check=True)


if __name__ == "__main__":
    main()
