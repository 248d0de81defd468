"""One `select` run: the signals that are missing, scores, subset, and a folder that replays it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava import ranks
from llava.errors import UsageError
from llava.runs import claim_folder
from selection.methods.base import Context, Request, Task
from selection.output import folder as output
from selection.output.summary import print_summary
from selection.pool.pool import Pool
from selection.pool.targets import Target, read_targets, title_of
from selection.rules.budget import budget_size
from selection.settings import Job, PoolSettings, ProxySettings
from selection.signals.base import OwnModelSignal, Signal

if TYPE_CHECKING:
    from llava.vlm.base import Vlm
    from selection.store.arrays import ArrayReader
    from selection.store.store import StoreReader

PATIENCE = timedelta(hours=6)
"""Longest wait for the slowest process; one that dies ends the wait of the others at once."""
SCHEMA = 1
"""Raised when the code chooses other samples for the same settings."""


class Execution:
    """A job at work in one or several processes: rank 0 decides and writes, all ranks extract."""

    def __init__(self, job: Job, pool: Pool | None = None) -> None:
        """Open the pool, unless it is open already, and read the target tasks."""
        ranks.join(PATIENCE)
        self.job, self.method = job, job.method
        self.times: dict[str, float] = {}
        self.readers: dict[str, StoreReader | ArrayReader] = dict(job.arrays)
        self._other: tuple[ProxySettings, Vlm] | None = None
        with self._timed("open pool"):
            self.pool = pool or Pool.open(job.pool.pool, job.pool.limit)
            self.targets = read_targets(job.targets) if job.targets else ()
        self.k = budget_size(job.select.budget, len(self.pool), job.select.rounding)

    @cached_property
    def proxy(self) -> Vlm:
        """Loaded when the first signal is asked for: `random` needs none."""
        with self._timed("load proxy"):
            return open_proxy(self.job.proxy)

    @cached_property
    def signals(self) -> dict[str, Signal]:
        """The method's signals of the whole pool that no array stands for."""
        return {n: s for n, s in self.method.signals().items() if n not in self.job.arrays}

    def execute(self) -> output.Run:
        """Run to the end, or say that this very run is finished."""
        rows = np.arange(len(self.pool))
        if self.signals:
            from selection.extract.loop import check_images

            check_images(self.pool, rows, self.job.pool.images)
        identity = self.identity()
        out, finished = ranks.from_main(lambda: claim_folder(self._asked_folder(), identity))
        if finished:
            run = output.Run.open(out)
            if ranks.rank() == 0:
                print(f"{out} already holds this run")
                print_summary(run)
            return run

        # The target tasks follow their signal of the pool: of the models beside the proxy only one
        # is in memory at a time.
        of_targets: dict[str, tuple[tuple[StoreReader, ...], ...]] = {}
        for name in self.method.signals():
            if name in self.signals:
                self._read({name: Request(self.signals[name], rows)})
            if name in self.method.target_signals():
                of_targets[name] = self._read_targets(name)

        # Rank 0 runs the method; what its second stage asks for is computed by all.
        if ranks.rank() == 0:
            self._decide(out, self._tasks(of_targets))
            ranks.share(None)
        else:
            while (requests := ranks.share(None)) is not None:
                self._read(requests)
        return output.Run.open(out)

    def identity(self) -> dict[str, Any]:
        """What this run is: another value of any of these is another run (promise P10)."""
        method, job = self.method, self.job
        others = method.checkpoints() if self.signals else {}
        others = {name: where for name, where in others.items() if name in self.signals}
        brought = {n: s.identity() for n, s in self.signals.items() if _brings_model(s)}
        of_proxy = {n: s for n, s in self.signals.items() if not _brings_model(s)}
        reads_proxy = method.reads_proxy(self.pool, job.arrays)
        identity = {
            "pool": {"sha256": self.pool.sha256, "n": len(self.pool), "limit": job.pool.limit},
            "method": method.name,
            "settings": output.plain_settings(method.settings),
            "budget": self.k,
            "seed": job.select.seed,
            "proxy": self.proxy.identity() if reads_proxy else None,
            "schema": SCHEMA,
        }
        if brought:
            identity["signals"] = brought
        read = {name: signal.reads(self._model(name)) for name, signal in of_proxy.items()}
        if read := {name: what for name, what in read.items() if what}:
            identity["read"] = read
        if files := method.files():
            identity["files"] = {n: output.describe_file(Path(path)) for n, path in files.items()}
        if others:
            from llava.model.checkpoint import Checkpoint

            identity["checkpoints"] = {
                name: Checkpoint.open(path, base or job.proxy.model_base).fingerprint()
                for name, (path, base) in others.items()
            }
        if self.targets:
            identity["targets"] = [target.identity() for target in self.targets]
        if job.arrays:
            identity["arrays"] = {n: reader.fingerprint for n, reader in job.arrays.items()}
        if code := method.content():
            identity["code"] = code
        return identity

    def print_plan(self) -> None:
        """What this run would take; computes a few samples to know."""
        method, rows = self.method, np.arange(len(self.pool))
        print(f"{method.name}: {self.k} of {len(self.pool)} samples")
        if not self.signals:
            print("no signal to compute: a second or two")
        for name, signal in self.signals.items():
            self._print_cost(name, name, Request(signal, rows), self.pool, self.job.pool)
            for target in self.targets if name in method.target_signals() else ():
                of_target, where = method.target_signals()[name], self._where(target)
                for subtask in target.subtasks:
                    title = f"{name} of {title_of(target.name, subtask.name)}"
                    request = Request(of_target, subtask.rows)
                    self._print_cost(title, name, request, subtask.pool, where)
        for name, request in method.foreseen(self.pool).items():
            self._print_cost(name, name, request, self.pool, self.job.pool, True)

    def _print_cost(
        self,
        title: str,
        name: str,
        request: Request,
        pool: Pool,
        where: PoolSettings,
        at_most: bool = False,
    ) -> None:
        from selection.extract.cost import print_cost

        signal, settings = request.signal, self.job.proxy
        if not _brings_model(signal):
            print_cost(title, request, pool, where, settings, self._model(name), at_most)
            return
        for part, (first, rows) in signal.before(pool, request.rows).items():
            self._print_cost(f"{title} {part}", name, Request(first, rows), pool, where, at_most)
        scorer = signal.open_model(pool, {}, settings)
        told = signal.forecast(scorer, pool, request.rows)
        if told is None:
            print_cost(title, request, pool, where, settings, scorer, at_most)
        else:
            print(f"{title}: {told}")

    def _where(self, target: Target) -> PoolSettings:
        return replace(self.job.pool, images=target.images)

    def _decide(self, out: Path, tasks: tuple[Task, ...]) -> None:
        """Rank 0: score, choose, write. The other ranks wait for requests meanwhile."""
        method, seed = self.method, self.job.select.seed

        def more(requests: Mapping[str, Request]) -> Mapping[str, StoreReader]:
            return self._read(ranks.share(requests))

        context = Context(self.pool, dict(self.readers), tasks=tasks, k=self.k)
        with self._timed("score and choose"):
            before = sum(self.times.values())
            scored = method.run(context, seed, more)
            chosen = method.select(context, scored.scores, self.k)
            extracting = sum(self.times.values()) - before
        told = [note for reader in self.job.arrays.values() for note in reader.notes]
        scored = replace(scored, notes=(*scored.notes, *told))
        self.times["score and choose"] -= extracting
        of_pool = {name: _describe(reader) for name, reader in self.readers.items()}
        run = output.write_run(
            out,
            pool=self.pool,
            method=method,
            scored=scored,
            rows=chosen,
            config=self.job.config(out),
            identity=self.proxy.identity() if "proxy" in vars(self) else None,
            signals={**of_pool, **_describe_tasks(tasks)},
            bad=[note for reader in self.readers.values() for note in reader.bad],
            seed=seed,
            times={name: round(seconds, 2) for name, seconds in self.times.items()},
            command=self.job.command,
        )
        print_summary(run)

    def _read(self, requests: Mapping[str, Request]) -> dict[str, StoreReader | ArrayReader]:
        """Compute what is missing of some signals; every rank calls this with the same requests."""
        readers = {
            name: self.job.arrays.get(name)
            or self._extract(name, request, self.pool, self.job.pool)
            for name, request in requests.items()
        }
        self.readers.update(readers)
        return readers

    def _read_targets(self, name: str) -> tuple[tuple[StoreReader, ...], ...]:
        """Readers of a target signal, by task and sub-task."""
        signal = self.method.target_signals()[name]
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
                {name: by_task[i] for name, by_task in readers.items()},
            )
            for i, target in enumerate(self.targets)
        )

    def _extract(self, name: str, request: Request, pool: Pool, where: PoolSettings) -> StoreReader:
        from selection.extract.loop import extract_signal

        proxy = None if _brings_model(request.signal) else self._model(name)
        with self._timed(f"signal {name}"):
            return extract_signal(request.signal, request.rows, pool, where, self.job.proxy, proxy)

    def _model(self, name: str) -> Vlm:
        """The model that signal `name` is computed with; of those beside the proxy, one is kept."""
        checkpoints = self.method.checkpoints()
        if name not in checkpoints:
            return self.proxy
        model, base = checkpoints[name]
        settings = replace(
            self.job.proxy, model=model, model_base=base or self.job.proxy.model_base
        )
        if self._other is None or self._other[0] != settings:
            self._other = None  # free its memory first
            with self._timed("load proxy"):
                self._other = (settings, open_proxy(settings))
        return self._other[1]

    def _asked_folder(self) -> tuple[Path, bool]:
        """The run folder, and whether one beside it will do: always when the user named none."""
        settings = self.job.select
        if settings.out:
            return Path(settings.out), settings.force_new
        return default_folder(self.method.name, self.job.pool.pool, settings.budget), True

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.times[stage] = self.times.get(stage, 0.0) + time.monotonic() - started


def default_folder(name: str, pool: str, budget: str) -> Path:
    """Where a run goes that the user has named no folder for."""
    return Path("outputs") / f"{name}-{pool_label(pool)}-{budget.replace('%', 'pct')}"


def pool_label(pool: str) -> str:
    """What a pool is called in the names of folders."""
    path = Path(pool)
    return path.resolve().parent.name if path.stem == "pool" else path.stem


def open_proxy(settings: ProxySettings) -> Vlm:
    """Load the proxy the settings name; UsageError when they name none."""
    from llava.vlm import load_vlm

    if not settings.model:
        raise UsageError(
            "--model is missing: this method reads signals of a proxy model, e.g. a checkpoint "
            "warmed up on 5 % of the pool"
        )
    return load_vlm(settings.model, settings.model_base, settings.dtype, settings.device)


def _brings_model(signal: Signal) -> bool:
    return isinstance(signal, OwnModelSignal)


def _describe(reader: StoreReader | ArrayReader) -> dict[str, Any]:
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
