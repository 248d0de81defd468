"""What an extraction would cost, from a few real samples: `--dry-run`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.vlm.base import Vlm
from selection.extract.loop import (
    BATCH_SIZE,
    MAX_TOKENS,
    Samples,
    Unusable,
    buckets,
    check_images,
    signal_identity,
)
from selection.pool.pool import Pool
from selection.signals.base import Item, Signal
from selection.store.store import DEFAULT_BLOCK_SIZE, is_complete, store_folder

N_PROBED = 64
N_TIMED = 3


def plan(
    signal: Signal,
    proxy: Vlm,
    pool: Pool,
    rows: np.ndarray,
    store_root: str | Path,
    image_folder: str | Path | None,
    *,
    batch_size: int = BATCH_SIZE,
    max_tokens: int = MAX_TOKENS,
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_workers: int = 0,
    extra_roots: Sequence[Path] = (),
    world_size: int = 1,
) -> dict[str, Any]:
    """Estimate an extraction of `rows` (n,) by preparing `N_PROBED` of them and running a few.

    Returns `samples`, `folder`, `stored` (already complete), `bytes` on disk (exact), `probed`,
    and, estimated from the probe, `unusable`, `tokens` (padding included), `padding` (share of
    them, None for signals that do not say), `batches`, and `seconds` on `world_size` processes.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if signal.reads_images:
        check_images(pool, rows, image_folder)
    columns = signal.columns(proxy)
    identity = signal_identity(signal, proxy, pool, rows)
    folder = store_folder(store_root, signal.name, identity, rows, columns)
    probe = rows[np.unique(np.linspace(0, len(rows) - 1, N_PROBED).astype(int))]
    samples = Samples(signal, proxy, pool, image_folder, extra_roots)
    started = time.perf_counter()
    prepared = [samples[int(row)] for row in probe]
    preparing = (time.perf_counter() - started) / len(probe) * len(rows)
    items = {i: item for i, item in enumerate(prepared) if not isinstance(item, Unusable)}
    scale = len(rows) / len(probe)
    tokens = round(sum(item.n_tokens for item in items.values()) * scale)
    computing = tokens * _seconds_per_token(signal, proxy, items, batch_size, max_tokens)
    loading = preparing / max(num_workers, 1)
    seconds = max(computing, loading) if num_workers else computing + loading
    return {
        "samples": len(rows),
        "folder": str(folder),
        "stored": is_complete(folder),
        "bytes": len(rows) * sum(column.row_bytes for column in columns),
        "probed": len(probe),
        "unusable": round((len(probe) - len(items)) * scale),
        "tokens": tokens,
        "padding": _padding(list(items.values())),
        "batches": _count_batches(
            items, len(rows), min(block_size, len(rows)), batch_size, max_tokens
        ),
        "seconds": seconds / world_size,
    }


def _seconds_per_token(
    signal: Signal, proxy: Vlm, items: dict[int, Item], batch_size: int, max_tokens: int
) -> float:
    """Median over a few batches of the probe, after one to warm up."""
    found = []
    for positions in [group[:1] for group in buckets(items)[:1]] + buckets(items)[:N_TIMED]:
        n_tokens = items[positions[0]].n_tokens
        batch = [items[i] for i in positions[: max(1, min(batch_size, max_tokens // n_tokens))]]
        started = time.perf_counter()
        with torch.inference_mode():
            signal.compute(proxy, batch)
        found.append((time.perf_counter() - started) / (n_tokens * len(batch)))
    return float(np.median(found[1:])) if found else 0.0


def _padding(items: list[Item]) -> float | None:
    real = [len(item.input_ids) for item in items if hasattr(item, "input_ids")]
    if not items or len(real) < len(items):
        return None
    return 1 - sum(real) / sum(item.n_tokens for item in items)


def _count_batches(
    items: dict[int, Item], n_rows: int, block_size: int, batch_size: int, max_tokens: int
) -> int:
    """Batches of the whole run if every block is mixed like the probe."""
    block_size = min(block_size, n_rows)
    per_block = 0
    for positions in buckets(items):
        size = max(1, min(batch_size, max_tokens // items[positions[0]].n_tokens))
        per_block += math.ceil(len(positions) / len(items) * block_size / size)
    return math.ceil(per_block * n_rows / block_size)
