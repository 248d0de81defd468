"""Self-Sup prototypes: samples by how close they lie to the centre of their cluster.

Ben Sorscher, Robert Geirhos, Shashank Shekhar, Surya Ganguli, Ari S. Morcos. Beyond neural scaling
laws: beating power law scaling via data pruning. NeurIPS 2022. https://arxiv.org/abs/2206.14486

    embedding: the proxy's last state                 signals/forward.py
    k-means of the unit embeddings: the prototypes    vectors/kmeans.py
    difficulty: cosine distance to the own prototype  prototypicality, its negative
    the easiest, or the hardest                       rules/bands.py

Differs from the paper: docs/methods/self_sup.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llava.errors import at_least
from llava.lazy import Lazy
from selection.methods.base import Context, Method, Scored
from selection.methods.semdedup import score_clusters
from selection.rules.bands import band_scores
from selection.signals.forward import Forward
from selection.vectors import stream

torch = Lazy("torch")


@dataclass(frozen=True)
class Settings:
    """How Self-Sup prototypes choose; embedding and clusters are SemDeDup's."""

    n_clusters: int = 10_000
    """prototypes, but no more than one for every 64 samples"""
    n_iter: int = 50
    """iterations of k-means"""
    keep: Literal["easy", "hard"] = "easy"
    """keep samples close to their prototype (easy) or far from it (hard)"""

    def __post_init__(self) -> None:
        at_least(1, self, "n_clusters", "n_iter")


def prototypicality(vectors: torch.Tensor, prototype: torch.Tensor) -> np.ndarray:
    """Cosine of every row of `vectors` (m, D) to the unit `prototype` (D,): (m,) float64."""
    return stream.cosines([vectors], prototype)


class SelfSup(Method):
    """The samples closest to the centre of their cluster."""

    Settings = Settings

    def signals(self) -> dict[str, Forward]:
        return {"forward": Forward()}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """Cosine to the own prototype, or its negative; artefact: the cluster of every sample."""
        scored = score_clusters(context, self.settings, rng, prototypicality)
        keep = {"easy": "high", "hard": "low"}[self.settings.keep]
        return replace(scored, scores=band_scores(scored.scores, keep))
