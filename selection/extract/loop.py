"""The one loop that runs a proxy over a pool: blocks, batches, ranks, resume, quarantine.

Rows are computed in blocks that are committed one by one, so a run may be killed at any time and
the same command continues. Missing blocks are dealt to the ranks in turn. Inside a block, samples
that share a padded length are batched together, the longest first, so that a lack of memory shows
early. A row's numbers do not depend on batch size, block size or number of processes: see
`llava.vlm.base`. A sample that cannot be scored is listed with the reason, never replaced. One
that another store of the same inputs holds is copied from there: see `selection.store.reuse`.
"""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from selection.pool.pool import Pool
from selection.ranks import Ranks
from selection.signals.base import Item, Sample, Signal
from selection.store.reuse import Known, write_uids
from selection.store.store import (
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


def extract(signal: Signal, *where: Any, **options: Any) -> StoreReader:
    """Compute what is missing of one `signal` and open its store; see `extract_together`."""
    return extract_together([signal], *where, **options)[0]


def extract_together(
    signals: Sequence[Signal],
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
) -> list[StoreReader]:
    """Compute what is missing of `signals` for pool `rows` (n,), in that order; open the stores.

    Several signals must be such as share a pass (`Signal.pass_over`): each sample goes through the
    model once for all of them. Under torchrun every rank calls this, with the `ranks` of the
    process if it has made some. A batch holds at most `batch_size` samples and `max_tokens` tokens,
    padding included. `num_workers` processes prepare samples while the device computes; 0 prepares
    in line. Links in the image folder may lead to `extra_roots`.

    Raises DataError when more than `max_bad` of the rows (as a share; one always may) cannot be
    scored, UsageError when the image folder is missing, StorageError when the disk refuses.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if signals[0].reads_images:
        check_images(pool, rows, image_folder)
    ranks, allowed = ranks or Ranks(), allowed_bad(len(rows), max_bad)
    targets = [
        (signal.name, signal_identity(signal, proxy, pool, rows), rows, signal.columns(proxy))
        for signal in signals
    ]
    folders = [store_folder(store_root, *target) for target in targets]
    parts = []
    for signal, target, folder in zip(signals, targets, folders, strict=True):
        if not ranks.from_first(lambda folder=folder: is_complete(folder)):
            ranks.from_first(lambda signal=signal: signal.begin(proxy, pool, rows))
            known = Known.find(store_root, target[0], target[1], pool, rows, target[3])
            writer = _open_writer(store_root, target, block_size, ranks)
            parts.append(_Part(signal, writer, known, set(ranks.from_first(writer.missing_blocks))))
    for group in _by_block_size(parts):
        samples = Samples(group[0].signal, proxy, pool, image_folder, extra_roots)
        run = _Run(group, proxy, samples, batch_size, max_tokens, allowed)
        blocks = sorted(set.union(*(part.missing for part in group)))
        run.write_blocks(blocks[ranks.rank :: ranks.world_size], num_workers, progress)
    for part in parts:
        ranks.barrier()
        if ranks.is_first:
            write_uids(part.writer.folder, pool, rows)
            part.writer.finish()
        ranks.barrier()
    readers = [StoreReader.open(folder) for folder in folders]
    for reader in readers:
        check_bad(reader.bad, allowed, pool, reader.folder)
    return readers


def _open_writer(root: str | Path, target: tuple, block_size: int, ranks: Ranks) -> StoreWriter:
    if not ranks.is_first:
        ranks.barrier()  # rank 0 begins the store and fixes its block size
    writer = StoreWriter.open(root, *target, block_size, ranks.rank)
    if ranks.is_first:
        ranks.barrier()
    return writer


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


@dataclass
class _Part:
    """One signal of an extraction: where its blocks go, which are missing, what is known."""

    signal: Signal
    writer: StoreWriter
    known: Known
    missing: set[int]
    bad: list[dict[str, Any]] = field(default_factory=list)


def _by_block_size(parts: list[_Part]) -> list[list[_Part]]:
    """Stores that were begun with another block size cannot be filled in the same pass."""
    groups: dict[int, list[_Part]] = defaultdict(list)
    for part in parts:
        groups[part.writer.block_size].append(part)
    return list(groups.values())


class _Run:
    """One rank's share of an extraction."""

    def __init__(
        self,
        parts: list[_Part],
        proxy: Vlm,
        samples: Samples,
        batch_size: int,
        max_tokens: int,
        allowed: int,
    ) -> None:
        self.parts, self.proxy, self.samples = parts, proxy, samples
        self.batch_size, self.max_tokens, self.allowed = batch_size, max_tokens, allowed
        self.signals = [part.signal for part in parts]
        self.columns = [part.signal.columns(proxy) for part in parts]

    def write_blocks(self, blocks: Sequence[int], num_workers: int, progress: bool) -> None:
        """Compute what is not known of `blocks`, and commit them. Stops with DataError once too
        many samples are unusable."""
        writer = self.parts[0].writer
        block_rows = [writer.block_rows(block) for block in blocks]
        fresh = [self._fresh(*pair) for pair in zip(blocks, block_rows, strict=True)]
        rows = [int(row) for mine, new in zip(block_rows, fresh, strict=True) for row in mine[new]]
        items = iter(load(self.samples, rows, num_workers, writer.block_size))
        name = " + ".join(signal.name for signal in self.signals)
        with Progress(name, len(rows), progress) as bar:
            for block, mine, new in zip(blocks, block_rows, fresh, strict=True):
                here = [next(items) for _ in range(new.sum())]
                found = self.compute(mine[new].tolist(), here, bar)
                for part, (arrays, notes) in zip(self.parts, found, strict=True):
                    if block in part.missing:
                        self._commit(part, block, mine, new, arrays, notes)

    def _fresh(self, block: int, rows: np.ndarray) -> np.ndarray:
        """Which `rows` (n,) of a block some signal has yet to be computed on, (n,) bool."""
        lacking = [part.known.lacks(rows) for part in self.parts if block in part.missing]
        return np.logical_or.reduce(lacking)

    def _commit(
        self,
        part: _Part,
        block: int,
        rows: np.ndarray,
        fresh: np.ndarray,
        arrays: dict[str, np.ndarray],
        notes: list[dict[str, Any]],
    ) -> None:
        notes = [note for note in notes if part.known.lacks(np.array([note["row"]]))]
        part.writer.write_block(block, part.known.completed(arrays, rows, fresh), notes)
        part.bad += notes
        check_bad(part.bad, self.allowed, self.samples.pool, part.writer.folder)

    def compute(
        self, rows: list[int], items: list[Item | Unusable], bar: Progress
    ) -> list[tuple[dict[str, np.ndarray], list[dict[str, Any]]]]:
        """Of each signal the arrays of one block, NaN (0 for integers) where a sample has no
        numbers, and the list of those samples."""
        arrays = [{c.name: _blank(c, len(rows)) for c in columns} for columns in self.columns]
        unusable = {i: item.reason for i, item in enumerate(items) if isinstance(item, Unusable)}
        reasons = [dict(unusable) for _ in self.parts]
        bar.advance(len(unusable), len(unusable))
        for positions in buckets({i: x for i, x in enumerate(items) if i not in unusable}):
            n_tokens = items[positions[0]].n_tokens
            while positions:
                size = max(1, min(len(positions), self.batch_size, self.max_tokens // n_tokens))
                batch, rest = positions[:size], positions[size:]
                found = self._attempt([items[i] for i in batch])
                if found is None and size > 1:
                    self.max_tokens = size // 2 * n_tokens  # for all later batches too
                    continue
                failed = self._store(arrays, batch, found, n_tokens)
                for mine, new in zip(reasons, failed, strict=True):
                    mine.update(new)
                bar.advance(size, len(set().union(*failed)))
                positions = rest
        notes = [[self.samples.note(rows[i], mine[i]) for i in sorted(mine)] for mine in reasons]
        return list(zip(arrays, notes, strict=True))

    def _attempt(self, items: list[Item]) -> list[dict[str, np.ndarray]] | None:
        """The columns of one batch by signal, or None when it does not fit into memory."""
        try:
            with torch.inference_mode():
                if len(self.signals) > 1:
                    return self.signals[0].compute_together(self.signals, self.proxy, items)
                return [self.signals[0].compute(self.proxy, items)]
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
        arrays: list[dict[str, np.ndarray]],
        positions: list[int],
        found: list[dict[str, np.ndarray]] | None,
        n_tokens: int,
    ) -> list[dict[int, str]]:
        """Put a batch's columns in their places; returns by signal the positions that have none,
        and why."""
        if found is None:
            reason = f"out of memory with this sample alone ({n_tokens} tokens)"
            return [{positions[0]: reason} for _ in self.parts]
        reasons = []
        for signal, into, columns in zip(self.signals, arrays, found, strict=True):
            failed = non_finite(columns, signal.may_be_nan)
            good = [k for k in range(len(positions)) if k not in failed]
            for name, array in columns.items():
                into[name][[positions[k] for k in good]] = array[good]
            reasons.append({positions[k]: reason for k, reason in failed.items()})
        return reasons


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
