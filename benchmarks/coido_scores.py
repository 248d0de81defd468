"""Scoring a pool with a trained CoIDO scorer: time and peak memory.

    python benchmarks/coido_scores.py [--rows 665298] [--width 768]

Made-up CLIP features, half precision, in a real store (4 KiB a row: 2 GB of disk at full size),
and the paper's MLP with one score. Checksums are checked while reading. Writing is not counted.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selection.coido.features import Assembly
from selection.coido.scorer import Scorer
from selection.methods.coido import score_pool
from selection.store import Column, StoreReader, StoreWriter

BLOCK = 1024


def write_store(root: Path, n: int, width: int) -> StoreReader:
    """Random features for `n` rows."""
    names = ("image_features", "text_features")
    columns = [*(Column(name, (width,), "float16") for name in names)]
    writer = StoreWriter.open(root, "clip", {"made for": "benchmark"}, np.arange(n), columns, BLOCK)
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
    args = parser.parse_args()
    scorer = Scorer.new("mlp", Assembly(args.width, ("clip_score",), (0.0,), (0.4,)), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        context = Place(Rows(args.rows), {"clip": write_store(Path(folder), args.rows, args.width)})
        scores = {"clip_score": np.random.default_rng(1).uniform(0, 0.4, args.rows)}
        cpu, wall = time.process_time(), time.monotonic()
        found = score_pool(scorer, context, scores)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(found)} samples x {2 * args.width + 1}: {wall:.1f} s, {cpu:.1f} s CPU")
    print(f"peak {peak:.2f} GiB, pages of the mapped store included")


if __name__ == "__main__":
    main()
