"""The one loop that runs a proxy over a pool: blocks, batches, ranks, resume, quarantine.

Rows are computed in blocks that are committed one by one, so a run may be killed at any time and
the same command continues. Missing blocks are dealt to the ranks in turn. Inside a block, samples
that share a padded length are batched together, the longest first, so that a lack of memory shows
early. A row's numbers do not depend on batch size, block size or number of processes: see
`llava.vlm.base`. A sample that cannot be scored is listed with the reason, never replaced. One
that another store of the same inputs holds is copied from there: see `selection.reuse`.
"""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset

from llava.errors import DataError, UsageError, UserError
from llava.images import open_image
from llava.progress import Progress
from llava.vlm.base import Vlm
from selection.pool import Pool
from selection.ranks import Ranks
from selection.reuse import Known, write_uids
from selection.signals.base import Item, Sample, Signal
from selection.store import (
    DEFAULT_BLOCK_SIZE,
    Column,
    StoreReader,
    StoreWriter,
    is_complete,
    store_folder,
)

BATCH_SIZE = 16
MAX_TOKENS = 16384
MAX_BAD = 0.001


@dataclass(frozen=True)
class Unusable:
    """A sample that could not be prepared, and why."""

    reason: str


def signal_identity(signal: Signal, proxy: Vlm, pool: Pool, rows: np.ndarray) -> dict[str, Any]:
    """Everything that decides the numbers of `signal` over `rows`: what a store answers for."""
    inputs = {**signal.reads(proxy), "proxy": proxy.identity(), "pool": pool.digest(rows)}
    return {**signal.identity(), **inputs}


def extract(
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
    max_bad: float = MAX_BAD,
    extra_roots: Sequence[Path] = (),
    ranks: Ranks | None = None,
    progress: bool = True,
) -> StoreReader:
    """Compute what is missing of `signal` for pool `rows` (n,), in that order, and open the store.

    Under torchrun every rank calls this, with the `ranks` of the process if it has made some. A
    batch holds at most `batch_size` samples and `max_tokens` tokens, padding included.
    `num_workers` processes prepare samples while the device computes; 0 prepares in line. Links in
    the image folder may lead to `extra_roots`.

    Raises DataError when more than `max_bad` of the rows (as a share; one always may) cannot be
    scored, UsageError when the image folder is missing, StorageError when the disk refuses.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if signal.reads_images:
        check_images(pool, rows, image_folder)
    ranks = ranks or Ranks()
    target = (signal.name, signal_identity(signal, proxy, pool, rows), rows, signal.columns(proxy))
    folder = store_folder(store_root, *target)
    if not ranks.from_first(lambda: is_complete(folder)):
        ranks.from_first(lambda: signal.begin(proxy, pool, rows))
        if not ranks.is_first:
            ranks.barrier()  # rank 0 begins the store and fixes its block size
        writer = StoreWriter.open(store_root, *target, block_size, ranks.rank)
        if ranks.is_first:
            ranks.barrier()
        missing = ranks.from_first(writer.missing_blocks)
        samples = Samples(signal, proxy, pool, image_folder, extra_roots)
        known = Known.find(store_root, target[0], target[1], pool, rows, target[3])
        allowed = allowed_bad(len(rows), max_bad)
        run = _Run(signal, proxy, samples, batch_size, max_tokens, allowed, known)
        run.write_blocks(writer, missing[ranks.rank :: ranks.world_size], num_workers, progress)
        ranks.barrier()
        if ranks.is_first:
            write_uids(folder, pool, rows)
            writer.finish()
        ranks.barrier()
    reader = StoreReader.open(folder)
    check_bad(reader.bad, allowed_bad(len(rows), max_bad), pool, folder)
    return reader


def allowed_bad(n_rows: int, max_bad: float) -> int:
    """How many of `n_rows` samples may be unusable: the share `max_bad`, but at least one."""
    return max(1, math.floor(max_bad * n_rows))


def check_bad(bad: Sequence[dict], allowed: int, pool: Pool, folder: Path) -> None:
    """Raise DataError naming the first unusable samples when there are more than `allowed`."""
    if len(bad) <= allowed:
        return
    first = "; ".join(f"row {note['row']}: {note['reason']}" for note in bad[:5])
    more = "; ..." if len(bad) > 5 else ""
    raise DataError(
        f"{pool.path}: {len(bad)} samples cannot be scored, {allowed} may: {first}{more}. Correct "
        f"them and delete {folder}, or raise --max-bad"
    )


class Samples(Dataset):
    """Pool rows as items of a signal; runs in loader processes."""

    def __init__(
        self,
        signal: Signal,
        proxy: Vlm,
        pool: Pool,
        image_folder: str | Path | None,
        extra_roots: Sequence[Path] = (),
    ) -> None:
        self.signal, self.proxy, self.pool = signal, proxy, pool
        self.image_folder = None if image_folder is None else Path(image_folder)
        self.extra_roots = tuple(extra_roots)

    def __getitem__(self, row: int) -> Item | Unusable:
        if row in self.pool.bad:
            return Unusable(self.pool.bad[row])
        try:
            record = self.pool.record(row)
            shown = self.signal.reads_images and bool(self.pool.has_image[row])
            image = self._open(record.image) if shown else None
            sample = Sample(row, self.pool.uid(row), record, image)
            return self.signal.prepare(self.proxy, sample)
        except UserError as error:
            return Unusable(str(error))
        except MemoryError:
            return Unusable("out of memory while opening or preparing it")

    def _open(self, ref: str) -> Image:
        return open_image(self.image_folder, ref, extra_roots=self.extra_roots)

    def note(self, row: int, reason: str) -> dict[str, Any]:
        """How a store lists a sample without numbers."""
        note = {"row": row, "uid": self.pool.uid(row), "reason": reason}
        if self.pool.has_image[row]:
            note["image"] = self.pool.record(row).image
        return note


class _Run:
    """One rank's share of an extraction."""

    def __init__(
        self,
        signal: Signal,
        proxy: Vlm,
        samples: Samples,
        batch_size: int,
        max_tokens: int,
        allowed: int,
        known: Known,
    ) -> None:
        self.signal, self.proxy, self.samples = signal, proxy, samples
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.allowed, self.known = allowed, known
        self.columns = {column.name: column for column in signal.columns(proxy)}

    def write_blocks(
        self, writer: StoreWriter, blocks: Sequence[int], num_workers: int, progress: bool
    ) -> None:
        """Compute what is not known of `blocks`, and commit them. Stops with DataError once too
        many samples are unusable."""
        block_rows = [writer.block_rows(block) for block in blocks]
        rows = [int(row) for mine in block_rows for row in mine[self.known.lacks(mine)]]
        items = iter(load(self.samples, rows, num_workers, writer.block_size))
        bad: list[dict[str, Any]] = []
        with Progress(self.signal.name, len(rows), progress) as bar:
            for block, mine in zip(blocks, block_rows, strict=True):
                fresh = self.known.lacks(mine)
                here = [next(items) for _ in range(fresh.sum())]
                arrays, notes = self.compute(mine[fresh].tolist(), here, bar)
                writer.write_block(block, self.known.completed(arrays, mine, fresh), notes)
                bad += notes
                check_bad(bad, self.allowed, self.samples.pool, writer.folder)

    def compute(
        self, rows: list[int], items: list[Item | Unusable], bar: Progress
    ) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """Arrays of one block, NaN (0 for integers) where a sample has no numbers, and the list of
        those samples."""
        arrays = {name: _blank(column, len(rows)) for name, column in self.columns.items()}
        reasons = {i: item.reason for i, item in enumerate(items) if isinstance(item, Unusable)}
        bar.advance(len(reasons), len(reasons))
        for positions in buckets({i: x for i, x in enumerate(items) if i not in reasons}):
            n_tokens = items[positions[0]].n_tokens
            while positions:
                size = max(1, min(len(positions), self.batch_size, self.max_tokens // n_tokens))
                batch, rest = positions[:size], positions[size:]
                found = self._attempt([items[i] for i in batch])
                if found is None and size > 1:
                    self.max_tokens = size // 2 * n_tokens  # for all later batches too
                    continue
                failed = self._store(arrays, batch, found, n_tokens)
                reasons.update(failed)
                bar.advance(size, len(failed))
                positions = rest
        return arrays, [self.samples.note(rows[i], reasons[i]) for i in sorted(reasons)]

    def _attempt(self, items: list[Item]) -> dict[str, np.ndarray] | None:
        """The columns of one batch, or None when it does not fit into memory."""
        try:
            with torch.inference_mode():
                return self.signal.compute(self.proxy, items)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: until here the error's traceback kept the batch's tensors alive.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _store(
        self,
        arrays: dict[str, np.ndarray],
        positions: list[int],
        found: dict[str, np.ndarray] | None,
        n_tokens: int,
    ) -> dict[int, str]:
        """Put a batch's columns in their places; returns the positions that have none, and why."""
        if found is None:
            return {positions[0]: f"out of memory with this sample alone ({n_tokens} tokens)"}
        failed = non_finite(found, self.signal.may_be_nan)
        good = [k for k in range(len(positions)) if k not in failed]
        for name, array in found.items():
            arrays[name][[positions[k] for k in good]] = array[good]
        return {positions[k]: reason for k, reason in failed.items()}


def load(
    samples: Samples, rows: Sequence[int], num_workers: int, ahead: int
) -> Iterator[Item | Unusable]:
    """Prepared samples in the order of `rows`; loader processes stay `ahead` samples ahead."""
    if num_workers == 0:
        return (samples[row] for row in rows)
    # File descriptors, the default way to share tensors, run out with a block in flight.
    torch.multiprocessing.set_sharing_strategy("file_system")
    return iter(
        DataLoader(
            samples,
            batch_size=None,
            sampler=rows,
            num_workers=num_workers,
            prefetch_factor=math.ceil(ahead / num_workers),
            collate_fn=_as_is,
            multiprocessing_context="fork",  # the model is shared with the loaders, not copied
            generator=torch.Generator(),
        )
    )


def buckets(items: dict[int, Item]) -> list[list[int]]:
    """Positions grouped by what may share a batch (`Item.key`), most tokens first."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for position, item in items.items():
        groups[item.key].append(position)
    return sorted(groups.values(), key=lambda group: -items[group[0]].n_tokens)


def non_finite(columns: dict[str, np.ndarray], may_be_nan: Sequence[str] = ()) -> dict[int, str]:
    """Batch rows that hold a NaN or an infinity, and in which column (promise P18).

    In the columns `may_be_nan` only an infinity counts.
    """
    failed: dict[int, str] = {}
    for name, array in columns.items():
        if not np.issubdtype(array.dtype, np.floating):
            continue
        usable = ~np.isinf(array) if name in may_be_nan else np.isfinite(array)
        finite = usable.reshape(len(array), -1).all(1)
        for k in np.flatnonzero(~finite):
            failed.setdefault(int(k), f"{name} is not finite in {array.dtype}")
    return failed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _blank(column: Column, n: int) -> np.ndarray:
    fill = np.nan if np.issubdtype(np.dtype(column.dtype), np.floating) else 0
    return np.full((n, *column.shape), fill, column.dtype)


def _as_is(item: Item | Unusable) -> Item | Unusable:
    return item


def check_images(pool: Pool, rows: np.ndarray, image_folder: str | Path | None) -> None:
    """Raise UsageError when `rows` have images and there is no folder to find them in."""
    if not pool.has_image[rows].any():
        return
    if image_folder is None:
        raise UsageError(f"{pool.path}: has records with images; say where they are with --images")
    if not Path(image_folder).is_dir():
        raise UsageError(f"--images {image_folder}: no such folder")
