"""ICONS: samples whose gradients help many target tasks at once.

Xindi Wu et al. ICONS: Influence Consensus for Vision-Language Data Selection. 2025.
https://princetonvisualai.github.io/icons/

    g~ = R g / |g|                                     signals/gradients/gradients.py
    I_k(z_i) = mean_j <g~_i, g~'_j>     (eq. 2)        influence.by_subtask, by_task
    S_ICONS: votes of the top p of each task (eq. 6)   consensus.vote
    I_Merge, I_Max, S_MinRank, ... (eq. 3-5)           consensus.aggregate
    I_VDS                               (eq. 7)        influence.visual

The model is one warmed up on 5 % of the pool with LoRA (`--model`). Differs from the paper and from
the released code: docs/methods/icons.md, with the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llava.errors import DataError
from selection.methods.base import Context, Method, Scored, WarmUp
from selection.rules import influence
from selection.rules.consensus import Aggregation, aggregate, check, decided_by_rank, total_votes
from selection.signals.gradients.gradients import Gradients

DIM = 5120
GRADIENTS, NOISE = "gradients", "noise_gradients"


@dataclass(frozen=True)
class Settings:
    """How ICONS scores; defaults are the paper's."""

    aggregation: Aggregation = "vote"
    """how the tasks' influences become one score"""
    subtasks: Literal["mean", "max"] = "mean"
    """influence on a task with sub-tasks: the mean over all its samples, or that on the sub-task
    it is largest on"""
    visual_dependency: bool = False
    """count only the part of a gradient that the sample's image makes: its difference from the
    gradient with a noise image; doubles the time"""
    dim: int = DIM
    """numbers that a gradient is projected to"""
    projection: Literal["count_sketch", "rademacher", "two_sided"] = "count_sketch"
    """how: the dense rademacher, which the authors use, has the same variance and costs more"""


class Icons(Method):
    """ICONS: the samples that most target tasks count among their most influential."""

    Settings = Settings
    presets = {"as_released": {"subtasks": "max"}}

    def signals(self) -> dict[str, Any]:
        clean = self._gradients("clean")
        noise = {NOISE: self._gradients("noise")} if self.settings.visual_dependency else {}
        return {GRADIENTS: clean, **noise}

    def target_signals(self) -> dict[str, Any]:
        return {GRADIENTS: self._gradients("clean")}

    def training(self) -> tuple[WarmUp, ...]:
        return (WarmUp(),)

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """Consensus of the influences; artefacts: the influences (N, K) and the tasks."""
        by_subtask = self._on_targets(context, GRADIENTS)
        if self.settings.visual_dependency:
            lengths = [context.values(name, "norm") for name in (GRADIENTS, NOISE)]
            by_subtask = influence.visual(by_subtask, self._on_targets(context, NOISE), *lengths)
        counts = influence.sizes(context.tasks, GRADIENTS)
        by_task = influence.by_task(by_subtask, counts, self.settings.subtasks)
        return agreement(context, by_task, counts, self.settings.aggregation)

    def _gradients(self, image: Literal["clean", "noise"]) -> Gradients:
        return Gradients(dim=self.settings.dim, projection=self.settings.projection, image=image)

    def _on_targets(self, context: Context, signal: str) -> np.ndarray:
        return influence.by_subtask(context, signal, GRADIENTS, "gradient", normalize=False)


def agreement(
    context: Context, by_task: np.ndarray, counts: list[np.ndarray], kind: Aggregation
) -> Scored:
    """Scores from the influences (N, K) on tasks; `counts` are the samples of their sub-tasks.

    Samples that some signal could not be computed for have none; DataError when that is all of
    them. Raises NonFiniteError if another sample has no influence on some task.
    """
    usable = influence.scored_rows(context)
    if not usable.any():
        raise DataError(f"{context.pool.path}: no sample of the pool could be scored")
    names = [task.name for task in context.tasks]
    check(by_task[usable], names)
    weights = np.array([task.weight for task in context.tasks])
    # A task votes for as many samples as are kept (eq. 6), out of those that can be.
    k = min(context.k, int(usable.sum()))
    p = k / usable.sum()
    scores = np.full(len(by_task), np.nan)
    scores[usable] = aggregate(kind, by_task[usable], weights, p)
    # How many samples a task has tells the reader of a run how much its vote can be trusted.
    facts = [
        {
            "name": task.name,
            "weight": task.weight,
            "subtasks": dict(zip(task.subtasks, n_samples.tolist(), strict=True)),
        }
        for task, n_samples in zip(context.tasks, counts, strict=True)
    ]
    notes = _notes(kind, by_task[usable], weights, names, k)
    return Scored(scores, {"influence": by_task, "tasks": facts}, notes)


def _notes(
    kind: Aggregation, by_task: np.ndarray, weights: np.ndarray, names: list[str], k: int
) -> tuple[str, ...]:
    if kind == "vote":
        n = decided_by_rank(total_votes(by_task, weights, k / len(by_task)), k)
        return (
            f"{n} of {k} samples have as many votes as some sample left out: chosen by mean rank",
        )
    turned = [name for name, total in zip(names, by_task.sum(axis=0), strict=True) if total < 0]
    if kind == "merge_sumnorm" and turned:
        return (
            f"influences on {', '.join(turned)} add up to less than zero: these count backwards",
        )
    return ()
