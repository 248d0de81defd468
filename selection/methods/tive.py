"""TIVE: more samples from the tasks that are hard, and in each task those typical of its gradient.

Zikang Liu et al. Less is More: High-value Data Selection for Visual Instruction Tuning. 2024.
https://arxiv.org/abs/2403.09559

    task value      v_t = mean_(i in D_t) |g_i|                     task_values
    quota           n_t = k v_t / sum_s v_s                         quotas
    instance value  v_i = mean_(j in D_t) cos(g_i, g_j)             instance_values
    draw n_t of D_t without replacement by softmax(q v_i)           score: q v_i + Gumbel

Tasks are the sources of the pool. The mean cosine is a product with the task's mean unit gradient,
and the largest q v_i + Gumbel are a draw without replacement. Differs from the released code:
docs/methods/tive.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llava.errors import UsageError
from llava.lazy import Lazy
from selection.methods.base import Context, Method, Scored, WarmUp
from selection.methods.mllm_selector import gumbel
from selection.rules.budget import top_k
from selection.signals.gradients.gradients import Gradients
from selection.vectors import stream

if TYPE_CHECKING:
    from selection.store.store import StoreReader

torch = Lazy("torch")


@dataclass(frozen=True)
class Settings:
    """How TIVE scores and draws."""

    q: float = 10.0
    """how sharply the draw prefers typical samples of a task; 0 draws uniformly"""
    dim: int = 8192
    """numbers that a gradient is projected to"""
    projection: Literal["count_sketch", "rademacher", "two_sided"] = "count_sketch"
    """how: the dense rademacher, which the authors use, has the same variance and costs more"""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.q) and self.q >= 0):
            raise UsageError(f"--q {self.q}: give a number of at least 0")


def task_values(norms: np.ndarray, task: np.ndarray, n_tasks: int) -> np.ndarray:
    """v_t: mean gradient norm of each task's samples, (T,); 0 for a task without samples.

    `norms` (n,), `task` (n,) int64 of samples that could be scored.
    """
    counts = np.bincount(task, minlength=n_tasks)
    return np.bincount(task, norms, minlength=n_tasks) / np.maximum(counts, 1)


def quotas(values: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """n_t (T,) int64: proportional to `values` (T,), at most `counts` (T,), adding up to `k`.

    What a small task cannot give is shared among the others in the same proportion. Fractions go
    to the largest remainders, equal ones to the earlier task. Needs k <= counts.sum().
    """
    given, open_ = np.zeros(len(values), np.int64), counts > 0
    while open_.any():
        left = k - given[~open_].sum()
        total = values[open_].sum()
        weights = values / total if total > 0 else np.full(len(values), 1 / open_.sum())
        ideal = np.where(open_, left * weights, 0.0)
        # Tasks that are owed more than they have give all; what is left is shared anew, so that
        # there are at most as many rounds as tasks.
        full = open_ & (ideal >= counts)
        if not full.any():
            given[open_] = np.floor(ideal[open_])
            rest = np.where(open_, ideal - given, -1.0)
            order = np.argsort(-rest, kind="stable")
            given[order[: k - given.sum()]] += 1
            break
        given[full] = counts[full]
        open_ &= ~full
    return given


def instance_values(reader: StoreReader, task: np.ndarray, n_tasks: int) -> np.ndarray:
    """v_i: mean cosine of each store row to the rows of its task, itself among them, (n,) float64.

    `task` (n,) int64, -1 for rows without numbers, which get NaN. Reads the store twice.
    """
    counts = np.maximum(np.bincount(task[task >= 0], minlength=n_tasks), 1)

    # Sums by task as one product, in double precision from chunk to chunk; a row without numbers
    # is zeroed, for 0 times NaN is NaN.
    def add(part: slice, parts: stream.Parts) -> torch.Tensor:
        chunk_tasks = torch.from_numpy(task[part])
        member = (chunk_tasks == torch.arange(n_tasks)[:, None]).float()  # (T, n)
        return member @ parts[0].masked_fill((chunk_tasks < 0)[:, None], 0.0)

    total = np.zeros((n_tasks, reader.columns["gradient"].shape[0]))
    for _, sums in stream.apply(reader, ["gradient"], add):
        total += sums.numpy()
    means = torch.from_numpy((total / counts[:, None]).T).float()  # (D, T)

    # Stored gradients have length one: a row's product with its task's mean is the mean cosine.
    def work(part: slice, parts: stream.Parts) -> np.ndarray:
        columns = torch.from_numpy(np.maximum(task[part], 0))[:, None]
        return stream.products(parts, means).gather(1, columns)[:, 0].numpy()

    values = np.empty(len(reader))
    for part, mean_cosines in stream.apply(reader, ["gradient"], work):
        values[part] = mean_cosines
    values[task < 0] = np.nan
    return values


class Tive(Method):
    """TIVE: quotas by the gradient norms of the pool's sources, draws by typical gradients."""

    Settings = Settings
    presets = {"as_released": {"q": 0.001}}

    def signals(self) -> dict[str, Any]:
        return {"gradients": Gradients(dim=self.settings.dim, projection=self.settings.projection)}

    def training(self) -> tuple[WarmUp, ...]:
        return (WarmUp(),)

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """q v_i + Gumbel; artefacts: the instance values (N,), the tasks and their values."""
        reader, norms = context.readers["gradients"], context.values("gradients", "norm")
        names, task = np.unique(np.asarray(context.pool.sources), return_inverse=True)
        task = np.where(np.isfinite(norms), task, -1)
        values = np.full(len(task), np.nan)
        values[reader.rows] = instance_values(reader, task[reader.rows], len(names))
        usable = task >= 0
        by_task = task_values(norms[usable], task[usable], len(names))
        counts = np.bincount(task[usable], minlength=len(names)).tolist()
        facts = [
            {"name": str(name), "value": float(value), "n_samples": n}
            for name, value, n in zip(names, by_task, counts, strict=True)
        ]
        scores = self.settings.q * values + gumbel(context.keys(rng))
        return Scored(scores, {"instance_values": values, "tasks": facts})

    def select(self, context: Context, scores: np.ndarray, k: int) -> np.ndarray:
        """The best n_t of every task."""
        usable = ~np.isnan(scores)
        names, task = np.unique(np.asarray(context.pool.sources), return_inverse=True)
        counts = np.bincount(task[usable], minlength=len(names))
        if k > counts.sum():
            return top_k(scores, k).rows  # raises: there are too few to choose from
        norms = context.values("gradients", "norm")
        values = task_values(norms[usable], task[usable], len(names))
        parts = [
            top_k(np.where(task == t, scores, np.nan), n).rows
            for t, n in enumerate(quotas(values, counts, k))
        ]
        return np.sort(np.concatenate(parts))
