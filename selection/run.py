"""One `select` run: the signals that are missing, scores, subset, and a folder that replays it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import UsageError
from llava.runs import claim_folder
from llava.vlm import load_vlm, pick_device
from llava.vlm.base import Vlm
from selection.ranks import Ranks

from . import export
from .budget import budget_size
from .extract import check_images, extract
from .methods.base import Context, Request
from .plan import plan
from .pool import Pool
from .settings import PoolSettings, ProxySettings, Run, dump
from .signals.base import Signal
from .store import StoreReader
from .summary import print_summary

SCHEMA = 1
"""Raised when the code chooses other samples for the same settings."""


class Selection:
    """A `select` run of one or several processes: rank 0 decides and writes, all ranks extract."""

    def __init__(self, run: Run, ranks: Ranks) -> None:
        self.run, self.ranks = run, ranks
        self.times: dict[str, float] = {}
        self.readers: dict[str, StoreReader] = {}
        with self._timed("open pool"):
            self.pool = Pool.open(run.pool.pool, run.pool.limit)
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
        identity = self._identity(self.proxy.identity() if signals else None)
        out, finished = self.ranks.from_first(lambda: claim_folder(self._wanted_folder(), identity))
        if finished:
            if self.ranks.is_first:
                print(f"{out} already holds this run")
                print_summary(out)
            return out
        self._read({name: Request(signal, rows) for name, signal in signals.items()})
        if self.ranks.is_first:
            self._decide(out)
            self.ranks.share(None)
        else:
            while (requests := self.ranks.share(None)) is not None:
                self._read(requests)
        return out

    def _decide(self, out: Path) -> None:
        """Rank 0: score, choose, write. The other ranks wait for requests meanwhile."""
        method, seed = self.run.method, self.run.select.seed

        def more(requests: Mapping[str, Request]) -> Mapping[str, StoreReader]:
            return self._read(self.ranks.share(requests))

        context = Context(self.pool, dict(self.readers))
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
            identity=self.proxy.identity() if self.readers else None,
            signals={name: _describe(reader) for name, reader in self.readers.items()},
            bad=[note for reader in self.readers.values() for note in reader.bad],
            seed=seed,
            times={name: round(seconds, 2) for name, seconds in self.times.items()},
        )
        print_summary(out)

    def _read(self, requests: Mapping[str, Request]) -> dict[str, StoreReader]:
        """Compute what is missing of some signals; every rank calls this with the same requests."""
        found = {}
        for name, request in requests.items():
            proxy = self.proxy
            with self._timed(f"signal {name}"):
                found[name] = extract_signal(
                    request.signal,
                    request.rows,
                    self.pool,
                    self.run.pool,
                    self.run.proxy,
                    self.ranks,
                    proxy,
                )
        self.readers.update(found)
        return found

    def _identity(self, proxy: dict[str, Any] | None) -> dict[str, Any]:
        """What this run is: another value of any of these is another run (promise P10)."""
        return {
            "pool": {"sha256": self.pool.sha256, "n": len(self.pool), "limit": self.run.pool.limit},
            "method": self.run.method.name,
            "settings": export.plain_settings(self.run.method.settings),
            "budget": self.k,
            "seed": self.run.select.seed,
            "proxy": proxy,
            "schema": SCHEMA,
        }

    def _wanted_folder(self) -> tuple[Path, bool]:
        """The run folder, and whether one beside it will do: always when the user named none."""
        settings, pool = self.run.select, Path(self.run.pool.pool)
        if settings.out:
            return Path(settings.out), settings.force_new
        label = pool.resolve().parent.name if pool.stem == "pool" else pool.stem
        budget = settings.budget.replace("%", "pct")
        return Path("outputs") / f"{self.run.method.name}-{label}-{budget}", True

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.times[stage] = time.monotonic() - started


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
    """Compute what is missing of `signal` on pool `rows` (n,) with the given settings."""
    return extract(
        signal,
        proxy or open_proxy(settings),
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


def print_plan(
    pool: Pool,
    signals: Mapping[str, Signal],
    where: PoolSettings,
    settings: ProxySettings,
    foreseen: Mapping[str, Request] | None = None,
) -> None:
    """What extracting `signals` for the whole pool would take; computes a few samples to know.

    `foreseen`: what comes after them, on rows that only they will tell.
    """
    if not signals:
        print(f"{len(pool)} samples; no signal to compute: a second or two")
        return
    proxy = open_proxy(settings)
    rows = np.arange(len(pool))
    requests = {name: Request(signal, rows) for name, signal in signals.items()}
    later = foreseen or {}
    for name, request in {**requests, **later}.items():
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
        most, place = ("", f" in {found['folder']}") if name in requests else ("at most ", "")
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
