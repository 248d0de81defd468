"""What several tests of models ask: the same bits, nothing left over, nothing executed."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def in_transformers(folder: Path) -> LlavaForConditionalGeneration:
    """The model as transformers itself loads it, with nothing missing and nothing left over."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


class Bomb:
    """A pickle of it makes the directory `canary` when it is executed."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)
