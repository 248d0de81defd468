"""The few words that the processes of one torchrun launch exchange."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

TIMEOUT = timedelta(hours=6)
"""Longest wait for the slowest rank; a rank that dies ends the wait of the others at once."""


class Ranks:
    """Barrier and broadcast over gloo, or nothing to do in a single process.

    The group carries control messages only: results travel through the store.
    """

    def __init__(self, rank: int | None = None, world_size: int | None = None) -> None:
        self.rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        self.world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
        self._group: Any = None
        if self.world_size > 1:
            if not dist.is_initialized():
                dist.init_process_group(
                    "gloo", rank=self.rank, world_size=self.world_size, timeout=TIMEOUT
                )
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._group is not None:
            dist.barrier(group=self._group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make`, called on rank 0 alone, returns, on every rank."""
        return self.share(make() if self.is_first else None)

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
