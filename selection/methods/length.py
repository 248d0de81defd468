"""Length: the samples with the longest answers, a control that is hard to beat.

Hao Zhao, Maksym Andriushchenko, Francesco Croce, Nicolas Flammarion. Long Is More for Alignment: A
Simple but Tough-to-Beat Baseline for Instruction Fine-Tuning. ICML 2024.
https://arxiv.org/abs/2402.04833

    number of tokens of the responses     signals/forward.py
    the largest                           rules/bands.py

Differs from the paper: docs/methods/length.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selection.methods.base import Context, Method, Scored
from selection.rules.bands import Band, band_scores
from selection.signals.forward import Forward


@dataclass(frozen=True)
class Settings:
    """Which samples are kept by their length."""

    keep: Band = "high"
    """keep the samples with the shortest (low), middle or longest (high) answers"""


class Length(Method):
    """Samples by the length of their answers, the longest by default."""

    Settings = Settings

    def signals(self) -> dict[str, Forward]:
        return {"forward": Forward()}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """The band of the numbers of answer tokens."""
        return Scored(band_scores(context.values("forward", "n_tokens"), self.settings.keep))
