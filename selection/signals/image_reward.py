"""ImageReward: how much people would like the picture for its text (Xu et al., NeurIPS 2023).

Column `image_reward`; NaN, "does not apply", for a text-only sample. BLIP's image encoder and its
text encoder with cross-attention, from transformers, then five linear layers on the first token;
the published weights are of mean 0.167 and standard deviation 1.033, to which scores are brought.

The text is the whole conversation, as for CLIP, cut at 35 tokens as in the published code. The
model: image_reward_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xxhash

from llava.errors import UsageError
from llava.files import digest_of
from llava.lazy import Lazy
from selection.signals.base import OwnModelSignal, Sample
from selection.signals.clip import text_of
from selection.store.store import Column

if TYPE_CHECKING:
    from torch import Tensor

    from selection.pool.pool import Pool
    from selection.settings import ProxySettings
    from selection.signals.image_reward_model import RewardModel
    from selection.store.store import StoreReader

torch = Lazy("torch")


MAX_LENGTH = 35


@dataclass
class RewardItem:
    """A prepared sample: pixels (3, H, W), None for text alone, and token ids and mask (L,)."""

    pixels: Tensor | None
    ids: Tensor
    mask: Tensor

    @property
    def n_tokens(self) -> int:
        """Of the text, and about the patches of the image."""
        return MAX_LENGTH + (0 if self.pixels is None else self.pixels[0].numel() // 16**2)

    @property
    def key(self) -> tuple:
        return (self.pixels is None,)


@dataclass(frozen=True)
class ImageReward(OwnModelSignal):
    """The reward of every sample."""

    name: ClassVar[str] = "image_reward"
    may_be_nan: ClassVar[tuple[str, ...]] = ("image_reward",)

    weights: str
    """the published file, ImageReward.pt, or the same tensors as safetensors"""
    tokenizer: str = "google-bert/bert-base-uncased"
    """tokenizer of the text encoder: a directory or a hub name"""

    def identity(self) -> dict[str, Any]:
        content = {
            "weights": file_content(self.weights),
            "tokenizer": folder_content(self.tokenizer),
        }
        return {**content, "schema": self.schema}

    def open_model(
        self, pool: Pool, readers: Mapping[str, StoreReader], settings: ProxySettings
    ) -> RewardModel:
        from llava.model.sources import find_directory
        from llava.vlm import pick_device, pick_dtype
        from selection.signals.image_reward_model import RewardModel

        where = pick_device(settings.device)
        words = find_directory(self.tokenizer)
        return RewardModel(Path(self.weights), words, pick_dtype(settings.dtype, where), where)

    def columns(self, scorer: RewardModel) -> list[Column]:
        return [Column("image_reward", (), "float32")]

    def prepare(self, scorer: RewardModel, sample: Sample) -> RewardItem:
        pixels = None
        if sample.image is not None:
            pixels = scorer.processor(sample.image, return_tensors="pt")["pixel_values"][0]
        words = scorer.tokenizer(
            text_of(sample.record),
            padding="max_length",
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        return RewardItem(pixels, words["input_ids"][0], words["attention_mask"][0])

    def compute(self, scorer: RewardModel, items: list[RewardItem]) -> dict[str, np.ndarray]:
        from llava.vlm.base import StableRows

        if items[0].pixels is None:  # part of the key, so the same for all
            return {"image_reward": np.full(len(items), np.nan, np.float32)}
        some = next(scorer.model.parameters())
        pixels = torch.stack([item.pixels for item in items]).to(some.device, some.dtype)
        ids, mask = (
            torch.stack([getattr(item, name) for item in items]).to(some.device)
            for name in ("ids", "mask")
        )
        with StableRows():
            rewards = scorer.model(pixels, ids, mask).cpu().numpy()
        # In this column NaN says "does not apply"; one that was computed has to be listed.
        return {"image_reward": np.where(np.isnan(rewards), np.float32(np.inf), rewards)}


@lru_cache
def file_content(path: str) -> str:
    """xxh3-128 of the file at `path`; UsageError when it cannot be read."""
    try:
        return digest_of(path, xxhash.xxh3_128)
    except OSError as error:
        raise UsageError(f"--image_reward {path}: {error.strerror}") from None


@lru_cache
def folder_content(name: str) -> str:
    """Fingerprint of the files of checkpoint `name`; UsageError when there is none."""
    from llava.model.sources import find_directory
    from selection.signals.clip_models import files_content

    return files_content(find_directory(name))
