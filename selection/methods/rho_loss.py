"""RHO-LOSS: samples that the proxy has not learnt but a model of held-out data shows learnable.

Sören Mindermann et al. Prioritized Training on Points that are Learnable, Worth Learning, and Not
Yet Learnt. ICML 2022. https://arxiv.org/abs/2206.07137

    L[y | x; D_t]                           the proxy's mean answer loss, signals/forward.py
    L[y | x; D_ho]                          the same of the holdout model
    L[y | x; D_t] - L[y | x; D_ho]  (eq. 3) reducible_loss; the largest are selected

Differs from the paper, where the rule picks each batch during training: docs/methods/rho_loss.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava.errors import UsageError
from selection.methods.base import Context, Method, Scored, WarmUp
from selection.signals.forward import Forward


@dataclass(frozen=True)
class Settings:
    """The second model of RHO-LOSS."""

    holdout_model: str | None = None
    """checkpoint trained on samples that the proxy has not seen, e.g. another 5 % of the pool;
    required"""
    holdout_base: str | None = None
    """language model under a LoRA or projector-only holdout checkpoint"""


def reducible_loss(loss: np.ndarray, irreducible: np.ndarray) -> np.ndarray:
    """Eq. 3 (N,): loss of the proxy less that of the holdout model, in nats a token."""
    return loss - irreducible


class RhoLoss(Method):
    """Samples on which the proxy loses most against a model of held-out data."""

    Settings = Settings

    def signals(self) -> dict[str, Forward]:
        return {"forward": Forward(), "holdout": Forward()}

    def checkpoints(self) -> dict[str, tuple[str, str | None]]:
        """The holdout model; UsageError when none is named."""
        if self.settings.holdout_model is None:
            raise UsageError(
                "--holdout_model is missing: a checkpoint trained on other samples than the proxy"
            )
        return {"holdout": (self.settings.holdout_model, self.settings.holdout_base)}

    def training(self) -> tuple[WarmUp, ...]:
        """The holdout model learns other samples than a proxy, which are those of seed 0."""
        if self.settings.holdout_model:
            return ()
        return (WarmUp(seed=1, fills="holdout_model", base_fills="holdout_base"),)

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """The reducible loss of every sample."""
        losses = (context.values(name, "nll_mean") for name in ("forward", "holdout"))
        return Scored(reducible_loss(*losses))
