"""`python -m mini report`: did the selection see the built-in biases? By the pool's oracle labels.

The labels (`meta.noisy`, `meta.dup`, `meta.biased`) are never shown to a selector. Beside the
subset stands a random one of the same size, drawn by the project's own `random`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from llava.errors import UsageError
from llava.flags import Parser
from selection.methods.base import Context, stream
from selection.methods.random import Random
from selection.output.compare import Chosen, compare_runs, read_run
from selection.output.tables import print_table
from selection.pool.pool import Pool


@dataclass(frozen=True)
class ReportSettings:
    """What to report on."""

    run: str | None = None
    """the run folder, or the folder of an `all`; by default the newest one in outputs/"""
    seed: int = 0
    """seed of the random subset"""


@dataclass(frozen=True)
class Share:
    """How many samples of pool, subset and random subset carry a label."""

    label: str
    pool: int
    subset: int
    random: int


class _Labels(msgspec.Struct):
    noisy: int = 0
    dup: int = 0
    biased: str = ""


class _Labelled(msgspec.Struct):
    meta: _Labels = msgspec.field(default_factory=_Labels)


def main(args: Sequence[str]) -> None:
    """Parse and print."""
    parser = Parser(prog="python -m mini report", description=__doc__.splitlines()[0])
    parser.add_class_arguments(ReportSettings, as_group=True)
    settings = ReportSettings(**parser.parse_args(list(args)).as_dict())
    run = Path(settings.run) if settings.run else newest_run(Path("outputs"))
    runs = sorted(path.parent for path in run.glob("*/manifest.json"))
    if runs and not (run / "manifest.json").exists():
        print_comparison(runs)
        return
    manifest = _manifest(run)
    pool = Pool.open(manifest["pool"]["path"], limit=manifest["pool"]["n"])
    rows = np.loadtxt(run / "subset_rows.txt", dtype=np.int64, ndmin=1)
    drawn = random_rows(pool, len(rows), settings.seed)
    print_report(oracle_shares(pool, rows, drawn), len(pool), rows, drawn)
    chosen = read_run(run)
    chance = replace(
        chosen, name="random draw", rows=drawn, scores=_keys(pool, settings.seed), specialists={}
    )
    runs = [chosen, *_comparable(run, chosen), chance]
    compare_runs({one.name: one for one in runs}, run / "report", {})


def newest_run(outputs: Path) -> Path:
    """The folder in `outputs` with the manifest that was written last, in it or one below."""
    manifests = [*outputs.glob("*/manifest.json"), *outputs.glob("*/*/manifest.json")]
    if not manifests:
        raise UsageError(f"{outputs}: holds no finished run; `bash selection.sh` makes one")
    newest = max(manifests, key=lambda path: path.stat().st_mtime)
    return outputs / newest.relative_to(outputs).parts[0]


def _comparable(run: Path, chosen: Chosen) -> Iterator[Chosen]:
    """Other runs beside `run` that chose as many samples of the same pool."""
    for manifest in sorted(run.parent.glob("*/manifest.json")):
        if manifest.parent.name != run.name:
            try:
                other = read_run(manifest.parent)
            except UsageError:
                continue  # of an older version, or damaged
            if other.pool == chosen.pool and len(other.rows) == len(chosen.rows):
                yield replace(other, specialists={})


def random_rows(pool: Pool, k: int, seed: int) -> np.ndarray:
    """The `k` rows that method `random` chooses with this seed, (k,) ascending."""
    return Random().select(Context(pool), _keys(pool, seed), k)


def _keys(pool: Pool, seed: int) -> np.ndarray:
    return Random().score(Context(pool), stream(seed, Random.name, "score")).scores


def oracle_shares(pool: Pool, rows: np.ndarray, drawn: np.ndarray) -> list[Share]:
    """One `Share` per label; `rows` and `drawn` (k,) are pool rows of the two subsets."""
    carried: dict[str, np.ndarray] = {}

    def mark(label: str, row: int) -> None:
        carried.setdefault(label, np.zeros(len(pool), bool))[row] = True

    for row in range(len(pool)):
        labels = msgspec.json.decode(pool.raw(row), type=_Labelled).meta
        for bias in filter(None, labels.biased.split("+")):
            mark("any bias", row)
            mark(f"  {bias}", row)
        if labels.noisy:
            mark("noisy", row)
        if labels.dup:
            mark("duplicate", row)
    order = sorted(carried, key=lambda label: (label != "any bias", not label[0].isspace(), label))
    return [
        Share(name, *(int(carried[name][part].sum()) for part in (slice(None), rows, drawn)))
        for name in order
    ]


def print_report(shares: list[Share], n: int, rows: np.ndarray, drawn: np.ndarray) -> None:
    """The shares as a table, and the overlap of the two subsets."""
    headings = ("oracle label", "pool", "share", "subset", "share", "random", "share")
    sizes = (n, len(rows), len(drawn))
    print_table("", headings, (_cells(share, sizes) for share in shares))
    common = len(np.intersect1d(rows, drawn))
    print(
        f"overlap with random: {common} of {len(rows)} ({common / len(rows):.1%}; two independent "
        f"draws share {len(rows) / n:.1%})"
    )


def _cells(share: Share, sizes: Sequence[int]) -> list[str]:
    counts = zip((share.pool, share.subset, share.random), sizes, strict=True)
    return [share.label, *(text for n, of in counts for text in (f"{n}", f"{n / of:.1%}"))]


def print_comparison(runs: Sequence[Path]) -> None:
    """Share of each label in the pool and in the subset of each of several runs of one pool."""
    first = _manifest(runs[0])["pool"]
    pool = Pool.open(first["path"], limit=first["n"])
    subsets = [np.loadtxt(run / "subset_rows.txt", dtype=np.int64, ndmin=1) for run in runs]
    shares_by_run = [oracle_shares(pool, rows, rows) for rows in subsets]
    headings = ("method", *(share.label.strip() for share in shares_by_run[0]))
    lines = [("pool", *(f"{share.pool / len(pool):.1%}" for share in shares_by_run[0]))]
    for run, rows, shares in zip(runs, subsets, shares_by_run, strict=True):
        lines.append((run.name, *(f"{share.subset / len(rows):.1%}" for share in shares)))
    print_table("oracle labels", headings, lines)


def _manifest(run: Path) -> dict:
    try:
        return json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{run}: is not a finished run folder ({error})") from None
