"""LESS: samples whose training step helps some target sub-task most, summed over a training run.

Mengzhou Xia et al. LESS: Selecting Influential Data for Targeted Instruction Tuning. ICML 2024.

    Gamma(z, theta_i) : the step Adam takes for z            signals/gradients/, kind adam
    Inf(z, V_s) = sum_i eta_i cos(mean_s grad l, Gamma_i)    weighted_sum, influence.by_subtask
    max_s Inf(z, V_s)                                        score

over checkpoints theta_i of a warm-up run with mean learning rates eta_i. Every sub-task of every
target task counts for itself. Differs from paper and released code: docs/methods/less.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llava.errors import UsageError
from selection.methods.base import Context, Method, Scored, WarmUp
from selection.pool.targets import title_of
from selection.rules import influence
from selection.rules.consensus import check
from selection.signals.gradients.gradients import Gradients

DIM = 8192


@dataclass(frozen=True)
class Settings:
    """How LESS scores; defaults are the paper's."""

    checkpoints: tuple[str, ...] = ()
    """checkpoints of the warm-up run, as a list: '[run/checkpoint-105,run/checkpoint-211]'; by
    default --model alone"""
    learning_rates: tuple[float, ...] = ()
    """mean learning rate of the steps that led to each checkpoint; needed for several"""
    gradient: Literal["adam", "sgd"] = "adam"
    """of pool samples: adam, the step that Adam takes, needs the checkpoint's optimizer.pt; the
    targets' are always sgd"""
    dim: int = DIM
    """numbers that a gradient is projected to"""
    projection: Literal["count_sketch", "rademacher", "two_sided"] = "count_sketch"
    """how: the dense rademacher, which the authors use, has the same variance and costs more"""

    def __post_init__(self) -> None:
        given, n = len(self.learning_rates), len(self.checkpoints) or 1
        if given != n and (given or n > 1):
            raise UsageError(
                f"--learning_rates: {given} given for {n} checkpoints; give one each "
                "(trainer_state.json has them)"
            )
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise UsageError(f"--learning_rates {list(self.learning_rates)}: must be above 0")


def weighted_sum(influences: Sequence[np.ndarray], rates: Sequence[float]) -> np.ndarray:
    """Influences (N, S) at every checkpoint, weighted by its share of the learning rates."""
    total = sum(rates)
    return sum(rate / total * at_one for rate, at_one in zip(rates, influences, strict=True))


class Less(Method):
    """LESS: the samples with the largest influence on any target sub-task."""

    Settings = Settings

    def signals(self) -> dict[str, Any]:
        return dict.fromkeys(self._names, self._gradients(self.settings.gradient))

    def target_signals(self) -> dict[str, Any]:
        return dict.fromkeys(self._names, self._gradients("sgd"))

    def checkpoints(self) -> dict[str, tuple[str, str | None]]:
        given = self.settings.checkpoints
        return {name: (path, None) for name, path in zip(self._names, given, strict=False)}

    def training(self) -> tuple[WarmUp, ...]:
        return () if self.settings.checkpoints else (WarmUp(moments=True),)

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """Largest weighted influence; artefacts: that on every sub-task (N, S), their names."""
        by_checkpoint = [
            influence.by_subtask(context, name, name, "gradient", normalize=False)
            for name in self._names
        ]
        rates = self.settings.learning_rates or [1.0] * len(by_checkpoint)
        together = weighted_sum(by_checkpoint, rates)
        names = [title_of(task.name, name) for task in context.tasks for name in task.subtasks]
        check(together[influence.scored_rows(context)], names)
        artefacts = {"influence": together, "tasks": [{"name": name} for name in names]}
        return Scored(together.max(axis=1), artefacts)

    @property
    def _names(self) -> list[str]:
        """A signal a checkpoint."""
        return [f"gradients_{i + 1}" for i in range(len(self.settings.checkpoints) or 1)]

    def _gradients(self, kind: Literal["adam", "sgd"]) -> Gradients:
        return Gradients(dim=self.settings.dim, projection=self.settings.projection, kind=kind)
