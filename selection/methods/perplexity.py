"""Perplexity: samples by how unexpected their answers are to the proxy.

Max Marion et al. When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale. 2023.
https://arxiv.org/abs/2309.04564

    PPL(z) = exp(1/|z| sum_j NLL(t_j))    log_perplexity; NLL: signals/forward.py
    the middle of the ranking             rules/bands.py

Differs from the paper: docs/methods/perplexity.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selection.methods.base import Context, Method, Scored
from selection.rules.bands import Band, band_scores
from selection.signals.forward import Forward


@dataclass(frozen=True)
class Settings:
    """Which samples perplexity keeps."""

    keep: Band = "middle"
    """keep the lowest, middle or highest perplexities"""


def log_perplexity(nll_sum: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """log PPL (N,): mean negative log-likelihood of the answer tokens in nats.

    It ranks as PPL does, and is finite where PPL overflows.
    """
    return nll_sum / n_tokens


class Perplexity(Method):
    """Samples by the perplexity of their answers, the middle by default."""

    Settings = Settings

    def signals(self) -> dict[str, Forward]:
        return {"forward": Forward()}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """The band of the logarithms of the perplexities."""
        sums, counts = (context.values("forward", name) for name in ("nll_sum", "n_tokens"))
        return Scored(band_scores(log_perplexity(sums, counts), self.settings.keep))
