"""CLIP-Score: the samples whose text fits their image best.

Jack Hessel et al. CLIPScore: A Reference-free Evaluation Metric for Image Captioning. EMNLP 2021.
Samir Yitzhak Gadre et al. DataComp: In search of the next generation of multimodal datasets.
NeurIPS 2023 (as a filter).

    cos(E_image, E_text)                   signals/clip.py
    the largest                            score
    text-only samples                      within_groups

Differs from both: docs/methods/clip_score.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from selection.methods.base import Context, Method, Scored
from selection.signals.clip import DEFAULT, Clip


@dataclass(frozen=True)
class Settings:
    """How CLIP-Score chooses."""

    clip: str = DEFAULT
    """CLIP checkpoint: a directory or a hub name"""
    text_only: Literal["drop", "proportional"] = "drop"
    """samples without an image have no score: drop them, or draw their share of the pool at
    random"""


def within_groups(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Place of every sample in the order of its own group, (rank + 1/2) / size, in (0, 1).

    `scores` (N,), NaN = not in any group; `groups` (N,) int64. The largest k of all are then, to
    rounding, the same share of each group: its best.
    """
    places = np.full(len(scores), np.nan)
    for group in np.unique(groups):
        rows = np.flatnonzero((groups == group) & ~np.isnan(scores))
        ranked = rows[np.argsort(scores[rows], kind="stable")]
        places[ranked] = (np.arange(len(rows)) + 0.5) / len(rows)
    return places


class ClipScore(Method):
    """The samples whose text CLIP finds closest to their image."""

    Settings = Settings

    def signals(self) -> dict[str, Clip]:
        return {"clip": Clip(self.settings.clip)}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """The cosines; with `proportional` places among the samples with and without an image."""
        cosines = context.values("clip", "clip_score")
        if self.settings.text_only == "drop":
            return Scored(cosines)
        plain = ~context.pool.has_image
        plain[context.readers["clip"].bad_rows] = False
        drawn = np.where(plain, context.keys(rng), cosines)
        return Scored(within_groups(drawn, plain.astype(np.int64)))
