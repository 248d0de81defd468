"""COINCIDE after clustering: picks inside a cluster against the definition, and a whole pool.

    python benchmarks/coincide.py [--rows 66530] [--width 20480] [--dir DIR]

First, greedy MMD on clusters of 300 members with a share of 60: the definition as the authors run
it, which takes K_XY and K_YY of every candidate set anew at each pick (O(n^2 M^2), vectorised), and
the running sums of selection.methods.coincide. Both must pick the same samples; time is the
smallest of the repeats. Target: 50 times.

Then a store of --rows x --width halves (TinyLLaVA-2B: 2 x 5 layers x 2048) in clusters of 66
(LLaVA-665K in 10,000), dropped from the file cache and read cluster by cluster: kernels, densities
and the picking order of every cluster; then transferability and shares of 10,000 clusters. Wall and
CPU time for 665,298 rows are extrapolated from the rows done: every cluster costs the same, but a
store that does not fit in memory, 27 GB, is read from disk in pieces of a row. Target: an hour on
two cores. A tenth of the rows takes a minute, and 2.7 GB of disk.

Last, k-means to 10,000 clusters, which comes before: CPU time of its 50 iterations, extrapolated
from an iteration on 8,192 rows to 1,000 clusters.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from selection.methods.coincide import (
    COLUMNS,
    _densities_and_orders,
    greedy_mmd,
    kernel,
    transferability,
    water_fill,
)
from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter
from selection.vectors.kmeans import spherical_kmeans

LLAVA_665K, N_CLUSTERS, N_ITER = 665_298, 10_000, 50
BLOCK_SIZE = 1024
Result = TypeVar("Result")


def definition(similar: np.ndarray, n: int) -> np.ndarray:
    """MMD^2 of every candidate set from its own blocks of the kernel, all candidates at once."""
    picked: list[int] = []
    left = np.arange(len(similar))
    for _ in range(n):
        sets = np.hstack([np.tile(picked, (len(left), 1)).astype(int), left[:, None]])
        spread = similar[sets[:, :, None], sets[:, None, :]].mean(axis=(1, 2))
        across = similar[:, sets].mean(axis=(0, 2))
        best = int((spread - 2 * across).argmin())
        picked.append(int(left[best]))
        left = np.delete(left, best)
    return np.array(picked)


def best_of(repeats: int, work) -> tuple[float, np.ndarray]:
    found = np.inf
    for _ in range(repeats):
        begun = time.perf_counter()
        result = work()
        found = min(found, time.perf_counter() - begun)
    return found, result


def compare_picks(n: int, share: int, n_clusters: int) -> None:
    slow_total = fast_total = 0.0
    for seed in range(n_clusters):
        vectors = np.random.default_rng(seed).normal(size=(n, 64)) + 1
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        similar = kernel(torch.from_numpy(vectors))
        slow, wanted = best_of(1, lambda k=similar: definition(k, share))
        fast, found = best_of(5, lambda k=similar: greedy_mmd(k, share))
        assert found.tolist() == wanted.tolist()
        slow_total, fast_total = slow_total + slow, fast_total + fast
    print(
        f"{n_clusters} clusters of {n}, {share} picks: definition {slow_total:.2f} s, running sums "
        f"{fast_total * 1000:.1f} ms: {slow_total / fast_total:.0f} times, same picks"
    )


def write_store(folder: Path, n_rows: int, width: int) -> StoreReader:
    columns = [Column(name, (width // 2,), "float16") for name in COLUMNS]
    key = StoreKey("blocks", {"made": "up"}, np.arange(n_rows), columns)
    writer = StoreWriter.open(folder, key, BLOCK_SIZE)
    rng = np.random.default_rng(0)
    base = rng.standard_normal((BLOCK_SIZE, width), dtype=np.float32).astype(np.float16)
    for i in writer.missing_blocks():
        block = np.roll(base, i, axis=0)[: len(writer.block_rows(i))]
        writer.write_block(i, dict(zip(COLUMNS, np.split(block, 2, axis=1), strict=True)))
    writer.finish()
    return StoreReader.open(writer.folder)


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages (they are synced, so it can)."""
    for path in folder.glob("block-*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(work: Callable[[], Result]) -> tuple[np.ndarray, Result]:
    """Wall and CPU seconds of `work()`, (2,), and what it returns."""
    begun = np.array([time.perf_counter(), time.process_time()])
    result = work()
    return np.array([time.perf_counter(), time.process_time()]) - begun, result


def iteration_seconds(width: int, n_rows: int = 8192, k: int = 1000) -> float:
    """CPU of an iteration of k-means of LLaVA-665K to 10,000 clusters, from the second with `k` on
    `n_rows` made-up vectors: an iteration is a product of rows and centroids.

    The second: faiss stops where nothing changes, and few rows converge within three.
    """
    sample = np.random.default_rng(0).standard_normal((n_rows, width), np.float32)
    sample /= np.linalg.norm(sample, axis=1, keepdims=True)
    few, many = (seconds(lambda n=n: spherical_kmeans(sample, k, n))[0][1] for n in (1, 2))
    return (many - few) * LLAVA_665K / n_rows * N_CLUSTERS / k


def whole(folder: Path, n_rows: int, width: int) -> None:
    reader = write_store(folder, n_rows, width)
    n_clusters = max(1, n_rows * N_CLUSTERS // LLAVA_665K)
    labels = np.random.default_rng(1).integers(n_clusters, size=n_rows)
    drop_from_cache(reader.folder)
    inside, (densities, orders) = seconds(lambda: _densities_and_orders(reader, labels, n_clusters))
    print(f"{n_rows} x {width} halves, {len(orders)} clusters: {shown(inside)}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    centroids = np.random.default_rng(2).standard_normal((N_CLUSTERS, width // 2), np.float32)

    def share() -> np.ndarray:
        logits = transferability(centroids) / (0.1 * np.resize(densities, N_CLUSTERS))
        sizes = np.full(N_CLUSTERS, LLAVA_665K // N_CLUSTERS)
        return water_fill(logits, sizes, LLAVA_665K // 5)

    between, shares = seconds(share)
    print(f"transferability and shares of {N_CLUSTERS}: {shown(between)}, {shares.sum()} chosen")
    total = inside * LLAVA_665K / n_rows + between
    print(f"extrapolated to {LLAVA_665K} rows: {shown(total)} (target 3600 s)")
    print(f"peak memory: {peak:.2f} GB; load {os.getloadavg()[0]:.0f}", flush=True)
    each = iteration_seconds(width)
    print(f"k-means to {N_CLUSTERS} before it: {N_ITER} x {each / 60:.0f} CPU minutes")


def shown(times: np.ndarray) -> str:
    return f"{times[0]:.0f} s, {times[1]:.0f} s CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=66_530, help="rows of the store")
    parser.add_argument("--width", type=int, default=20_480, help="values a row, both columns")
    parser.add_argument("--clusters", type=int, default=3, help="clusters of 300 to compare on")
    parser.add_argument("--dir", type=Path, help="where to write the store (default: temporary)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    compare_picks(300, 60, args.clusters)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        whole(Path(folder), args.rows, args.width)


if __name__ == "__main__":
    main()
