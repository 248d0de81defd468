"""Influence of pool samples on target tasks: mean cosines, as one product with the tasks' means.

    I_ij = <g_i, g'_j> ;  I_k(z_i) = 1/|V_k| sum_(j in V_k) I_ij       ICONS, equation 2
         = <g_i, v_k>  with  v_k = 1/|V_k| sum_(j in V_k) g'_j         direction

for vectors of length one: gradients are stored so, others are divided by their length. The pool's
vectors are read once and streamed, whatever the number of tasks and of their samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from llava.errors import DataError
from llava.lazy import Lazy
from selection.vectors import stream

if TYPE_CHECKING:
    from selection.methods.base import Context, Task
    from selection.store.store import StoreReader

torch = Lazy("torch")


def scored_rows(context: Context) -> np.ndarray:
    """Which pool rows every signal could be computed for, (N,) bool."""
    scored = np.ones(len(context.pool), bool)
    for reader in context.readers.values():
        scored[reader.bad_rows] = False
    return scored


def usable(reader: StoreReader) -> np.ndarray:
    """Store rows that hold numbers, (n,) int64."""
    return np.flatnonzero(~np.isin(reader.rows, reader.bad_rows))


def direction(reader: StoreReader, column: str, normalize: bool) -> np.ndarray:
    """Mean vector of a sub-task's usable samples, (D,) float64; each of length one first if
    `normalize`. Raises DataError when there is no usable sample."""
    rows = usable(reader)
    if not len(rows):
        raise DataError(f"{reader.folder}: no sample of this target task could be scored")
    vectors = stream.take(reader, [column], rows)
    return (stream.unit(vectors) if normalize else vectors).numpy().mean(axis=0, dtype=np.float64)


def products(
    reader: StoreReader, column: str, directions: np.ndarray, normalize: bool
) -> np.ndarray:
    """Product of every store row, of length one first if `normalize`, with `directions` (D, S).

    (n, S) float64, NaN for rows without numbers. Reads the store once.
    """
    matrix = torch.from_numpy(directions).float()

    def work(_: slice, parts: stream.Parts) -> np.ndarray:
        return stream.cosines(parts, matrix) if normalize else stream.products(parts, matrix)

    influences = np.empty((len(reader), directions.shape[1]))
    for part, values in stream.apply(reader, [column], work):
        influences[part] = values
    return influences


def by_subtask(context: Context, signal: str, targets: str, column: str, normalize: bool):
    """Influence of every pool row on every sub-task of all tasks, (N, S) float64, NaN for rows
    that could not be scored. `signal` is read for the pool, `targets` for the tasks."""
    readers = [reader for task in context.tasks for reader in task.readers[targets]]
    directions = np.stack([direction(reader, column, normalize) for reader in readers], axis=1)
    reader = context.readers[signal]
    influences = np.full((len(context.pool), directions.shape[1]), np.nan)
    influences[reader.rows] = products(reader, column, directions, normalize)
    influences[reader.bad_rows] = np.nan
    return influences


def sizes(tasks: Sequence[Task], signal: str) -> list[np.ndarray]:
    """Usable samples of each sub-task, an array (S_k,) int64 a task."""
    return [np.array([len(usable(reader)) for reader in task.readers[signal]]) for task in tasks]


def by_task(
    influence: np.ndarray, counts: Sequence[np.ndarray], kind: Literal["mean", "max"]
) -> np.ndarray:
    """From sub-tasks (N, S) to tasks (N, K): the mean over a task's samples, or the largest of its
    sub-tasks. `counts` are the samples of the sub-tasks, by task."""
    starts = np.cumsum([0, *map(len, counts)])[:-1]
    if kind == "max":
        return np.maximum.reduceat(influence, starts, axis=1)
    weights = np.concatenate([n_samples / n_samples.sum() for n_samples in counts])
    return np.add.reduceat(influence * weights, starts, axis=1)


def visual(
    clean: np.ndarray, noise: np.ndarray, clean_norm: np.ndarray, noise_norm: np.ndarray
) -> np.ndarray:
    """Visual dependency: <g_clean - g_noise, v> / |g_clean|, (N, S) (ICONS, equation 7).

    From the influences (N, S) of the gradients with the sample's image and with a noise image,
    and their lengths (N,). 0 for samples without an image.
    """
    return clean - (noise_norm / clean_norm)[:, None] * noise
