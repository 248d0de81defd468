"""What an extraction would cost, from a few real samples: `--dry-run`."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from llava import ranks
from selection.extract.loop import (
    Samples,
    Unusable,
    buckets,
    check_images,
    n_workers,
    store_key,
)
from selection.methods.base import Request
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals.base import Item, Scorer, Signal
from selection.store.store import is_complete

N_PROBED = 64
N_TIMED = 3


def estimate(
    signal: Signal,
    scorer: Scorer,
    pool: Pool,
    rows: np.ndarray,
    where: PoolSettings,
    settings: ProxySettings,
) -> dict[str, Any]:
    """Estimate an extraction of `rows` (n,) by preparing `N_PROBED` of them and running a few.

    Returns `samples`, `folder`, `stored` (already complete), `bytes` on disk (exact), `probed`,
    and, estimated from the probe, `unusable`, `tokens` (padding included), `padding` (share of
    them, None for signals that do not say), `batches`, and `seconds` on all processes.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if signal.reads_images:
        check_images(pool, rows, where.images)
    key = store_key(signal, scorer, pool, rows)
    folder = key.folder(settings.store)
    probe = rows[np.unique(np.linspace(0, len(rows) - 1, N_PROBED).astype(int))]

    # Preparing is timed on the whole probe, computing on its first batches.
    samples = Samples(signal, scorer, pool, where)
    started = time.perf_counter()
    prepared = [samples[int(row)] for row in probe]
    preparing = (time.perf_counter() - started) / len(probe) * len(rows)
    items = {i: item for i, item in enumerate(prepared) if not isinstance(item, Unusable)}
    scale = len(rows) / len(probe)
    tokens = round(sum(item.n_tokens for item in items.values()) * scale)
    computing = tokens * _seconds_per_token(signal, scorer, items, settings)

    # Loader processes prepare while the device computes; without them one waits for the other.
    workers = n_workers(settings)
    loading = preparing / max(workers, 1)
    seconds = max(computing, loading) if workers else computing + loading
    return {
        "samples": len(rows),
        "folder": str(folder),
        "stored": is_complete(folder),
        "bytes": len(rows) * sum(column.row_bytes for column in key.columns),
        "probed": len(probe),
        "unusable": round((len(probe) - len(items)) * scale),
        "tokens": tokens,
        "padding": _padding(list(items.values())),
        "batches": _count_batches(items, len(rows), settings),
        "seconds": seconds / ranks.world_size(),
    }


def print_cost(
    title: str,
    request: Request,
    pool: Pool,
    where: PoolSettings,
    settings: ProxySettings,
    scorer: Scorer,
    at_most: bool = False,
) -> None:
    """Print what extracting one signal would take, from a few samples that are computed to know.

    `at_most`: the rows stand for others that only earlier signals will tell.
    """
    cost = estimate(request.signal, scorer, pool, request.rows, where, settings)
    state = "already stored" if cost["stored"] else f"about {_duration(cost['seconds'])}"
    most, place = ("at most ", "") if at_most else ("", f" in {cost['folder']}")
    print(
        f"{title}: {most}{cost['samples']} samples, {cost['batches']} batches, "
        f"{cost['tokens'] / 1e6:.2f} M tokens, {cost['bytes'] / 2**20:.1f} MiB{place}, "
        f"{state} (measured on {cost['probed']} samples)"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _seconds_per_token(
    signal: Signal, scorer: Scorer, items: dict[int, Item], settings: ProxySettings
) -> float:
    """Median over a few batches of the probe, after one to warm up."""
    seconds = []
    for positions in [group[:1] for group in buckets(items)[:1]] + buckets(items)[:N_TIMED]:
        n_tokens = items[positions[0]].n_tokens
        size = max(1, min(settings.batch_size, settings.max_tokens // n_tokens))
        batch = [items[i] for i in positions[:size]]
        started = time.perf_counter()
        with torch.inference_mode():
            signal.compute(scorer, batch)
        seconds.append((time.perf_counter() - started) / (n_tokens * len(batch)))
    return float(np.median(seconds[1:])) if seconds else 0.0


def _padding(items: list[Item]) -> float | None:
    real = [len(item.input_ids) for item in items if hasattr(item, "input_ids")]
    if not items or len(real) < len(items):
        return None
    return 1 - sum(real) / sum(item.n_tokens for item in items)


def _count_batches(items: dict[int, Item], n_rows: int, settings: ProxySettings) -> int:
    """Batches of the whole run if every block is mixed like the probe."""
    block_size = min(settings.block_size, n_rows)
    per_block = 0
    for positions in buckets(items):
        size = max(1, min(settings.batch_size, settings.max_tokens // items[positions[0]].n_tokens))
        per_block += math.ceil(len(positions) / len(items) * block_size / size)
    return math.ceil(per_block * n_rows / block_size)
