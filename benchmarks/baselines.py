"""SemDeDup, D2 Pruning and Self-Filter on a store as large as LLaVA-665K's: time and memory.

    python benchmarks/baselines.py [--rows 665298] [--width 256] [--n_iter 1] [--dir DIR]

Writes a pool and stores of made-up clustered features (width halves a vector), then runs each
method's whole scoring from the store, every one in a process of its own: seconds, peak memory, and
for the two that search neighbours the share of the true nearest five that they find, on 500 rows.
SemDeDup's k-means has 10,000 clusters; --n_iter of its 50 iterations are run, the others
extrapolated from iterations on a tenth of the rows. Two threads. Target: memory under 8 GB, and no
step quadratic in the rows: half the rows (--rows 332649) must take about half as long.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from selection import stream
from selection.cluster import spherical_kmeans
from selection.methods import get_method
from selection.methods.base import Context
from selection.neighbours import nearest_neighbours
from selection.pool import Pool
from selection.store import Column, StoreReader, StoreWriter

METHODS = ("semdedup", "d2_pruning", "self_filter")
BLOCK_SIZE = 1024
BUDGET = 0.2


def write_pool(path: Path, n_rows: int) -> None:
    with path.open("w") as file:
        for i in range(n_rows):
            turns = [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": "yes"}]
            file.write(json.dumps({"id": i, "conversations": turns}) + "\n")


def write_store(folder: Path, name: str, n_rows: int, vectors: dict[str, int]) -> None:
    """Columns `vectors` (name, width) around 20,000 directions, and made-up scalars."""
    columns = [Column(key, (width,), "float16") for key, width in vectors.items()]
    columns += [Column(key, (), "float32") for key in ("nll_mean", "nll_sum", "aum")]
    columns.append(Column("n_tokens", (), "int32"))
    writer = StoreWriter.open(folder, name, {}, np.arange(n_rows), columns, BLOCK_SIZE)
    rng = np.random.default_rng(0)
    centres = {key: rng.standard_normal((20_000, w), np.float32) for key, w in vectors.items()}
    for i in writer.missing_blocks():
        n = len(writer.block_rows(i))
        own = rng.integers(20_000, size=n)
        arrays = {
            key: (centres[key][own] + rng.standard_normal((n, w), np.float32)).astype(np.float16)
            for key, w in vectors.items()
        }
        loss = rng.exponential(20, n).astype(np.float32)
        scalars = {"nll_mean": loss / 8, "nll_sum": loss, "aum": rng.random(n, np.float32)}
        writer.write_block(i, {**arrays, **scalars, "n_tokens": np.full(n, 8, np.int32)})
    writer.finish()


def readers(folder: Path) -> dict[str, StoreReader]:
    return {name: StoreReader.open(next(folder.glob(f"{name}-*"))) for name in ("forward", "clip")}


def run(folder: Path, name: str, n_iter: int) -> None:
    """Score with one method and print what it took."""
    pool, found = Pool.open(folder / "pool.jsonl"), readers(folder)
    method_type = get_method(name)
    own = {"n_iter": n_iter} if name == "semdedup" else {}
    method = method_type(method_type.Settings(**own))
    context = Context(pool, found, k=int(BUDGET * len(pool)))
    begun = time.perf_counter()
    scored = method.run(context, 0, None)
    seconds = time.perf_counter() - begun
    chosen = method.select(context, scored.scores, context.k)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{name:11} {seconds:7.0f} s, peak {peak:.2f} GB, {len(chosen)} chosen", flush=True)
    for note in scored.notes:
        print(f"{'':11} {note}")
    if name == "semdedup":
        each = iteration_seconds(found["forward"])
        whole = seconds + (50 - n_iter) * each
        print(f"{'':11} an iteration of k-means {each:.0f} s: with 50, {whole / 60:.0f} min")
    else:
        columns = ("mean_state",) if name == "d2_pruning" else ("image_features", "text_features")
        print(f"{'':11} recall of the nearest 5: {recall(found, name, columns):.3f}", flush=True)


def iteration_seconds(reader: StoreReader, n_sample: int = 2**16) -> float:
    """One iteration of k-means over the whole store, from two more of them on `n_sample` rows."""
    sample = stream.unit(stream.take(reader, ("last_state",), np.arange(n_sample))).numpy()
    times = []
    for n_iter in (1, 3):
        begun = time.perf_counter()
        spherical_kmeans(sample, 10_000, n_iter)
        times.append(time.perf_counter() - begun)
    return (times[1] - times[0]) / 2 * len(reader) / n_sample


def recall(found: dict[str, StoreReader], name: str, columns: tuple[str, ...]) -> float:
    """Share of the nearest five of 500 rows, by all distances, that the graph has."""
    reader = found["forward" if name == "d2_pruning" else "clip"]
    n, rng = len(reader), np.random.default_rng(0)
    ids, _ = nearest_neighbours(reader, columns, np.ones(n, bool), rng.random(n), 5, 8, True)
    vectors = torch.cat([torch.from_numpy(reader.column(c)).float() for c in columns], dim=1)
    vectors /= vectors.norm(dim=1, keepdim=True)
    rows = np.linspace(0, n - 1, 500).astype(int)
    near = (vectors[rows] @ vectors.T).topk(6, dim=1).indices[:, 1:]
    hits = [len(set(a.tolist()) & set(b)) for a, b in zip(near, ids[rows], strict=True)]
    return float(np.mean(hits)) / 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=665_298, help="samples")
    parser.add_argument("--width", type=int, default=256, help="width of a vector")
    parser.add_argument("--n_iter", type=int, default=1, help="iterations of k-means to run")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--dir", type=Path, help="where to write the stores (default: temporary)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    if args.one:
        run(Path(args.one[0]), args.one[1], args.n_iter)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        write_pool(folder / "pool.jsonl", args.rows)
        write_store(
            folder, "forward", args.rows, {"last_state": args.width, "mean_state": args.width}
        )
        halves = {"image_features": args.width // 2, "text_features": args.width // 2}
        write_store(folder, "clip", args.rows, halves)
        print(f"{args.rows} rows, vectors of {args.width} halves, budget {BUDGET:.0%}", flush=True)
        for method in args.methods:
            command = [sys.executable, *sys.argv, "--one", name, method]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
