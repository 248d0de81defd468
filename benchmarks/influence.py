"""Influence on ten target tasks and their votes, for gradients as many as LLaVA-665K's.

    python benchmarks/influence.py [--rows 665298] [--dim 5120] [--dir DIR] [--repeats 2]

Writes a real store of half-precision gradients (6.8 GB by default, removed at the end; refused when
the disk has less than 5 GB to spare beyond it) and ten small ones of 500 target samples, then takes
in turn:

    read     the block files, one after the other, with plain reads into one buffer
    votes    task means, the product with all rows, thresholds, votes and the tie rule, with the
             check of all blocks

each with the files dropped from the file cache before ("cold") and again without ("warm"). The
target is votes <= 1.5 read, under 1 GB of memory. Beside them the full product with every target
sample, as the released code has it, on a twentieth of the rows. Two threads, five minutes.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from score_store import SPARE_BYTES, drop_from_cache, read, seconds

from selection.rules.consensus import vote
from selection.rules.influence import direction, products
from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter
from selection.vectors import stream

N_TASKS, N_TARGETS, BLOCK_SIZE = 10, 500, 1024
COLUMN = "gradient"


def write_store(folder: Path, n_rows: int, dim: int, seed: int) -> StoreReader:
    """A store of `n_rows` x `dim` halves; blocks are rotations of one another."""
    rows = np.arange(n_rows)
    columns = [Column(COLUMN, (dim,), "float16")]
    key = StoreKey("gradients", {"seed": seed}, rows, columns)
    writer = StoreWriter.open(folder, key, BLOCK_SIZE)
    base = np.random.default_rng(seed).standard_normal((BLOCK_SIZE, dim), dtype=np.float32)
    base = (base / np.linalg.norm(base, axis=1, keepdims=True)).astype(np.float16)
    for i in writer.missing_blocks():
        block = np.roll(base, (i, 7 * i), axis=(0, 1))[: len(writer.block_rows(i))]
        writer.write_block(i, {COLUMN: np.ascontiguousarray(block)})
    writer.finish()
    return StoreReader.open(writer.folder)


def votes(folder: Path, targets: list[StoreReader]) -> tuple[np.ndarray, np.ndarray]:
    """Influence (N, K) and the generalist's score (N,)."""
    means = np.stack([direction(reader, COLUMN, normalize=False) for reader in targets], axis=1)
    influence = products(StoreReader.open(folder), COLUMN, means, normalize=False)
    return influence, vote(influence, np.ones(len(targets)), p=0.2)


def full_products(reader: StoreReader, targets: list[StoreReader], n_rows: int) -> np.ndarray:
    """The mean over each task's samples of the whole table of products, for the first rows."""
    samples = torch.cat([torch.from_numpy(target.column(COLUMN)).float() for target in targets])
    rows = stream.take(reader, [COLUMN], np.arange(n_rows))
    return (rows @ samples.T).view(n_rows, len(targets), -1).mean(2).double().numpy()


def compare(folder: Path, n_rows: int, dim: int, repeats: int) -> None:
    reader = write_store(folder, n_rows, dim, 0)
    targets = [write_store(folder, N_TARGETS, dim, k) for k in range(1, N_TASKS + 1)]
    n_bytes = sum(path.stat().st_size for path in reader.folder.glob("block-*"))
    works = {
        "read": lambda: read(reader.folder),
        "votes": lambda: votes(reader.folder, targets),
    }
    print(f"{n_rows} x {dim} halves, {n_bytes / 1e9:.2f} GB, {N_TASKS} tasks, best of {repeats}")
    for state in ("cold", "warm"):
        best = {}
        for _ in range(repeats):
            for name, work in works.items():
                if state == "cold":
                    drop_from_cache(reader.folder)
                best[name] = min(best.get(name, (np.inf, np.inf)), seconds(work))
        for name, (wall, cpu) in best.items():
            rate = n_bytes / wall / 1e9
            print(f"{state} {name:6} {wall:7.2f} s ({rate:.2f} GB/s), {cpu:.2f} s of CPU")
        print(f"{state} votes / read: {best['votes'][0] / best['read'][0]:.2f} (target 1.5)")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")
    found, part = votes(reader.folder, targets)[0], n_rows // 20
    slow: list[np.ndarray] = []
    wall, _ = seconds(lambda: slow.append(full_products(reader, targets, part)))
    np.testing.assert_allclose(found[:part], slow[0], atol=1e-6)  # float32 sums of 5120 products
    print(f"all {N_TASKS * N_TARGETS} target samples, {part} rows: {wall:.1f} s, x 20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=665_298, help="rows of the store")
    parser.add_argument("--dim", type=int, default=5120, help="numbers a row")
    parser.add_argument("--repeats", type=int, default=2, help="timings of each")
    parser.add_argument("--dir", type=Path, help="where to write the stores (default: temporary)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        needed = 2 * args.rows * args.dim + SPARE_BYTES
        if (free := shutil.disk_usage(folder).free) < needed:
            sys.exit(f"{folder}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} needed: give --rows")
        compare(Path(folder), args.rows, args.dim, args.repeats)


if __name__ == "__main__":
    main()
