"""CLIP features of image and text, and their cosine: the CLIP score (Hessel et al. 2021).

Columns, D the width of the space that image and text share:

    image_features (D,)  unit; zero for a text-only sample
    text_features  (D,)  unit
    clip_score           their cosine, -1 to 1; NaN, "does not apply", for a text-only sample

The text is the conversation, "USER: ... ASSISTANT: ...", without `<image>`, cut at the model's
77 tokens (as in CoIDO's code). Images are a signal of their own, `ClipImages`, with one row per
distinct image: one that many samples share is decoded and encoded once.

The model is transformers' or open_clip's: see `selection/signals/clip_models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llava.conversation import IMAGE_TOKEN
from llava.errors import DataError
from llava.lazy import Lazy
from selection.signals.base import OwnModelSignal, Sample
from selection.store.store import Column, StoreReader

if TYPE_CHECKING:
    from torch import Tensor

    from llava.records import Record
    from selection.pool.pool import Pool
    from selection.settings import ProxySettings
    from selection.signals.clip_models import AnyClip

torch = Lazy("torch")


DEFAULT = "openai/clip-vit-large-patch14"
_SPEAKERS = {"human": "USER", "gpt": "ASSISTANT"}


@dataclass
class WithImages:
    """What `Clip` is computed with: the model, and the features of the pool's images.

    Without `images`, for an estimate of the cost, every sample counts as text.
    """

    clip: AnyClip
    pool: Pool
    images: StoreReader | None

    def __post_init__(self) -> None:
        rows = np.zeros(0, np.int64) if self.images is None else self.images.rows
        self.owner = image_owner(self.pool, rows)
        position = {row: i for i, row in enumerate(rows.tolist())}
        notes = [] if self.images is None else self.images.bad
        self.bad = {position[note["row"]]: note["reason"] for note in notes}

    def identity(self) -> dict[str, Any]:
        return self.clip.identity()


@dataclass
class ClipItem:
    """A prepared sample: pixels (3, H, W), or token ids (L,) and the store row of its image."""

    tensor: Tensor
    image: int = -1

    @property
    def n_tokens(self) -> int:
        """Tokens of a text; of an image about the patches of ViT-L/14."""
        from selection.signals.clip_models import padded

        return padded(self.tensor) if self.tensor.ndim == 1 else self.tensor[0].numel() // 14**2

    @property
    def key(self) -> tuple:
        return (self.tensor.ndim, self.n_tokens, *self.tensor.shape[1:])


@dataclass(frozen=True)
class ClipImages(OwnModelSignal):
    """Column `image_features` (D,): the image features of a sample."""

    name: ClassVar[str] = "clip_images"

    model: str = DEFAULT
    """CLIP checkpoint: a directory or a hub name"""

    def identity(self) -> dict[str, Any]:
        return _identity(self)

    def open_model(
        self, pool: Pool, readers: Mapping[str, StoreReader], settings: ProxySettings
    ) -> AnyClip:
        from selection.signals.clip_models import load_clip

        return load_clip(self.model, settings.dtype, settings.device)

    def columns(self, scorer: AnyClip) -> list[Column]:
        return [Column("image_features", (scorer.width,), scorer.stored_dtype)]

    def prepare(self, scorer: AnyClip, sample: Sample) -> ClipItem:
        return ClipItem(scorer.pixels(sample.image))

    def compute(self, scorer: AnyClip, items: list[ClipItem]) -> dict[str, np.ndarray]:
        features = scorer.encode_images(torch.stack([item.tensor for item in items]))
        return {"image_features": features.cpu().numpy().astype(scorer.stored_dtype)}


@dataclass(frozen=True)
class Clip(OwnModelSignal):
    """Image features, text features and CLIP score of every sample."""

    name: ClassVar[str] = "clip"
    reads_images: ClassVar[bool] = False
    may_be_nan: ClassVar[tuple[str, ...]] = ("clip_score",)

    model: str = DEFAULT
    """CLIP checkpoint: a directory or a hub name"""

    def identity(self) -> dict[str, Any]:
        return _identity(self)

    def before(self, pool: Pool, rows: np.ndarray) -> dict[str, tuple[OwnModelSignal, np.ndarray]]:
        return {"images": (ClipImages(self.model), distinct_images(pool, rows))}

    def open_model(
        self, pool: Pool, readers: Mapping[str, StoreReader], settings: ProxySettings
    ) -> WithImages:
        from selection.signals.clip_models import load_clip

        clip = load_clip(self.model, settings.dtype, settings.device)
        return WithImages(clip, pool, readers.get("images"))

    def columns(self, scorer: WithImages) -> list[Column]:
        width, dtype = scorer.clip.width, scorer.clip.stored_dtype
        features = [Column(name, (width,), dtype) for name in ("image_features", "text_features")]
        return [*features, Column("clip_score", (), "float32")]

    def prepare(self, scorer: WithImages, sample: Sample) -> ClipItem:
        image = int(scorer.owner[sample.row])
        if image in scorer.bad:
            raise DataError(scorer.bad[image])
        return ClipItem(scorer.clip.tokens(text_of(sample.record)), image)

    def compute(self, scorer: WithImages, items: list[ClipItem]) -> dict[str, np.ndarray]:
        clip, owner = scorer.clip, np.array([item.image for item in items])
        texts = clip.encode_texts([item.tensor for item in items]).cpu().numpy()
        pictures, shown = np.zeros_like(texts), owner >= 0
        if shown.any():
            pictures[shown] = scorer.images.take("image_features", owner[shown])
        scores = cosine(pictures, texts)
        scores[~shown] = np.nan
        return {
            "image_features": pictures.astype(clip.stored_dtype),
            "text_features": texts.astype(clip.stored_dtype),
            "clip_score": scores,
        }


def text_of(record: Record) -> str:
    """The whole conversation on one line, without `<image>`."""
    turns = [
        f"{_SPEAKERS[turn.from_]}: {turn.value.replace(IMAGE_TOKEN, '').strip()}"
        for turn in record.conversations
    ]
    return " ".join(turns)


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Row by row, of unit or zero rows (B, D): (B,) float32, each a function of its own row."""
    return np.array([a @ b for a, b in zip(left, right, strict=True)], np.float32).clip(-1, 1)


def distinct_images(pool: Pool, rows: np.ndarray) -> np.ndarray:
    """The first of `rows` (n,) with each image, in that order, (u,) int64.

    Images are the same when their references are.
    """
    firsts: dict[str, int] = {}
    for row in rows[pool.has_image[rows]].tolist():
        firsts.setdefault(pool.record(row).image, row)
    return np.array(list(firsts.values()), np.int64)


def image_owner(pool: Pool, firsts: np.ndarray) -> np.ndarray:
    """By pool row (N,) int64 the position in `firsts` of the row with the same image, else -1."""
    position = {pool.record(row).image: i for i, row in enumerate(firsts.tolist())}
    owner = np.full(len(pool), -1)
    for row in np.flatnonzero(pool.has_image).tolist():
        owner[row] = position.get(pool.record(row).image, -1)
    return owner


def _identity(signal: ClipImages | Clip) -> dict[str, Any]:
    """The checkpoint enters with its content, so where it lies does not count."""
    from selection.signals.clip_models import checkpoint_content

    return {"checkpoint": checkpoint_content(signal.model), "schema": signal.schema}
