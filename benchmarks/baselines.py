"""SemDeDup, D2 Pruning and Self-Filter on a store as large as LLaVA-665K's: time and memory.

    python benchmarks/baselines.py [--rows 665298] [--methods d2_pruning] [--dir DIR]

Writes a pool and stores of made-up clustered features, 7.5 GB at full size: states of 2,048 halves,
as TinyLLaVA-2B has, with which SemDeDup and D2 were run on LLaVA-665K, and CLIP ViT-L/14's 2 x 768
for Self-Filter. Then runs each method's whole scoring from the store, every one in a process of its
own: wall and CPU seconds, peak memory, load of the machine; for the two that search neighbours the
share of the true nearest five that the cells have, on 200 rows. Writing is not counted.

SemDeDup runs --n_iter of its 50 iterations of k-means to --n_clusters; the others are extrapolated
to 10,000 clusters from an iteration on 8,192 rows. Below 640,000 rows it has a cluster for every
64, so compare sizes with the same --n_clusters.

Two threads. Target: memory under 8 GB, and no step quadratic in the rows: half the rows
(--rows 332649) must take about half as long, in CPU seconds where the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from coincide import iteration_seconds

from selection.methods import get_method
from selection.methods.base import Context
from selection.pool.pool import Pool
from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter
from selection.vectors import stream
from selection.vectors.neighbours import Neighbours

METHODS = {
    "semdedup": ("last_state",),
    "d2_pruning": ("mean_state",),
    "self_filter": ("image_features", "text_features"),
}
STATES = {"last_state": 2048, "mean_state": 2048}
CLIP = {"image_features": 768, "text_features": 768}
N_DIRECTIONS = 20_000
BLOCK_SIZE = 1024
BUDGET = 0.2


def write_pool(path: Path, n_rows: int) -> None:
    with path.open("w") as file:
        for i in range(n_rows):
            turns = [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": "yes"}]
            file.write(json.dumps({"id": i, "conversations": turns}) + "\n")


def write_store(folder: Path, name: str, n_rows: int, vectors: dict[str, int]) -> None:
    """Columns `vectors` (name, width) around `N_DIRECTIONS` directions, and made-up scalars."""
    columns = [Column(key, (width,), "float16") for key, width in vectors.items()]
    columns += [Column(key, (), "float32") for key in ("nll_mean", "nll_sum", "aum")]
    columns.append(Column("n_tokens", (), "int32"))
    key = StoreKey(name, {}, np.arange(n_rows), columns)
    writer = StoreWriter.open(folder, key, BLOCK_SIZE)
    rng, noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
    centres = {key: torch.randn(N_DIRECTIONS, w, generator=noise) for key, w in vectors.items()}
    noises = {key: torch.randn(BLOCK_SIZE, w, generator=noise) for key, w in vectors.items()}
    for i in writer.missing_blocks():
        n = len(writer.block_rows(i))
        own = torch.from_numpy(rng.integers(N_DIRECTIONS, size=n))
        arrays = {
            key: (centres[key][own] + noises[key].roll(i, dims=1)[:n]).half().numpy()
            for key in vectors
        }
        loss = rng.exponential(20, n).astype(np.float32)
        scalars = {"nll_mean": loss / 8, "nll_sum": loss, "aum": rng.random(n, np.float32)}
        writer.write_block(i, {**arrays, **scalars, "n_tokens": np.full(n, 8, np.int32)})
    writer.finish()


def readers(folder: Path) -> dict[str, StoreReader]:
    return {name: StoreReader.open(next(folder.glob(f"{name}-*"))) for name in ("forward", "clip")}


def run(folder: Path, name: str, n_iter: int, n_clusters: int) -> None:
    """Score with one method and print what it took."""
    pool, found = Pool.open(folder / "pool.jsonl"), readers(folder)
    method_type = get_method(name)
    own = {"n_iter": n_iter, "n_clusters": n_clusters} if name == "semdedup" else {}
    method = method_type(method_type.Settings(**own))
    context = Context(pool, found, k=int(BUDGET * len(pool)))
    begun, begun_cpu = time.perf_counter(), time.process_time()
    scored = method.run(context, 0, None)
    wall, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    chosen = method.select(context, scored.scores, context.k)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"{name:11} {wall:.0f} s, {cpu:.0f} s CPU, peak {peak:.2f} GB, {len(chosen)} chosen; "
        f"load {os.getloadavg()[0]:.0f}",
        flush=True,
    )
    for note in scored.notes:
        print(f"{'':11} {note}", flush=True)
    if name == "semdedup":
        each = iteration_seconds(STATES["last_state"])
        print(
            f"{'':11} k-means of 665,298 rows to 10,000 clusters: {each:.0f} s CPU an iteration, "
            f"{50 * each / 3600:.1f} hours for 50",
            flush=True,
        )
    else:
        share = recall(found["clip" if name == "self_filter" else "forward"], METHODS[name])
        print(f"{'':11} recall of the nearest 5: {share:.3f}", flush=True)


def recall(reader: StoreReader, columns: tuple[str, ...], n: int = 200, k: int = 5) -> float:
    """Share of the `k` nearest of `n` rows, by all distances, that the cells have."""
    every = np.ones(len(reader), bool)
    graph = Neighbours(
        reader, columns, every, np.random.default_rng(0).random(len(reader)), 8, True
    )
    rows = np.linspace(0, len(reader) - 1, n).astype(int)
    ids, _ = graph.nearest(rows, every, k)
    queries = stream.unit(stream.take(reader, columns, rows)).T
    cosines = np.empty((len(reader), n), np.float32)
    for part, found in stream.apply(reader, columns, lambda _, x: stream.cosines(x, queries)):
        cosines[part] = found
    cosines[rows, np.arange(n)] = -np.inf
    near = np.argpartition(-cosines, k, axis=0)[:k].T
    return float(np.mean([len(set(a) & set(b)) for a, b in zip(near, ids, strict=True)])) / k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=665_298, help="samples")
    parser.add_argument("--n_iter", type=int, default=1, help="iterations of k-means to run")
    parser.add_argument("--n_clusters", type=int, default=10_000, help="of SemDeDup")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--dir", type=Path, help="where to write the stores (default: temporary)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    if args.one:
        run(Path(args.one[0]), args.one[1], args.n_iter, args.n_clusters)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        write_pool(folder / "pool.jsonl", args.rows)
        write_store(folder, "forward", args.rows, STATES)
        write_store(folder, "clip", args.rows, CLIP)
        print(f"{args.rows} rows, budget {BUDGET:.0%}", flush=True)
        for method in args.methods:
            command = [sys.executable, *sys.argv, "--one", name, method]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
