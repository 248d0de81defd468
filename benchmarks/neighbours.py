"""How many of the true nearest neighbours cells find, on real vectors.

    python benchmarks/neighbours.py STORE COLUMN [COLUMN ...] [--cell 64] [--k 5] [--n_rows 500]

STORE is a finished store of signals, as a run of `select` leaves it. Its vectors are put into cells
of about --cell even where there are few enough to compare every pair, and the nearest --k of
--n_rows rows are compared with those by all distances, for several numbers of searched cells: their
share that is found, how much farther the ones found are, and the part of the store that was looked
at. A store of 665,298 has 649 cells: the default 8 look at 1.2 % of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from selection.store.store import StoreReader
from selection.vectors import neighbours
from selection.vectors.neighbours import Neighbours

PROBES = (1, 2, 4, 8, 16, 32)


def compare(reader: StoreReader, columns: list[str], k: int, n_rows: int) -> None:
    every, rng = np.ones(len(reader), bool), np.random.default_rng(0)
    keys, rows = rng.random(len(reader)), np.sort(rng.choice(len(reader), n_rows, replace=False))
    exact = Neighbours(reader, columns, every, keys, 0, True)
    true, true_squares = exact.nearest(rows, every, k)
    for n_probe in PROBES:
        graph = Neighbours(reader, columns, every, keys, n_probe, True)
        ids, squares = graph.nearest(rows, every, k)
        found = np.mean([len(set(a) & set(b)) for a, b in zip(true, ids, strict=True)]) / k
        sizes = np.bincount(graph.cells[graph.cells >= 0])
        farther = np.sqrt(squares).mean() / np.sqrt(true_squares).mean() - 1
        print(
            f"{n_probe:2} of {len(sizes)} cells, {n_probe / len(sizes):.1%}: "
            f"{found:.3f} of the nearest {k}, distances {farther:.1%} longer",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("columns", nargs="+")
    parser.add_argument("--cell", type=int, default=64, help="vectors of a cell")
    parser.add_argument("--k", type=int, default=5, help="neighbours of a row")
    parser.add_argument("--n_rows", type=int, default=500, help="rows to compare")
    args = parser.parse_args()
    neighbours.EXACT, neighbours.CELL = 0, args.cell
    compare(StoreReader.open(args.store), args.columns, args.k, args.n_rows)


if __name__ == "__main__":
    main()
