"""LLaVA-1.5: the ids, labels and pixels that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from llava.conversation import IMAGE_TOKEN, render
from llava.data import InputFormat
from llava.model import lora
from llava.model.lora import LowRank
from llava.model.moments import Moments, read_moments
from llava.model.sources import Kind
from llava.tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX, tokenize
from llava.vlm.base import Prepared, Vlm

if TYPE_CHECKING:
    from llava.model.checkpoint import Loaded
    from llava.records import Record


class LlavaVlm(Vlm):
    """A checkpoint read by `llava.model.checkpoint.load`."""

    kind = "llava"

    def __init__(self, loaded: Loaded, fingerprint: str, folder: Path) -> None:
        super().__init__(
            loaded.model, fingerprint, loaded.tokenizer.pad_id, loaded.model_max_length
        )
        self.loaded = loaded
        self.folder = folder

    def identity(self) -> dict[str, Any]:
        images = self.loaded.image_processor
        return {
            **super().identity(),
            "template": self.loaded.template_name,
            "image_processor": images.fingerprint() if images else None,
        }

    @property
    def input_format(self) -> InputFormat:
        return InputFormat.of(self.loaded)

    @cached_property
    def adapter(self) -> dict[str, LowRank]:
        if self.loaded.kind is not Kind.LLAVA_LORA:
            return {}
        return lora.low_rank(self.folder, self.decoder)

    @cached_property
    def moments(self) -> Moments:
        if not self.adapter:
            return super().moments
        return read_moments(self.folder, self.adapter, self.device)

    def prepare(self, record: Record, image: Image | None) -> Prepared:
        if image is not None:
            self.input_format.check_vision()
        open_picture = None if image is None else lambda: image
        sample = self.input_format.model_input(record.turns, open_picture)
        pixels = sample["pixel_values"]
        extras = {} if pixels is None else {"pixel_values": pixels[None]}
        return Prepared(sample["input_ids"], sample["labels"], extras)

    def rewrite(self, item: Prepared, record: Record, image: Image | None) -> Prepared:
        positions = self.input_format.encode(record.turns, image is not None)
        extras = item.extras if positions.shows_image else {}
        return Prepared(positions.input_ids, positions.labels, extras)

    def prompt(self, text: str, images: Sequence[Image] = ()) -> Prepared:
        if images:
            self.input_format.check_vision()
        pixels = [self.loaded.image_processor(image) for image in images]
        extras = {"pixel_values": torch.stack(pixels)} if pixels else {}
        return self._ask(text, len(images), extras)

    def reprompt(self, item: Prepared, text: str, images: Sequence[Image] = ()) -> Prepared:
        return self._ask(text, len(images), item.extras)

    def decode(self, ids: Sequence[int]) -> str:
        return self.loaded.tokenizer.decode(ids)

    def first_token(self, answer: str) -> int:
        turns = [("human", "?"), ("gpt", answer)]
        labels = self.input_format.encode(turns, has_image=False).labels
        return int(labels[labels != IGNORE_INDEX][0])

    def _ask(self, text: str, n_images: int, extras: dict[str, torch.Tensor]) -> Prepared:
        """The ids of a question: one placeholder an image in front, each on a line of its own."""
        loaded = self.loaded
        if n_images:
            text = f"{IMAGE_TOKEN}\n" * n_images + text.replace(IMAGE_TOKEN, "")
        turns = [("human", text), ("gpt", "")]
        segments = render(self.input_format.template, turns, has_image=False)
        ids = tokenize(segments, loaded.tokenizer, n_images).input_ids
        image = ids == IMAGE_TOKEN_INDEX
        ids[image] = loaded.image_token_id or 0
        ids = ids.repeat_interleave(torch.where(image, loaded.n_image_tokens, 1))
        return Prepared(ids, torch.full_like(ids, IGNORE_INDEX), extras)

    def _closing_ids(self) -> set[int]:
        # LLaVA stops at </s> alone, so a closing of several tokens (###) ends nothing.
        tokenizer = self.loaded.tokenizer
        closing, _ = tokenizer.encode(self.input_format.template.gpt.close.strip())
        return {i for i in (tokenizer.eos_id, *closing[: len(closing) == 1]) if i is not None}
