"""What a finished run prints: where the subset is, and what was chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console

from selection.output.tables import print_table


def source_shares(sources: np.ndarray, chosen: np.ndarray) -> list[tuple[str, int, int]]:
    """(source, samples in the pool, samples in the subset), largest source first.

    `sources` (N,) str, `chosen` (N,) bool.
    """
    names, codes = np.unique(sources, return_inverse=True)
    in_pool = np.bincount(codes, minlength=len(names))
    in_subset = np.bincount(codes[chosen], minlength=len(names))
    order = np.argsort(-in_pool, kind="stable")
    return [(str(names[i]), int(in_pool[i]), int(in_subset[i])) for i in order]


def print_summary(out: Path) -> None:
    """Read the run folder `out` and print it for a person."""
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    table = pq.read_table(out / "scores.parquet", columns=["source", "chosen"])
    sources = table["source"].to_numpy(zero_copy_only=False).astype(str)
    chosen = table["chosen"].to_numpy(zero_copy_only=False).astype(bool)
    console = Console(soft_wrap=True, highlight=False)
    print_shares(source_shares(sources, chosen))
    for line in [*manifest["notes"], *(f"warning: {text}" for text in manifest["warnings"])]:
        console.print(line, markup=False)
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in manifest["times"].items())
    console.print(f"time: {seconds}")
    console.print(
        f"{manifest['method']['name']}: {manifest['subset']['n']} of {manifest['pool']['n']} "
        f"samples in {out / 'subset.json'}",
        style="bold",
        markup=False,
    )


def print_shares(shares: list[tuple[str, int, int]]) -> None:
    """Print `source_shares`."""
    n_pool = sum(pool for _, pool, _ in shares)
    n_subset = max(sum(subset for _, _, subset in shares), 1)
    rows = (
        (
            name,
            f"{in_pool}",
            f"{in_pool / n_pool:.1%}",
            f"{in_subset}",
            f"{in_subset / n_subset:.1%}",
            f"{in_subset / in_pool:.1%}",
        )
        for name, in_pool, in_subset in shares
    )
    print_table("", ("source", "pool", "share", "subset", "share", "chosen of it"), rows)
