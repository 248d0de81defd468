"""One `select` run: the signals that are missing, scores, subset, and a folder that replays it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import UsageError
from llava.model.checkpoint import fingerprint
from llava.runs import claim_folder
from llava.vlm import load_vlm, pick_device
from llava.vlm.base import Vlm
from selection.extract.cost import plan
from selection.extract.loop import check_images, extract_together
from selection.methods.base import Context, Request, Task
from selection.output import folder as export
from selection.output.summary import print_summary
from selection.pool.pool import Pool
from selection.pool.targets import Target, read_targets, title_of
from selection.ranks import Ranks
from selection.rules.budget import budget_size
from selection.settings import PoolSettings, ProxySettings, Run, dump
from selection.store.store import StoreReader

SCHEMA = 1
"""Raised when the code chooses other samples for the same settings."""


class Selection:
    """A `select` run of one or several processes: rank 0 decides and writes, all ranks extract."""

    def __init__(self, run: Run, ranks: Ranks) -> None:
        self.run, self.ranks = run, ranks
        self.times: dict[str, float] = {}
        self.readers: dict[str, StoreReader] = {}
        self._other: tuple[ProxySettings, Vlm] | None = None
        with self._timed("open pool"):
            self.pool = Pool.open(run.pool.pool, run.pool.limit)
            self.targets = read_targets(run.targets) if run.targets else ()
        self.k = budget_size(run.select.budget, len(self.pool), run.select.rounding)

    @cached_property
    def proxy(self) -> Vlm:
        """Loaded when the first signal is asked for: `random` needs none."""
        with self._timed("load proxy"):
            return open_proxy(self.run.proxy)

    def execute(self) -> Path:
        """Run to the end, or say that this very run is finished. Returns the run folder."""
        signals = self.run.method.signals()
        rows = np.arange(len(self.pool))
        if signals:
            check_images(self.pool, rows, self.run.pool.images)
        identity = self._identity(signals)
        out, finished = self.ranks.from_first(lambda: claim_folder(self._wanted_folder(), identity))
        if finished:
            if self.ranks.is_first:
                print(f"{out} already holds this run")
                print_summary(out)
            return out
        of_targets: dict[str, tuple[tuple[StoreReader, ...], ...]] = {}
        for name, signal in signals.items():
            self._read({name: Request(signal, rows)})
            if name in self.run.method.target_signals():
                of_targets[name] = self._read_targets(name)
        if self.ranks.is_first:
            self._decide(out, self._tasks(of_targets))
            self.ranks.share(None)
        else:
            while (requests := self.ranks.share(None)) is not None:
                self._read(requests)
        return out

    def print_plan(self) -> None:
        """What this run would take; computes a few samples to know."""
        method, rows = self.run.method, np.arange(len(self.pool))
        print(f"{method.name}: {self.k} of {len(self.pool)} samples")
        if not method.signals():
            print("no signal to compute: a second or two")
        for name, signal in method.signals().items():
            self._print_cost(name, name, Request(signal, rows), self.pool, self.run.pool)
            for target in self.targets if name in method.target_signals() else ():
                request, where = method.target_signals()[name], self._where(target)
                for subtask in target.subtasks:
                    title = f"{name} of {title_of(target.name, subtask.name)}"
                    self._print_cost(
                        title, name, Request(request, subtask.rows), subtask.pool, where
                    )
        for name, request in method.foreseen(self.pool).items():
            self._print_cost(name, name, request, self.pool, self.run.pool, True)

    def _print_cost(self, title, name, request, pool, where, at_most=False) -> None:
        signal, settings = request.signal, self.run.proxy
        for part, (first, rows) in signal.before(pool, request.rows).items():
            self._print_cost(f"{title} {part}", name, Request(first, rows), pool, where, at_most)
        if signal.uses_proxy:
            model = self._model(name)
        else:
            model = signal.open_model(pool, {}, settings.dtype, settings.device)
        told = signal.forecast(model, pool, request.rows)
        if told is not None:
            print(f"{title}: {told}")
        else:
            print_cost(title, request, pool, where, settings, model, at_most)

    def _where(self, target: Target) -> PoolSettings:
        return replace(self.run.pool, images=target.images)

    def _decide(self, out: Path, tasks: tuple[Task, ...]) -> None:
        """Rank 0: score, choose, write. The other ranks wait for requests meanwhile."""
        method, seed = self.run.method, self.run.select.seed

        def more(requests: Mapping[str, Request]) -> Mapping[str, StoreReader]:
            return self._read(self.ranks.share(requests))

        context = Context(self.pool, dict(self.readers), tasks=tasks, k=self.k)
        with self._timed("score and choose"):
            before = sum(self.times.values())
            scored = method.run(context, seed, more)
            chosen = method.select(context, scored.scores, self.k)
            extracting = sum(self.times.values()) - before
        self.times["score and choose"] -= extracting
        export.write_run(
            out,
            pool=self.pool,
            method=method,
            scored=scored,
            rows=chosen,
            config=dump({**self.run.flat, "out": str(out)}),
            identity=self.proxy.identity() if "proxy" in vars(self) else None,
            signals={
                **{name: _describe(reader) for name, reader in self.readers.items()},
                **_describe_tasks(tasks),
            },
            bad=[note for reader in self.readers.values() for note in reader.bad],
            seed=seed,
            times={name: round(seconds, 2) for name, seconds in self.times.items()},
        )
        print_summary(out)

    def _read(self, requests: Mapping[str, Request]) -> dict[str, StoreReader]:
        """Compute what is missing of some signals; every rank calls this with the same requests."""
        found = {
            name: self._extract(name, request, self.pool, self.run.pool)
            for name, request in requests.items()
        }
        self.readers.update(found)
        return found

    def _read_targets(self, name: str) -> tuple[tuple[StoreReader, ...], ...]:
        """Readers of a target signal, by task and sub-task."""
        signal = self.run.method.target_signals()[name]
        return tuple(
            tuple(
                self._extract(
                    name, Request(signal, subtask.rows), subtask.pool, self._where(target)
                )
                for subtask in target.subtasks
            )
            for target in self.targets
        )

    def _tasks(
        self, readers: Mapping[str, tuple[tuple[StoreReader, ...], ...]]
    ) -> tuple[Task, ...]:
        """What a method is told of the targets; `readers` by signal, task and sub-task."""
        return tuple(
            Task(
                target.name,
                target.weight,
                tuple(subtask.name for subtask in target.subtasks),
                {name: found[i] for name, found in readers.items()},
            )
            for i, target in enumerate(self.targets)
        )

    def _extract(self, name: str, request: Request, pool: Pool, where: PoolSettings) -> StoreReader:
        proxy = self._model(name) if request.signal.uses_proxy else None
        with self._timed(f"signal {name}"):
            return extract_signal(
                request.signal, request.rows, pool, where, self.run.proxy, self.ranks, proxy
            )

    def _model(self, name: str) -> Vlm:
        """The model that signal `name` is computed with; of those beside the proxy, one is kept."""
        checkpoints = self.run.method.checkpoints()
        if name not in checkpoints:
            return self.proxy
        model, base = checkpoints[name]
        wanted = replace(self.run.proxy, model=model, model_base=base or self.run.proxy.model_base)
        if self._other is None or self._other[0] != wanted:
            self._other = None  # free its memory first
            with self._timed("load proxy"):
                self._other = (wanted, open_proxy(wanted))
        return self._other[1]

    def _identity(self, signals: Mapping[str, Any]) -> dict[str, Any]:
        """What this run is: another value of any of these is another run (promise P10)."""
        others = self.run.method.checkpoints()
        own = {name: s.identity() for name, s in signals.items() if not s.uses_proxy}
        identity = {
            "pool": {"sha256": self.pool.sha256, "n": len(self.pool), "limit": self.run.pool.limit},
            "method": self.run.method.name,
            "settings": export.plain_settings(self.run.method.settings),
            "budget": self.k,
            "seed": self.run.select.seed,
            "proxy": self.proxy.identity() if self.run.method.reads_proxy(self.pool) else None,
            "schema": SCHEMA,
        }
        if own:
            identity["signals"] = own
        used = {name: s.reads(self._model(name)) for name, s in signals.items() if s.uses_proxy}
        if read := {name: what for name, what in used.items() if what}:
            identity["read"] = read
        if files := self.run.method.files():
            identity["files"] = {
                name: export.describe_file(Path(path)) for name, path in files.items()
            }
        if others:
            base = self.run.proxy.model_base
            identity["checkpoints"] = {
                name: fingerprint(path, own or base) for name, (path, own) in others.items()
            }
        if self.targets:
            identity["targets"] = [target.identity() for target in self.targets]
        return identity

    def _wanted_folder(self) -> tuple[Path, bool]:
        """The run folder, and whether one beside it will do: always when the user named none."""
        settings = self.run.select
        if settings.out:
            return Path(settings.out), settings.force_new
        return default_folder(self.run.method.name, self.run.pool.pool, settings.budget), True

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.times[stage] = self.times.get(stage, 0.0) + time.monotonic() - started


def default_folder(name: str, pool: str, budget: str) -> Path:
    """Where a run goes that the user has named no folder for."""
    path = Path(pool)
    label = path.resolve().parent.name if path.stem == "pool" else path.stem
    return Path("outputs") / f"{name}-{label}-{budget.replace('%', 'pct')}"


def open_proxy(settings: ProxySettings) -> Vlm:
    """Load the proxy the settings name; UsageError when they name none."""
    if not settings.model:
        raise UsageError(
            "--model is missing: this method reads signals of a proxy model, e.g. a checkpoint "
            "warmed up on 5 % of the pool"
        )
    return load_vlm(settings.model, settings.model_base, settings.dtype, settings.device)


def extract_signal(
    signal: Any,
    rows: np.ndarray,
    pool: Pool,
    where: PoolSettings,
    settings: ProxySettings,
    ranks: Ranks,
    proxy: Vlm | None = None,
) -> StoreReader:
    """Compute what is missing of `signal` on pool `rows` (n,) with the given settings.

    Without `proxy` it is the model that the settings name, or the signal's own.
    """
    if not signal.uses_proxy:
        readers = {
            name: extract_signal(first, its_rows, pool, where, settings, ranks)
            for name, (first, its_rows) in signal.before(pool, rows).items()
        }
        proxy = signal.open_model(pool, readers, settings.dtype, settings.device)
    proxy = proxy or open_proxy(settings)
    return extract_together_with([signal], rows, pool, where, settings, ranks, proxy)[0]


def extract_together_with(
    signals: Sequence[Any],
    rows: np.ndarray,
    pool: Pool,
    where: PoolSettings,
    settings: ProxySettings,
    ranks: Ranks,
    proxy: Vlm,
) -> list[StoreReader]:
    """`extract_together` with the given settings."""
    return extract_together(
        signals,
        proxy,
        pool,
        rows,
        settings.store,
        where.images,
        batch_size=settings.batch_size,
        max_tokens=settings.max_tokens,
        block_size=settings.block_size,
        num_workers=_workers(settings),
        max_bad=settings.max_bad,
        extra_roots=[Path(root) for root in where.image_roots],
        ranks=ranks,
    )


def print_cost(
    name: str,
    request: Request,
    pool: Pool,
    where: PoolSettings,
    settings: ProxySettings,
    proxy: Vlm,
    at_most: bool = False,
) -> None:
    """What extracting one signal would take, from a few samples that are computed to know.

    `at_most`: the rows stand for others that only earlier signals will tell.
    """
    found = plan(
        request.signal,
        proxy,
        pool,
        request.rows,
        settings.store,
        where.images,
        batch_size=settings.batch_size,
        max_tokens=settings.max_tokens,
        block_size=settings.block_size,
        num_workers=_workers(settings),
        extra_roots=[Path(root) for root in where.image_roots],
        world_size=Ranks().world_size,
    )
    state = "already stored" if found["stored"] else f"about {_duration(found['seconds'])}"
    most, place = ("at most ", "") if at_most else ("", f" in {found['folder']}")
    print(
        f"{name}: {most}{found['samples']} samples, {found['batches']} batches, "
        f"{found['tokens'] / 1e6:.2f} M tokens, {found['bytes'] / 2**20:.1f} MiB{place}, "
        f"{state} (measured on {found['probed']} samples)"
    )


def _workers(settings: ProxySettings) -> int:
    if settings.num_workers >= 0:
        return settings.num_workers
    return 4 if pick_device(settings.device).type == "cuda" else 0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _describe(reader: StoreReader) -> dict[str, Any]:
    return {
        "folder": str(reader.folder),
        "fingerprint": reader.fingerprint,
        "n_bad": len(reader.bad),
    }


def _describe_tasks(tasks: tuple[Task, ...]) -> dict[str, Any]:
    return {
        f"{signal} of {title_of(task.name, subtask)}": _describe(reader)
        for task in tasks
        for signal, readers in task.readers.items()
        for subtask, reader in zip(task.subtasks, readers, strict=True)
    }
