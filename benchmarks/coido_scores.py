"""Scoring a pool with a trained CoIDO scorer: time and peak memory.

    python benchmarks/coido_scores.py [--rows 665298] [--width 768] [--dir DIR]

Made-up CLIP features, half precision, in a real store (3 KiB a row: 2 GB of disk at full size), and
the paper's MLP with one score. Checksums are checked while reading. Timed apart: making the store;
scoring with its files dropped from the file cache; scoring again. CPU seconds beside wall seconds
and the load of the machine: what the two differ by on two threads is waiting, for the disk the
first time, for other processes both times. Target: 2 minutes on two cores, under 2 GB.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from coincide import drop_from_cache, seconds, shown

from selection.methods.coido.coido import score_pool
from selection.methods.coido.features import Assembly
from selection.methods.coido.scorer import Scorer
from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter

BLOCK = 1024


def write_store(root: Path, n: int, width: int) -> StoreReader:
    """Random features for `n` rows."""
    names = ("image_features", "text_features")
    columns = [*(Column(name, (width,), "float16") for name in names)]
    key = StoreKey("clip", {"made for": "benchmark"}, np.arange(n), columns)
    writer = StoreWriter.open(root, key, BLOCK)
    rng = np.random.default_rng(0)
    some = {name: rng.standard_normal((BLOCK, width)).astype(np.float16) for name in names}
    for i in writer.missing_blocks():
        size = len(writer.block_rows(i))
        writer.write_block(i, {name: np.roll(some[name], i, axis=1)[:size] for name in names})
    writer.finish()
    return StoreReader.open(writer.folder)


@dataclass
class Rows:
    """What `score_pool` asks of a pool."""

    n: int

    def __len__(self) -> int:
        return self.n


@dataclass
class Place:
    """What `score_pool` asks of a context."""

    pool: Rows
    readers: dict[str, StoreReader]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=665_298)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dir", type=Path, help="where to write the store (default: temporary)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    scorer = Scorer.new("mlp", Assembly(args.width, ("clip_score",), (0.0,), (0.4,)), seed=0)
    scores = {"clip_score": np.random.default_rng(1).uniform(0, 0.4, args.rows)}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        made, reader = seconds(lambda: write_store(Path(folder), args.rows, args.width))
        print(f"making the store: {shown(made)}", flush=True)
        drop_from_cache(reader.folder)
        for state in ("from disk", "from the file cache"):
            fresh = StoreReader.open(reader.folder)  # checks every byte again
            context = Place(Rows(args.rows), {"clip": fresh})
            took, found = seconds(lambda c=context: score_pool(scorer, c, scores))
            load = os.getloadavg()[0]
            print(
                f"{len(found)} samples x {2 * args.width + 1} {state}: {shown(took)}; "
                f"load {load:.0f}",
                flush=True,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak {peak:.2f} GiB, pages of the mapped store included")


if __name__ == "__main__":
    main()
