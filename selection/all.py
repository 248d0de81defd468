"""`python -m selection all`: every method that the given models and files allow, compared.

The signals of the proxy come first, for all methods together: what a plain forward pass tells in
one pass over the pool, projected gradients in one more, forward and backward. Each method then
finds its own in the store.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava import ranks
from llava.errors import UsageError
from selection.cli import has_targets, job_of, read_yaml
from selection.methods import Method, find_methods, get_method
from selection.methods.base import Training, WarmUp
from selection.output.compare import compare
from selection.output.folder import Run
from selection.output.summary import shares_of
from selection.output.tables import print_table
from selection.pool.pool import Pool
from selection.pool.targets import read_targets
from selection.run import PATIENCE, Execution, default_folder, open_proxy
from selection.settings import AllSettings, Job, PoolSettings, ProxySettings, SelectSettings
from selection.signals.base import ProxySignal, Signal

if TYPE_CHECKING:
    from llava.vlm.base import Vlm


def training(proxy: ProxySettings, settings: AllSettings) -> tuple[Training, ...]:
    """What is trained first where no proxy is named: one that serves every method, and the holdout
    model of RHO-LOSS."""
    if proxy.model:
        return ()
    serves_all = WarmUp(moments=True)
    if settings.holdout_model:
        return (serves_all,)
    return serves_all, WarmUp(seed=1, fills="holdout_model", base_fills="holdout_base")


def select_all(
    where: PoolSettings, proxy: ProxySettings, select: SelectSettings, settings: AllSettings
) -> None:
    """Run the methods one after another, into one folder each, and print how they compare.

    A method whose flags, models or files are missing is left out and named with the reason.
    Raises UsageError when none can run.
    """
    ranks.join(PATIENCE)
    out = Path(select.out or default_folder("all", where.pool, select.budget))
    if settings.targets:  # an error in it is told now, not by the first method that reads it
        read_targets(settings.targets)
    jobs, skipped = _jobs(out, where, proxy, select, settings)
    model = open_proxy(proxy) if proxy.model else None
    pool = Pool.open(where.pool, where.limit)
    seconds = _one_pass(jobs.values(), pool, where, proxy, model)
    runs: dict[str, Run] = {}
    for name, job in jobs.items():
        execution = Execution(job, pool)
        if model is not None and job.method.reads_proxy(pool):
            execution.proxy = model
        try:
            runs[name] = execution.execute()
        except UsageError as error:
            if ranks.world_size() > 1:
                raise  # the other processes are in the middle of it
            skipped[name] = str(error)
    if not runs:
        raise UsageError(next(iter(skipped.values())))
    if ranks.rank() == 0:
        _report(out, runs, skipped, seconds)


def _jobs(
    out: Path,
    where: PoolSettings,
    proxy: ProxySettings,
    select: SelectSettings,
    settings: AllSettings,
) -> tuple[dict[str, Job], dict[str, str]]:
    """What each method is asked for, and why the others cannot run."""
    jobs, skipped = {}, {}
    shared = {**asdict(where), **asdict(proxy), **asdict(select)}
    for name in settings.methods or find_methods():
        method = get_method(name)
        # The method's file in `--settings`, and those flags of `all` that are its own.
        path = Path(settings.settings or "") / f"{method.name}.yaml"
        its_own = {field.name for field in fields(method.Settings)}
        its_own |= {"targets"} if has_targets(method) else set()
        of_all = {key: value for key, value in asdict(settings).items() if key in its_own}
        try:
            told = read_yaml(path, "--settings") if settings.settings and path.is_file() else {}
            preset = told.pop("preset", None)
            values = {**told, **shared, **of_all, "out": str(out / method.name)}
            given = {key: value for key, value in values.items() if value is not None}
            job = replace(job_of(method, given, preset), command=("selection", "all"))
            job.method.checkpoints()
            jobs[name] = job
        except UsageError as error:
            skipped[name] = str(error)
    return jobs, skipped


def _one_pass(
    jobs: Iterable[Job], pool: Pool, where: PoolSettings, proxy: ProxySettings, model: Vlm | None
) -> float:
    """Seconds that the signals of all methods took, those that share a pass in one; 0 without a
    proxy."""
    from selection.extract.loop import extract

    passes: dict[Hashable, list[Signal]] = {}
    for signal in dict.fromkeys(signal for job in jobs for signal in _of_proxy(job.method)):
        if model is not None and _has(model, signal):
            passes.setdefault(signal.pass_over(), []).append(signal)
    if not passes:
        return 0.0
    begun, rows = time.monotonic(), np.arange(len(pool))
    for signals in passes.values():
        extract(signals, model, pool, rows, where, proxy)
    return time.monotonic() - begun


def _of_proxy(method: Method) -> Iterable[Signal]:
    """The signals of a method that the proxy computes."""
    others = method.checkpoints()
    return (
        signal
        for name, signal in method.signals().items()
        if isinstance(signal, ProxySignal) and name not in others
    )


def _has(model: Vlm, signal: Signal) -> bool:
    """Whether `model` has what the signal reads; if not its method will say so."""
    try:
        signal.reads(model)
    except UsageError:
        return False
    return True


def _report(out: Path, runs: Mapping[str, Run], skipped: Mapping[str, str], seconds: float) -> None:
    """Print size, seconds by stage and sources of every subset, and how they compare."""
    times = {name: run.manifest["times"] for name, run in runs.items()}
    stages = list(dict.fromkeys(stage for of_run in times.values() for stage in of_run))
    rows = (
        (
            name,
            str(runs[name].manifest["subset"]["n"]),
            *(f"{of_run[stage]:.1f}" if stage in of_run else "" for stage in stages),
        )
        for name, of_run in times.items()
    )
    print_table("seconds by stage", ("method", "samples", *stages), rows)
    print(f"signals of the proxy, in as few passes as they can share: {seconds:.1f} s")

    # Share of every source in the pool and in each subset, largest source first.
    shares = {name: shares_of(run) for name, run in runs.items()}
    in_pool = next(iter(shares.values()))
    counts = {"pool": [n for _, n, _ in in_pool]}
    counts |= {name: [chosen for *_, chosen in of_run] for name, of_run in shares.items()}
    headings = ("method", *(source for source, *_ in in_pool))
    rows = ((name, *(f"{n / sum(of_run):.1%}" for n in of_run)) for name, of_run in counts.items())
    print_table("share of each source", headings, rows)

    if len(runs) > 1:
        compare(list(runs.values()), out / "compare")
    for name, reason in skipped.items():
        print(f"not run: {name}: {reason}")
