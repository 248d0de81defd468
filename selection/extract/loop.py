"""The one loop that runs a proxy over a pool: blocks, batches, ranks, resume, quarantine.

Rows are computed in blocks that are committed one by one, so a run may be killed at any time and
the same command continues. Missing blocks are dealt to the ranks in turn. Inside a block, samples
that share a padded length are batched together, the longest first, so that a lack of memory shows
early. A row's numbers do not depend on batch size, block size or number of processes: see
`llava.vlm.base`. A sample that cannot be scored is listed with the reason, never replaced. One
that another store of the same inputs holds is copied from there: see `selection.store.reuse`.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava import children, ranks
from llava.errors import DataError, UsageError, UserError
from llava.images import open_image
from llava.progress import Progress
from llava.vlm import pick_device
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals.base import Item, OwnModelSignal, Sample, Scorer, Signal
from selection.store.key import Column, StoreKey
from selection.store.reuse import Known, write_uids
from selection.store.store import StoreReader, StoreWriter, is_complete


@dataclass(frozen=True)
class Unusable:
    """A sample that could not be prepared, and why."""

    reason: str


def store_key(signal: Signal, scorer: Scorer, pool: Pool, rows: np.ndarray) -> StoreKey:
    """What decides the numbers of `signal` over pool `rows` (n,): what its store answers for."""
    inputs = {
        **signal.identity(),
        **signal.reads(scorer),
        "proxy": scorer.identity(),
        "pool": pool.digest(rows),
    }
    return StoreKey(signal.name, inputs, rows, signal.columns(scorer))


def extract(
    signals: Sequence[Signal],
    scorer: Scorer,
    pool: Pool,
    rows: np.ndarray,
    where: PoolSettings,
    settings: ProxySettings,
    progress: bool = True,
) -> list[StoreReader]:
    """Compute what is missing of `signals` for pool `rows` (n,), in that order; open the stores.

    Several signals must be such as share a pass (`Signal.pass_over`): each sample goes through the
    scorer once for all of them. Under a launcher every rank calls this. `where` says where the
    images are, `settings` how batches, blocks and loader processes are cut, where the stores lie
    and how many samples may be unusable.

    Raises DataError when more than `max_bad` of the rows (as a share; one always may) cannot be
    scored, UsageError when the image folder is missing, StorageError when the disk refuses.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if signals[0].reads_images:
        check_images(pool, rows, where.images)
    allowed = allowed_bad(len(rows), settings.max_bad)
    keys = [store_key(signal, scorer, pool, rows) for signal in signals]
    folders = [key.folder(settings.store) for key in keys]

    # Rank 0 looks, the others hear of it: all agree on what is missing even while files change.
    parts = []
    for signal, key, folder in zip(signals, keys, folders, strict=True):
        if ranks.from_main(functools.partial(is_complete, folder)):
            continue
        ranks.from_main(functools.partial(signal.begin, scorer, pool, rows))
        known = Known.find(settings.store, key, pool)
        writer = _open_writer(key, settings)
        missing = set(ranks.from_main(writer.missing_blocks))
        parts.append(_Part(signal, signal.columns(scorer), writer, known, missing))

    for group in _by_block_size(parts):
        samples = Samples(group[0].signal, scorer, pool, where)
        run = _Run(group, scorer, samples, settings, allowed)
        blocks = sorted(set.union(*(part.missing for part in group)))
        run.write_blocks(blocks[ranks.rank() :: ranks.world_size()], progress)
    for part in parts:
        ranks.barrier()
        if ranks.rank() == 0:
            write_uids(part.writer.folder, pool, rows)
            part.writer.finish()
        ranks.barrier()
    readers = [StoreReader.open(folder) for folder in folders]
    for reader in readers:
        check_bad(reader.bad, allowed, pool, reader.folder)
    return readers


def extract_signal(
    signal: Signal,
    rows: np.ndarray,
    pool: Pool,
    where: PoolSettings,
    settings: ProxySettings,
    proxy: Scorer | None = None,
) -> StoreReader:
    """`extract` of one signal on pool `rows` (n,), with `proxy` or with the scorer it brings."""
    if isinstance(signal, OwnModelSignal):
        readers = {
            name: extract_signal(first, its_rows, pool, where, settings)
            for name, (first, its_rows) in signal.before(pool, rows).items()
        }
        proxy = signal.open_model(pool, readers, settings)
    return extract([signal], proxy, pool, rows, where, settings)[0]


def _open_writer(key: StoreKey, settings: ProxySettings) -> StoreWriter:
    if ranks.rank() > 0:
        ranks.barrier()  # rank 0 begins the store and fixes its block size
    writer = StoreWriter.open(settings.store, key, settings.block_size, ranks.rank())
    if ranks.rank() == 0:
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

    def __init__(self, signal: Signal, scorer: Scorer, pool: Pool, where: PoolSettings) -> None:
        self.signal, self.scorer, self.pool = signal, scorer, pool
        self.image_folder = None if where.images is None else Path(where.images)
        self.extra_roots = tuple(map(Path, where.image_roots))

    def __getitem__(self, row: int) -> Item | Unusable:
        if row in self.pool.bad:
            return Unusable(self.pool.bad[row])
        try:
            record = self.pool.record(row)
            shown = self.signal.reads_images and bool(self.pool.has_image[row])
            image = None
            if shown:
                image = open_image(self.image_folder, record.image, extra_roots=self.extra_roots)
            return self.signal.prepare(self.scorer, Sample(row, self.pool.uid(row), record, image))
        except UserError as error:
            return Unusable(str(error))
        except MemoryError:
            return Unusable("out of memory while opening or preparing it")

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
    columns: list[Column]
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
        scorer: Scorer,
        samples: Samples,
        settings: ProxySettings,
        allowed: int,
    ) -> None:
        self.parts, self.scorer, self.samples, self.allowed = parts, scorer, samples, allowed
        self.signals = [part.signal for part in parts]
        self.batch_size, self.max_tokens = settings.batch_size, settings.max_tokens
        self.num_workers = n_workers(settings)

    def write_blocks(self, blocks: Sequence[int], progress: bool) -> None:
        """Compute what is not known of `blocks`, and commit them. Stops with DataError once too
        many samples are unusable."""
        writer = self.parts[0].writer
        all_rows = [writer.block_rows(block) for block in blocks]
        fresh = [self._fresh(*pair) for pair in zip(blocks, all_rows, strict=True)]
        to_compute = [rows[new].tolist() for rows, new in zip(all_rows, fresh, strict=True)]
        order = list(itertools.chain.from_iterable(to_compute))
        items = iter(load(self.samples, order, self.num_workers, writer.block_size))
        name = " + ".join(signal.name for signal in self.signals)
        with Progress(name, len(order), progress) as bar:
            for block, rows, new, rows_new in zip(blocks, all_rows, fresh, to_compute, strict=True):
                computed = self.compute(rows_new, list(itertools.islice(items, len(rows_new))), bar)
                for part, (arrays, notes) in zip(self.parts, computed, strict=True):
                    if block in part.missing:
                        self._commit(part, block, rows, new, arrays, notes)

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
        arrays = [{c.name: _blank(c, len(rows)) for c in part.columns} for part in self.parts]
        unusable = {i: item.reason for i, item in enumerate(items) if isinstance(item, Unusable)}
        reasons = [dict(unusable) for _ in self.parts]
        bar.advance(len(unusable), len(unusable))
        for positions in buckets({i: x for i, x in enumerate(items) if i not in unusable}):
            n_tokens = items[positions[0]].n_tokens
            while positions:
                size = max(1, min(len(positions), self.batch_size, self.max_tokens // n_tokens))
                batch, rest = positions[:size], positions[size:]
                columns = self._attempt([items[i] for i in batch])
                if columns is None and size > 1:
                    self.max_tokens = size // 2 * n_tokens  # for all later batches too
                    continue
                failed = self._store(arrays, batch, columns, n_tokens)
                for so_far, new in zip(reasons, failed, strict=True):
                    so_far.update(new)
                bar.advance(size, len(set().union(*failed)))
                positions = rest
        notes = [[self.samples.note(rows[i], why[i]) for i in sorted(why)] for why in reasons]
        return list(zip(arrays, notes, strict=True))

    def _attempt(self, items: list[Item]) -> list[dict[str, np.ndarray]] | None:
        """The columns of one batch by signal, or None when it does not fit into memory."""
        try:
            with torch.inference_mode():
                if len(self.signals) > 1:
                    return self.signals[0].compute_together(self.signals, self.scorer, items)
                return [self.signals[0].compute(self.scorer, items)]
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
        columns: list[dict[str, np.ndarray]] | None,
        n_tokens: int,
    ) -> list[dict[int, str]]:
        """Put a batch's columns in their places; returns by signal the positions that have none,
        and why."""
        if columns is None:
            reason = f"out of memory with this sample alone ({n_tokens} tokens)"
            return [{positions[0]: reason} for _ in self.parts]
        reasons = []
        for signal, into, of_signal in zip(self.signals, arrays, columns, strict=True):
            failed = non_finite(of_signal, signal.may_be_nan)
            good = [k for k in range(len(positions)) if k not in failed]
            for name, array in of_signal.items():
                into[name][[positions[k] for k in good]] = array[good]
            reasons.append({positions[k]: reason for k, reason in failed.items()})
        return reasons


def n_workers(settings: ProxySettings) -> int:
    """Loader processes of each rank."""
    if settings.num_workers >= 0:
        return settings.num_workers
    return 4 if pick_device(settings.device).type == "cuda" else 0


def load(
    samples: Samples, rows: Sequence[int], num_workers: int, ahead: int
) -> Iterator[Item | Unusable]:
    """Prepared samples in the order of `rows`; loader processes stay `ahead` samples ahead."""
    if num_workers == 0:
        return (samples[row] for row in rows)
    # File descriptors, the default way to share tensors, run out with a block in flight. Files in
    # /dev/shm are deleted by a process that PyTorch starts for each loader, once nobody has them
    # open: soon after a kill, if the loaders end too.
    torch.multiprocessing.set_sharing_strategy("file_system")
    parent = os.getpid()
    return iter(
        DataLoader(
            samples,
            batch_size=None,
            sampler=rows,
            num_workers=num_workers,
            prefetch_factor=math.ceil(ahead / num_workers),
            collate_fn=_as_is,
            worker_init_fn=lambda _: children.end_with(parent),
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
