"""RDS: samples whose last-token states resemble those of many target tasks.

The representation-based baseline of ICONS (section 3.2; Hanawa et al. 2021, Xia et al. 2024).

    h_i : final hidden state of the last token         signals/forward.py, `last_state`
    I_k(z_i) = mean_j cos(h_i, h'_j)                   influence.by_subtask, by_task
    votes as in ICONS                                  icons.agreement

Differs from the released code: docs/methods/rds.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from selection.methods.base import Context, Method, Scored, WarmUp
from selection.methods.icons import agreement
from selection.rules import influence
from selection.rules.consensus import Aggregation
from selection.signals.forward import Forward


@dataclass(frozen=True)
class Settings:
    """How RDS scores; defaults are those of the ICONS paper."""

    aggregation: Aggregation = "vote"
    """how the tasks' similarities become one score"""
    subtasks: Literal["mean", "max"] = "mean"
    """similarity to a task with sub-tasks: the mean over all its samples, or that to the sub-task
    it is largest to"""


class Rds(Method):
    """RDS: the samples whose representation most target tasks find similar to their own."""

    Settings = Settings

    def signals(self) -> dict[str, Any]:
        return {"forward": Forward()}

    def target_signals(self) -> dict[str, Any]:
        return {"forward": Forward()}

    def training(self) -> tuple[WarmUp, ...]:
        return (WarmUp(),)

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """Consensus of the mean cosines; artefacts as of ICONS."""
        by_subtask = influence.by_subtask(
            context, "forward", "forward", "last_state", normalize=True
        )
        counts = influence.sizes(context.tasks, "forward")
        by_task = influence.by_task(by_subtask, counts, self.settings.subtasks)
        return agreement(context, by_task, counts, self.settings.aggregation)
