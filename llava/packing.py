"""Several samples in one row, each as if it were alone: `--packing True`.

The window is the micro-batch: its samples, which otherwise are one row each, are dealt to fewer
rows. So an optimizer step sees the same samples and makes the same step, a sampler's position means
the same, and every process runs the same number of micro-batches. What changes is the padding.

Position ids start at 0 with every sample and no attention mask is given; from that transformers
tells the samples apart (only without a cache: `use_cache=False`). For PyTorch's attention it builds
a block-diagonal mask, which costs the square of a row's length. Flash attention is given the
samples' borders instead, but only of a single row: there all samples make one row, and nothing is
padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava.data import Collator, ModelInput, pad_rows
from llava.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class PackingCollator:
    """Samples to a batch of R rows, R at most their number.

    `input_ids`, `labels` and `position_ids` are (R, L) int64. The first label of a sample is
    IGNORE_INDEX: no token is predicted from another sample. Padding is at position 0, where it
    sees itself alone. Images are as `Collator` gives them, in the order of the samples in the rows.
    """

    collator: Collator
    row_length: int | None
    """Most positions of a row; None puts all samples into a single one, for flash attention."""

    def __call__(self, samples: Sequence[ModelInput]) -> dict[str, Any]:
        rows = [list(range(len(samples)))]
        if self.row_length is not None:
            rows = fill_rows([len(sample["input_ids"]) for sample in samples], self.row_length)
        packed = [_joined([samples[i] for i in row]) for row in rows]
        ids, labels, positions = zip(*packed, strict=True)
        return {
            "input_ids": pad_rows(ids, self.collator.pad_id),
            "labels": pad_rows(labels, IGNORE_INDEX),
            "position_ids": pad_rows(positions, 0),
            **self.collator.pictures([samples[i] for row in rows for i in row]),
        }


def _joined(samples: Sequence[ModelInput]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and position ids of one row."""
    ids = torch.cat([sample["input_ids"] for sample in samples])
    labels = torch.cat([sample["labels"] for sample in samples])
    positions = torch.cat([torch.arange(len(sample["labels"])) for sample in samples])
    return ids, labels.masked_fill(positions == 0, IGNORE_INDEX), positions


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Deal samples of `lengths` to rows that hold at most `capacity`, with little padding.

    For each number of rows the samples go, longest first, to the row that is shortest so far. The
    number that needs the fewest positions (rows times the longest row) is taken; of equal ones the
    larger, whose shorter rows cost less attention. Gives the samples of each row; deterministic.
    Raises ValueError if a sample alone is longer than `capacity`.
    """
    if max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} positions in rows of {capacity}")
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: tuple[int, list[list[int]]] | None = None
    for n_rows in range(len(lengths), math.ceil(sum(lengths) / capacity) - 1, -1):
        rows: list[list[int]] = [[] for _ in range(n_rows)]
        filled = [0] * n_rows
        for sample in longest_first:
            row = filled.index(min(filled))
            rows[row].append(sample)
            filled[row] += lengths[sample]
        size = n_rows * max(filled)
        if max(filled) <= capacity and (best is None or size < best[0]):
            best = size, rows
    return best[1]
