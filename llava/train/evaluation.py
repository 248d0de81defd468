"""Loss on held-out samples: the mean over all their supervised tokens.

It depends on neither batch size nor the number of processes, beyond rounding, and it leaves the
random numbers of training alone: a run that evaluates trains as one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import TrainerState

from llava import ranks
from llava.train.interrupt import LoaderProcess


def held_out_loss(
    summed_loss: Callable[[dict[str, Any]], tuple[float, int]],
    dataset: Dataset,
    collate: Callable[[list], dict[str, Any]],
    batch_size: int,
    n_workers: int,
) -> tuple[float, int]:
    """Mean loss of a supervised token of `dataset`, and how many there are (NaN without any).

    `summed_loss` gives the sum over a batch's supervised tokens and their number. Every process
    runs as many batches as the others, as sharded weights demand, and raises their errors.
    """
    total, count = 0.0, 0
    for batch, counts in _batches(dataset, collate, batch_size, n_workers):
        if ranks.any_of("error" in batch):
            ranks.agree(batch.get("error"))
        loss, n_tokens = summed_loss(batch)
        if counts:
            total += loss
            count += n_tokens
    n_tokens = ranks.total([count])[0]
    total = ranks.total_float(total)
    return (total / n_tokens if n_tokens else float("nan")), n_tokens


def is_evaluated(state: TrainerState) -> bool:
    """Whether the log has a held-out loss of the step that training is at."""
    return any("eval_loss" in e and e["step"] == state.global_step for e in state.log_history)


def _batches(
    dataset: Dataset, collate: Callable, batch_size: int, n_workers: int
) -> Iterator[tuple[dict[str, Any], bool]]:
    """This process's batches and whether each counts: one without samples left repeats others."""
    world, rank = ranks.world_size(), ranks.rank()
    n_batches = -(-len(dataset) // (batch_size * world))
    rows = range(rank, len(dataset), world)
    chunks = [list(rows[i * batch_size : (i + 1) * batch_size]) for i in range(n_batches)]
    batches = DataLoader(
        Subset(dataset, [row for chunk in chunks for row in chunk or [0]]),
        batch_sampler=_positions([len(chunk) or 1 for chunk in chunks]),
        collate_fn=collate,
        num_workers=n_workers,
        worker_init_fn=LoaderProcess(),
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return zip(batches, [bool(chunk) for chunk in chunks], strict=True)


def _positions(sizes: list[int]) -> list[list[int]]:
    """Consecutive positions in groups of `sizes`."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
