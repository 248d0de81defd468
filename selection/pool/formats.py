"""Instruction formats: what kind of answer the first question of a conversation asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from selection.pool.pool import Pool

# First match wins, whatever the case. The wording is that of the LLaVA-1.5 mixture.
WORDINGS = {
    "phrase": "answer the question using a single word or phrase.",
    "choice": "answer with the option's letter from the given choices directly.",
    "caption": "provide a one-sentence caption for the provided image",
    "region_description": "provide a short description for this region",
    "region_box": "provide the bounding box coordinate of the region this sentence describes",
}
CHOICE, OTHER, PLAIN_TEXT = "choice", "other", "plain_text"
FORMATS = (*WORDINGS, OTHER, PLAIN_TEXT)


def instruction_format(first_turn: str, has_image: bool) -> str:
    """Format of a conversation, one of `FORMATS`, from its first human turn."""
    text = first_turn.lower()
    for name, wording in WORDINGS.items():
        if wording in text:
            return name
    return OTHER if has_image else PLAIN_TEXT


def formats_of(pool: Pool) -> np.ndarray:
    """Position in `FORMATS` of every sample's format, (N,) int64; -1 for rows in `pool.bad`."""
    codes = {name: code for code, name in enumerate(FORMATS)}
    out = np.full(len(pool), -1)
    for row in range(len(pool)):
        if row not in pool.bad:
            out[row] = codes[instruction_format(pool.record(row).first_human, pool.has_image[row])]
    return out


def perturbable(pool: Pool, formats: np.ndarray) -> np.ndarray:
    """Which samples ARDS can perturb, (N,) bool: those with an image, and multiple choice."""
    return (pool.has_image & (formats >= 0)) | (formats == FORMATS.index(CHOICE))
