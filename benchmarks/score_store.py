"""ARDS scores of a store as large as LLaVA-665K's, against reading the same files.

    python benchmarks/score_store.py [--rows 665298] [--width 8192] [--dir DIR] [--repeats 3]

Writes a real store of half-precision vectors (10.9 GB by default, removed at the end; refused when
the disk has less than 5 GB to spare beyond it), then takes in turn:

    read    its block files, one after the other, with plain reads into one buffer
    score   mean similarity and weighted sum over 60 subgroups of 50, with the check of all blocks

each with the files dropped from the file cache before ("cold") and again without ("warm"; means
little where the store does not fit in memory). The target is score <= 1.5 read, under 1 GB of
memory. Beside them, with --all, the variants that need a matrix product: similarity max.
Takes about three minutes. Two threads.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from selection.methods.ards import Settings, score_store, subgroup_weights
from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter
from selection.vectors import stream

COLUMNS = ("last_state", "attention_state")
N_SUBGROUPS, SUBGROUP_SIZE = 60, 50
BLOCK_SIZE = 1024
SPARE_BYTES = 5 * 10**9


def write_store(folder: Path, n_rows: int, width: int) -> StoreReader:
    """A store of `n_rows` x `width` halves in two columns; blocks are rotations of one another."""
    needed = 2 * n_rows * width + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(
            f"{folder}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} needed: give --dir, --rows"
        )
    columns = [Column(name, (width // 2,), "float16") for name in COLUMNS]
    rows = np.arange(n_rows)
    key = StoreKey("forward", {"made": "up"}, rows, columns)
    writer = StoreWriter.open(folder, key, BLOCK_SIZE)
    rng = np.random.default_rng(0)
    base = rng.standard_normal((BLOCK_SIZE, width), dtype=np.float32).astype(np.float16)
    for i in writer.missing_blocks():
        block = np.roll(base, i, axis=0)[: len(writer.block_rows(i))]
        halves = np.split(block, 2, axis=1)
        writer.write_block(i, dict(zip(COLUMNS, halves, strict=True)))
    writer.finish()
    return StoreReader.open(writer.folder)


def read(folder: Path) -> None:
    """Read every block file into one buffer."""
    buffer = bytearray(4 * 2**20)
    for path in sorted(folder.glob("block-*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages (they are synced, so it can)."""
    for path in folder.glob("block-*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of `work()`."""
    begun, begun_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - begun_cpu


def check(reader: StoreReader, members: list, weights: np.ndarray, scores: np.ndarray) -> None:
    """Compare some scores with float64 cosines; stop when they differ."""
    rows = np.linspace(0, len(reader) - 1, 50).astype(int)
    found = np.hstack([reader.take(name, rows).astype(np.float64) for name in COLUMNS])
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    slow = sum(
        w * (found @ m.double().numpy().T).mean(1) for w, m in zip(weights, members, strict=True)
    )
    np.testing.assert_allclose(scores[rows], slow, atol=1e-7)  # float32 sums of 8192 products


def compare(folder: Path, n_rows: int, width: int, repeats: int, everything: bool) -> None:
    reader = write_store(folder, n_rows, width)
    n_bytes = sum(path.stat().st_size for path in reader.folder.glob("block-*"))
    rng = np.random.default_rng(1)
    picks = rng.integers(len(reader), size=(N_SUBGROUPS, SUBGROUP_SIZE))
    members = [stream.unit(stream.take(reader, COLUMNS, rows)) for rows in picks]
    weights = subgroup_weights(rng.random(N_SUBGROUPS))

    def score(**settings) -> np.ndarray:
        fresh = StoreReader.open(reader.folder)  # checks every byte again
        return score_store(fresh, COLUMNS, members, weights, Settings(**settings))

    print(f"{len(reader)} x {width} halves, {n_bytes / 1e9:.2f} GB, best of {repeats}")
    for state in ("cold", "warm"):
        best = {}
        for _ in range(repeats):
            for name, work in {"read": lambda: read(reader.folder), "score": score}.items():
                if state == "cold":
                    drop_from_cache(reader.folder)
                best[name] = min(best.get(name, (np.inf, np.inf)), seconds(work))
        for name, (wall, cpu) in best.items():
            rate = n_bytes / wall / 1e9
            print(f"{state} {name:6} {wall:7.2f} s ({rate:.2f} GB/s), {cpu:.2f} s of CPU")
        ratio = best["score"][0] / best["read"][0]
        print(f"{state} score / read: {ratio:.2f} (target 1.5)")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")
    if everything:
        print(f"similarity max: {seconds(lambda: score(similarity='max'))[0]:.1f} s")
    check(reader, members, weights, score())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=665_298, help="rows of the store")
    parser.add_argument("--width", type=int, default=8192, help="values a row, both columns")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each")
    parser.add_argument("--dir", type=Path, help="where to write the store (default: temporary)")
    parser.add_argument("--all", action="store_true", help="time the variants too")
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        compare(Path(folder), args.rows, args.width, args.repeats, args.all)


if __name__ == "__main__":
    main()
