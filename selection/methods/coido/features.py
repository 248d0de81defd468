"""What CoIDO's scorer reads of a sample: one assembly, for training, clustering and scoring alike.

    [image features | text features | scores], each CLIP half of length one, the scores scaled by
    the smallest and largest value of the training rows to -1..1

A score that does not apply (the CLIP score of a text-only sample) is 0, the middle; the image half
of a text-only sample is zero. Scores outside the fitted range are cut to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selection.vectors import stream

SIGNALS = {"clip_score": "clip", "image_reward": "image_reward", "llm_score": "judge"}
"""The signal that each score is a column of."""
SCORES = tuple(SIGNALS)
CLIP = ("image_features", "text_features")


@dataclass(frozen=True)
class Assembly:
    """Which features there are, and the fitted range of every score. Stored with the scorer."""

    clip_width: int
    """numbers of one CLIP half; 0 without CLIP features"""
    scores: tuple[str, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]

    @classmethod
    def fit(cls, clip_width: int, scores: Mapping[str, np.ndarray]) -> Assembly:
        """Take the ranges of `scores`, each (n,), NaN where it does not apply."""
        names = tuple(name for name in SCORES if name in scores)
        values = [scores[name][~np.isnan(scores[name])] for name in names]
        lowest = tuple(float(v.min()) if len(v) else 0.0 for v in values)
        highest = tuple(float(v.max()) if len(v) else 0.0 for v in values)
        return cls(clip_width, names, lowest, highest)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Assembly:
        """From its fields, as JSON gives them."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of CLIP features and of scores."""
        return 2 * self.clip_width, len(self.scores)

    def rows(self, clip: Sequence[np.ndarray], scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """(n, sum of widths) float32 of the CLIP halves (n, D) each and the scores (n,) each."""
        halves = []
        if self.clip_width:
            halves = [stream.unit_rows(np.asarray(half, np.float32)) for half in clip]
        columns = [
            scaled(np.asarray(scores[name], np.float64), low, high)[:, None]
            for name, low, high in zip(self.scores, self.lowest, self.highest, strict=True)
        ]
        return np.concatenate([*halves, *columns], axis=1, dtype=np.float32)


def scaled(values: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    """Min-max scaling to -1..1, cut there; 0 for NaN, and for all when the range is empty."""
    if not highest > lowest:
        return np.zeros(len(values))
    out = (2 * (values - lowest) / (highest - lowest) - 1).clip(-1, 1)
    return np.where(np.isnan(out), 0, out)
