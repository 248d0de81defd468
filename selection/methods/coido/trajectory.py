"""Losses of samples while a target model is trained: what co-training records.

One entry a sample and optimizer step: the sample's uid, the mean loss of its answer tokens in nats,
and the number of the step. A step's entries are a batch of all processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from llava.errors import DataError, UsageError
from llava.files import atomic_write

if TYPE_CHECKING:
    from selection.pool.pool import Pool


@dataclass
class Trajectory:
    """`uid` (T, 16) uint8, `loss` (T,) float32, `step` (T,) int64, ascending."""

    uid: np.ndarray
    loss: np.ndarray
    step: np.ndarray

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        atomic_write(path, save({"uid": self.uid, "loss": self.loss, "step": self.step}))

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what `save` wrote; UsageError when it cannot be."""
        try:
            arrays = load_file(path)
            return cls(arrays["uid"], arrays["loss"], arrays["step"])
        except (OSError, SafetensorError, KeyError) as error:
            raise UsageError(f"--trajectory {path}: is no trajectory ({error})") from None

    def on(
        self, pool: Pool, rows: np.ndarray
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """Batches of (positions in the returned rows, losses), and the pool rows (n,) int64.

        Those of `rows` that the trajectory knows, in their order. Raises DataError when it knows
        none of them.
        """
        known = {uid.tobytes() for uid in self.uid}
        kept = np.array([row for row in rows if pool.uids[row].tobytes() in known], np.int64)
        if not len(kept):
            raise DataError("--trajectory: holds none of the drawn samples; is --draw the same?")
        position = {pool.uids[row].tobytes(): i for i, row in enumerate(kept.tolist())}
        places = np.array([position.get(uid.tobytes(), -1) for uid in self.uid])
        starts = np.flatnonzero(np.diff(self.step)) + 1
        batches = []
        for step in np.split(np.arange(len(self.step)), starts):
            entries = step[places[step] >= 0]
            if len(entries) > 1:
                batches.append((places[entries], self.loss[entries]))
        return batches, kept
