"""Spectral clustering beside scikit-learn's: time, peak memory and agreement on made-up features.

    python benchmarks/spectral.py [--rows 133000] [--width 1539] [--reference 5000]

Features are as CoIDO's: a CLIP image and a text half of length one and three scores in -1..1. All
samples share a mean (CLIP's narrow cone), variances fall as 1/j over the directions, the 20 kinds
have shares of 1/(3 + j), 11 % to 2 %, with 400 topics of very unequal size within them, whose
samples overlap; the last kind is text only, its image half zero. 20 clusters are asked for, first
of scikit-learn (arpack on its own 0-or-1 graph) and of ours at `--reference` rows, then of ours
alone at `--rows`. Each runs in its own process; OMP_NUM_THREADS says with how many threads.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

KINDS, TOPICS, SCORES = 20, 400, 3
MEAN, KIND, TOPIC, SAMPLE = 1.0, 0.7, 0.6, 1.1  # how far each is from what it belongs to
PARTS = ("distinct_rows", "affinity", "connected", "embedding", "cluster_qr")


def features(n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows (n, width) float32 and the kind of each (n,), filled a piece at a time."""
    rng = np.random.default_rng(0)
    half = (width - SCORES) // 2
    scale = np.tile(np.arange(1, half + 1, dtype=np.float32) ** -0.5, 2)
    shares = 1 / (3 + np.arange(KINDS))
    kind_of = np.concatenate([np.arange(KINDS), rng.choice(KINDS, TOPICS - KINDS, p=_sum1(shares))])
    sizes = rng.pareto(2, TOPICS)
    sizes *= (shares / np.bincount(kind_of, sizes))[kind_of]

    def draw(count: int) -> np.ndarray:
        return scale * rng.standard_normal((count, 2 * half), np.float32)

    centres = MEAN * draw(1) + KIND * draw(KINDS)[kind_of] + TOPIC * draw(TOPICS)
    topics = rng.choice(TOPICS, n, p=_sum1(sizes))
    rows = np.empty((n, width), np.float32)
    for start in range(0, n, 4096):
        part, topic = rows[start : start + 4096], topics[start : start + 4096]
        halves = (centres[topic] + SAMPLE * draw(len(part))).reshape(-1, 2, half)
        halves /= np.linalg.norm(halves, axis=2, keepdims=True)
        halves[kind_of[topic] == KINDS - 1, 0] = 0
        part[:, : 2 * half] = halves.reshape(-1, 2 * half)
        part[:, 2 * half :] = (0.3 * rng.standard_normal((len(part), width - 2 * half))).clip(-1, 1)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows, kind_of[topics]


def _sum1(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def ours(rows: np.ndarray) -> np.ndarray:
    """`spectral_clusters`, its parts timed where it calls them."""
    from selection.vectors import spectral

    for name in PARTS:
        setattr(spectral, name, timed(f"  {name}", getattr(spectral, name)))
    return spectral.spectral_clusters(rows, KINDS)


def scikit_learn(rows: np.ndarray) -> np.ndarray:
    """SpectralClustering on its own nearest-neighbour graph, itself among the neighbours."""
    from sklearn.cluster import SpectralClustering

    found = SpectralClustering(
        KINDS,
        affinity="nearest_neighbors",
        n_neighbors=31,
        assign_labels="cluster_qr",
        random_state=0,
    )
    return found.fit_predict(rows)


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, printing its wall and CPU seconds and the peak memory up to its end."""

    def call(*given: Any) -> Any:
        wall, cpu = time.monotonic(), time.process_time()
        result = function(*given)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name}: {wall:.1f} s, CPU {cpu:.1f} s, peak {peak:.2f} GiB", flush=True)
        return result

    return call


def measure(part: str, n: int, width: int, file: str) -> None:
    """Run one side on `n` rows and write its labels to `file`."""
    rows, kinds = features(n, width)
    labels = timed(f"{part}, {n} x {width}", globals()[part])(rows)
    np.save(file, labels)
    sizes, score = np.bincount(labels), adjusted_rand_score(kinds, labels)
    load = os.getloadavg()[1]
    print(f"  clusters of {sizes.min()} to {sizes.max()}, against the kinds {score:.4f}", end=", ")
    print(f"load of the machine {load:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=133_000)
    parser.add_argument("--width", type=int, default=1539)
    parser.add_argument("--reference", type=int, default=5000)
    parser.add_argument("--part", nargs=2, help="ours or scikit_learn, and a file for its labels")
    args = parser.parse_args()
    if args.part:
        measure(args.part[0], args.rows, args.width, args.part[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{i}.npy") for i in range(3)]
        sides = ("scikit_learn", "ours", "ours"), (args.reference, args.reference, args.rows)
        for part, n, file in zip(*sides, files, strict=True):
            flags = ["--part", part, file, "--rows", str(n), "--width", str(args.width)]
            subprocess.run([sys.executable, __file__, *flags], check=True)
            if file == files[1]:
                both = adjusted_rand_score(*map(np.load, files[:2]))
                print(f"adjusted Rand index of the two: {both:.4f}", flush=True)


if __name__ == "__main__":
    main()
