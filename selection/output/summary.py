"""What a finished run prints: where the subset is, and what was chosen."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from selection.output.folder import Run
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


def shares_of(run: Run) -> list[tuple[str, int, int]]:
    """`source_shares` of a finished run."""
    sources, chosen = (
        run.scores[name].to_numpy(zero_copy_only=False) for name in ("source", "chosen")
    )
    return source_shares(sources.astype(str), chosen.astype(bool))


def print_summary(run: Run) -> None:
    """Print a finished run for a person."""
    manifest, shares = run.manifest, shares_of(run)
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

    console = Console(soft_wrap=True, highlight=False)
    for line in [*manifest["notes"], *(f"warning: {text}" for text in manifest["warnings"])]:
        console.print(line, markup=False)
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in manifest["times"].items())
    console.print(f"time: {seconds}")
    console.print(
        f"{manifest['method']['name']}: {manifest['subset']['n']} of {manifest['pool']['n']} "
        f"samples in {run.folder / 'subset.json'}",
        style="bold",
        markup=False,
    )
