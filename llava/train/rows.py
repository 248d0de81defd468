"""Samples that keep their row on their way through loader processes into a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from llava.data import ConversationDataset
from llava.errors import UserError
from llava.tokens import IGNORE_INDEX


class NumberedDataset(Dataset):
    """Items with their row; an unusable sample is handed on as its error.

    An error that crosses from a loader process by itself would arrive as a page of traceback.
    """

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, Any]:
        try:
            return row, self.dataset[row]
        except UserError as error:
            return row, error

    def name(self, row: int) -> str:
        """How a row is called in a message."""
        return f"{row} (id {str(self.dataset.records[row].id)[:40]})"


class NumberedCollator:
    """Batches that know their `rows`, or the `error` that one of their samples met.

    `n_samples`, `n_tokens` (positions that are no padding) and `n_supervised` are counted here, in
    the loader process, where nobody waits for them.
    """

    def __init__(self, collator: Callable[[Sequence[dict]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        rows = [row for row, _ in items]
        try:
            for _, item in items:
                if isinstance(item, UserError):
                    raise item
            batch = self.collator([item for _, item in items])
        except UserError as error:
            return {"error": error, "rows": rows}
        return {**batch, "rows": rows, **counts(batch, len(items))}


def counts(batch: dict[str, Any], n_samples: int) -> dict[str, int]:
    """What a batch holds; without a mask (packed) the first position of a sample and padding are 0.

    The first position of a row is never predicted, whatever its label.
    """
    if "attention_mask" in batch:
        n_tokens = int(batch["attention_mask"].sum())
    else:
        n_tokens = int((batch["position_ids"] > 0).sum()) + n_samples
    return {
        "n_samples": n_samples,
        "n_tokens": n_tokens,
        "n_supervised": int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
    }
