"""`python -m selection all`: every method that the given models and files allow, compared.

The signals of the proxy come first, for all methods together: what a plain forward pass tells in
one pass over the pool, projected gradients in one more, forward and backward. Each method then
finds its own in the store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from llava.errors import UsageError
from llava.vlm.base import Vlm
from selection.extract.loop import check_images
from selection.methods import Method, find_methods, get_method
from selection.output.compare import compare
from selection.output.summary import source_shares
from selection.output.tables import print_table
from selection.pool.pool import Pool
from selection.pool.targets import read_targets
from selection.ranks import Ranks
from selection.run import Selection, default_folder, extract_together_with, open_proxy
from selection.settings import PoolSettings, ProxySettings, Run, SelectSettings, parse_select


@dataclass(frozen=True)
class AllSettings:
    """Which methods run, and with what."""

    methods: tuple[str, ...] = ()
    """only these, as a list: '[el2n,coincide]'; by default all that can run"""
    settings: str | None = None
    """folder of files METHOD.yaml with settings of single methods"""
    targets: str | None = None
    """YAML list of the target tasks, for the methods that have some"""
    holdout_model: str | None = None
    """the other checkpoint of rho_loss"""
    holdout_base: str | None = None
    """its base, where it is a LoRA; --model_base by default"""


def select_all(
    where: PoolSettings, proxy: ProxySettings, select: SelectSettings, every: AllSettings
) -> None:
    """Run the methods one after another, into one folder each, and print how they compare.

    A method whose flags, models or files are missing is left out and named with the reason.
    Raises UsageError when none can run.
    """
    ranks, out = Ranks(), Path(select.out or default_folder("all", where.pool, select.budget))
    if every.targets:  # an error in it is told now, not by the first method that reads it
        read_targets(every.targets)
    runs, skipped = _runs(out, where, proxy, select, every)
    model = open_proxy(proxy) if proxy.model else None
    seconds = _one_pass(runs.values(), where, proxy, model, ranks)
    finished: dict[str, Path] = {}
    for name, run in runs.items():
        selection = Selection(run, ranks)
        if model is not None and run.method.reads_proxy(selection.pool):
            selection.proxy = model
        try:
            finished[name] = selection.execute()
        except UsageError as error:
            if ranks.world_size > 1:
                raise  # the other ranks are in the middle of it
            skipped[name] = str(error)
    if not finished:
        raise UsageError(next(iter(skipped.values())))
    if ranks.is_first:
        _report(out, finished, skipped, seconds)


def _runs(
    out: Path,
    where: PoolSettings,
    proxy: ProxySettings,
    select: SelectSettings,
    every: AllSettings,
) -> tuple[dict[str, Run], dict[str, str]]:
    """What each method is asked for, and why the others cannot run."""
    shared = {**asdict(where), **asdict(proxy), **asdict(select)}
    runs, skipped = {}, {}
    for name in every.methods or find_methods():
        own = {**shared, "out": str(out / name), **_own_flags(get_method(name), every)}
        file = Path(every.settings or "") / f"{name}.yaml"
        config = ["--config", str(file)] if every.settings and file.is_file() else []
        try:
            run = parse_select([name, *config, *_flags(own)])
            run.method.checkpoints()
            runs[name] = run
        except UsageError as error:
            skipped[name] = str(error)
    return runs, skipped


def _own_flags(method: type[Method], every: AllSettings) -> dict[str, Any]:
    """Settings of `all` that single methods have."""
    known = {field.name for field in fields(method.Settings)}
    if method.target_signals is not Method.target_signals:
        known.add("targets")
    return {name: value for name, value in asdict(every).items() if name in known}


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as flags; those that are None are left to their defaults."""
    lists = {key: f"[{','.join(v)}]" for key, v in values.items() if isinstance(v, tuple)}
    return [f"--{key}={v}" for key, v in {**values, **lists}.items() if v is not None]


def _with_proxy(method: Method) -> Iterable[Any]:
    """The signals of a method that the proxy computes."""
    others = method.checkpoints()
    return (s for name, s in method.signals().items() if s.uses_proxy and name not in others)


def _one_pass(
    runs: Iterable[Run],
    where: PoolSettings,
    proxy: ProxySettings,
    model: Vlm | None,
    ranks: Ranks,
) -> float:
    """Seconds that the signals of all methods took, those that share a pass in one; 0 without a
    proxy."""
    passes: dict[Hashable, list[Any]] = {}
    for signal in dict.fromkeys(s for run in runs for s in _with_proxy(run.method)):
        if model is not None and _has(model, signal):
            passes.setdefault(signal.pass_over(), []).append(signal)
    if not passes:
        return 0.0
    begun, pool = time.monotonic(), Pool.open(where.pool, where.limit)
    rows = np.arange(len(pool))
    check_images(pool, rows, where.images)
    for signals in passes.values():
        extract_together_with(signals, rows, pool, where, proxy, ranks, model)
    return time.monotonic() - begun


def _has(model: Vlm, signal: Any) -> bool:
    """Whether `model` has what the signal reads; if not its method will say so."""
    try:
        signal.reads(model)
    except UsageError:
        return False
    return True


def _report(
    out: Path, finished: Mapping[str, Path], skipped: Mapping[str, str], seconds: float
) -> None:
    manifests = {
        name: json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, folder in finished.items()
    }
    _print_times(manifests)
    print(f"signals of the proxy, in as few passes as they can share: {seconds:.1f} s")
    _print_shares(finished)
    if len(finished) > 1:
        compare([str(folder) for folder in finished.values()], out / "compare")
    for name, reason in skipped.items():
        print(f"not run: {name}: {reason}")


def _print_times(manifests: Mapping[str, Any]) -> None:
    """Size of each subset and seconds of each stage."""
    times = {name: manifest["times"] for name, manifest in manifests.items()}
    stages = list(dict.fromkeys(stage for mine in times.values() for stage in mine))
    rows = (
        (
            name,
            str(manifests[name]["subset"]["n"]),
            *(f"{mine[stage]:.1f}" if stage in mine else "" for stage in stages),
        )
        for name, mine in times.items()
    )
    print_table("seconds by stage", ("method", "samples", *stages), rows)


def _print_shares(finished: Mapping[str, Path]) -> None:
    """Share of every source in the pool and in each subset, largest source first."""
    shares = {}
    for name, folder in finished.items():
        columns = pq.read_table(folder / "scores.parquet", columns=["source", "chosen"])
        sources, chosen = (
            columns[key].to_numpy(zero_copy_only=False) for key in columns.schema.names
        )
        shares[name] = source_shares(sources.astype(str), chosen.astype(bool))
    pool = next(iter(shares.values()))
    counts = {"pool": [n for _, n, _ in pool]}
    counts |= {name: [chosen for *_, chosen in mine] for name, mine in shares.items()}
    headings = ("method", *(source for source, *_ in pool))
    rows = ((name, *(f"{n / sum(mine):.1%}" for n in mine)) for name, mine in counts.items())
    print_table("share of each source", headings, rows)
