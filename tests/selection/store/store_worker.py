"""A real job that fills a store with two writer processes: `store_worker.py ROOT [MILLISECONDS]`.

Prints "ready" when it begins. Each block takes MILLISECONDS more to "compute". Run again, it
resumes. Used by test_crash.py, which kills it.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from selection.store.key import Column, StoreKey
from selection.store.store import StoreWriter

N_RANKS = 2
ROWS = np.arange(1000, 1300)
COLUMNS = [Column("state", (64,), "float16"), Column("loss", (), "float32")]


def opened(root: str, rank: int = 0) -> StoreWriter:
    return StoreWriter.open(root, StoreKey("forward", {"pool": "p"}, ROWS, COLUMNS), 10, rank)


def run_rank(root: str, rank: int, missing: list[int], seconds: float) -> None:
    writer = opened(root, rank)
    for i in missing[rank::N_RANKS]:
        time.sleep(seconds)
        rows = writer.block_rows(i)
        state = np.sin(np.outer(rows, np.arange(64))).astype(np.float16)
        bad = [{"row": int(row), "uid": "u", "reason": "r"} for row in rows if row % 50 == 0]
        writer.write_block(i, {"state": state, "loss": np.cos(rows).astype(np.float32)}, bad)


def main(root: str, milliseconds: str = "0") -> None:
    print("ready", flush=True)
    writer = opened(root)
    missing, children = writer.missing_blocks(), []
    for rank in range(N_RANKS):
        pid = os.fork()
        if pid == 0:
            run_rank(root, rank, missing, float(milliseconds) / 1000)
            os._exit(0)
        children.append(pid)
    if any([os.waitpid(pid, 0)[1] for pid in children]):
        sys.exit("a writer failed")
    writer.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
