"""EL2N: samples by how far the proxy's answer probabilities lie from certainty.

Mansheej Paul, Surya Ganguli, Gintare Karolina Dziugaite. Deep Learning on a Data Diet: Finding
Important Examples Early in Training. NeurIPS 2021. https://arxiv.org/abs/2107.07075

    chi(x, y) = E ||p(w_t, x) - y||_2     signals/forward.py, mean over answer tokens
    the middle of the ranking             rules/bands.py

Differs from the paper and from COINCIDE's code: docs/methods/el2n.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selection.methods.base import Context, Method, Scored
from selection.rules.bands import Band, band_scores
from selection.signals.forward import Forward


@dataclass(frozen=True)
class Settings:
    """Which samples EL2N keeps."""

    keep: Band = "middle"
    """keep the lowest (easiest), middle or highest (hardest) scores"""


class El2n(Method):
    """Samples by the error of the proxy's answer probabilities, the middle by default."""

    Settings = Settings

    def signals(self) -> dict[str, Forward]:
        return {"forward": Forward()}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """The band of the mean error norms."""
        return Scored(band_scores(context.values("forward", "el2n"), self.settings.keep))
