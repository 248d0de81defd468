"""`python -m selection compare A B ...`: how much subsets share, and where their scores agree.

For every run of target tasks also its specialists, the best k samples for each task alone: how much
they share with one another and with the run's subset (figures 3 and 4 of the ICONS paper).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava import files
from llava.errors import UsageError
from selection.output.folder import Run
from selection.output.tables import print_table
from selection.rules.budget import top_k
from selection.rules.consensus import percentile_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chosen:
    """A finished run: `rows` (k,) of `pool` (sha256, N), `scores` (N,) with NaN, and the rows (k,)
    of the specialist of each of its target tasks."""

    name: str
    pool: tuple[str, int]
    rows: np.ndarray
    scores: np.ndarray
    specialists: Mapping[str, np.ndarray]


def read_run(run: str | Path | Run) -> Chosen:
    """What a run chose. Raises UsageError when a folder holds no finished run."""
    run = run if isinstance(run, Run) else Run.open(run)
    rows, specialists = run.rows, {}
    if (run.folder / "artefacts/influence.npy").exists():
        names = [task["name"] for task in run.artefact("tasks")]
        columns = run.artefact("influence").T
        specialists = {
            name: top_k(column, len(rows)).rows for name, column in zip(names, columns, strict=True)
        }
    pool = (run.manifest["pool"]["sha256"], run.manifest["pool"]["n"])
    scores = run.scores["score"].to_numpy().astype(float)
    return Chosen(run.name, pool, rows, scores, specialists)


def overlaps(subsets: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    """Share of each of `subsets` that each of `others` has too, (m, n) in 0..1."""
    return np.array(
        [[np.isin(subset, other).mean() for other in others] for subset in subsets], np.float64
    )


def rank_correlations(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Spearman's correlation of the scores (N,) of every two runs, over the samples that both have
    scored, (n, n); NaN where a run gives all of these the same score."""
    correlations = np.full((len(scores), len(scores)), np.nan)
    for i, left in enumerate(scores):
        for j, right in enumerate(scores):
            both = ~np.isnan(left) & ~np.isnan(right)
            ranks = percentile_ranks(np.column_stack([left[both], right[both]]))
            if both.any() and (np.ptp(ranks, axis=0) > 0).all():
                correlations[i, j] = np.corrcoef(ranks.T)[0, 1]
    return correlations


def compare(runs: Sequence[str | Path | Run], out: str | Path | None) -> dict[str, Any]:
    """Print how much the runs share, and write compare.json and the pictures into `out`, if given.

    Returns what compare.json holds. Raises UsageError for runs of different pools, and for a run
    that there is nothing to hold against.
    """
    folders = [run.folder if isinstance(run, Run) else Path(run) for run in runs]
    chosen = [read_run(run) for run in runs]
    if not chosen or (len(chosen) == 1 and not chosen[0].specialists):
        raise UsageError("name at least two run folders, or one of a method with --targets")
    for one, folder in zip(chosen, folders, strict=True):
        if one.pool != chosen[0].pool:
            raise UsageError(f"{folder}: chosen from another pool than {folders[0]}")
    names = _distinct([one.name for one in chosen], folders)
    told = {"runs": dict(zip(names, map(str, folders), strict=True))}
    named = dict(zip(names, chosen, strict=True))
    return compare_runs(named, None if out is None else Path(out), told)


def compare_runs(
    runs: Mapping[str, Chosen], out: Path | None, told: Mapping[str, object]
) -> dict[str, Any]:
    """`compare` of runs of one pool that are read already; `told` goes into compare.json too."""
    if out is not None:
        files.make_folder(out)
    names, facts = list(runs), dict(told)
    if len(runs) > 1:
        rows = [run.rows for run in runs.values()]
        shared = overlaps(rows, rows)
        agree = rank_correlations([run.scores for run in runs.values()])
        plain = [[float(x) if np.isfinite(x) else None for x in row] for row in agree]
        facts |= {"overlap": shared.tolist(), "rank_correlation": plain}
        _print("share of the row's subset that the column's has too", names, shared, "{:.1%}")
        _print("rank correlation of the scores", names, agree, "{:+.2f}")
        if out is not None:
            _write(out / "overlap.png", picture_of_runs(names, shared, agree))
    for name, run in runs.items():
        if run.specialists:
            facts[f"specialists of {name}"] = _compare_specialists(name, run, out)
    if out is not None:
        files.atomic_write(out / "compare.json", json.dumps(facts, indent=1).encode())
        print(f"{out}: compare.json and pictures")
    return facts


def _compare_specialists(name: str, run: Chosen, out: Path | None) -> dict[str, object]:
    tasks, subsets = list(run.specialists), list(run.specialists.values())
    among, kept = overlaps(subsets, subsets), overlaps(subsets, [run.rows])[:, 0]
    title = f"{name}: share of the specialists that the subset has"
    print_table(title, ["", ""], zip(tasks, map("{:.1%}".format, kept), strict=True))
    if out is not None:
        _write(out / f"specialists-{name}.png", picture_of_specialists(name, tasks, among, kept))
    return {"tasks": tasks, "overlap": among.tolist(), "in_subset": kept.tolist()}


def picture_of_runs(names: Sequence[str], shared: np.ndarray, agree: np.ndarray) -> Figure:
    """Two matrices side by side: overlap of the subsets, rank correlation of the scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 1.6 * len(names), 2.4 + 0.7 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2)
    _matrix(left, shared, names, "share of the row's subset in the column's", "{:.0%}", 0)
    _matrix(right, agree, names, "rank correlation of the scores", "{:+.2f}", -1)
    return figure


def picture_of_specialists(
    name: str, tasks: Sequence[str], among: np.ndarray, kept: np.ndarray
) -> Figure:
    """The specialists' heat map (ICONS, figure 3), and their bars in the subset (figure 4)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 1.2 * len(tasks), 2.4 + 0.6 * len(tasks)), layout="constrained")
    left, right = figure.subplots(1, 2)
    _matrix(left, among, tasks, "overlap of the specialists", "{:.0%}", 0)
    right.barh(tasks, kept)
    right.set_xlim(0, 1)
    right.invert_yaxis()
    right.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    right.set_title(f"share of each specialist in {name}")
    for place, share in enumerate(kept):
        right.text(share, place, f" {share:.1%}", va="center")
    return figure


def _matrix(
    axes: Axes, matrix: np.ndarray, names: Sequence[str], title: str, form: str, low: int
) -> None:
    """A heat map from `low` to 1 with its numbers in the cells."""
    axes.imshow(matrix, vmin=low, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            colour = "white" if value < (low + 1.2) / 2 else "black"
            axes.text(j, i, form.format(value), ha="center", va="center", color=colour)


def _print(title: str, names: Sequence[str], matrix: np.ndarray, form: str) -> None:
    """A square matrix; its columns are numbered like its rows."""
    numbers = [str(i + 1) for i in range(len(names))]
    rows = (
        [f"{i} {name}", *(form.format(x) if np.isfinite(x) else "-" for x in row)]
        for i, name, row in zip(numbers, names, matrix, strict=True)
    )
    print_table(title, ["", *numbers], rows)


def _distinct(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The folders' own names where they differ, else their paths."""
    if len(set(names)) == len(names):
        return list(names)
    return [str(folder).strip("/.").replace("/", "_") for folder in folders]


def _write(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    files.atomic_write(path, buffer.getvalue())
