"""LLaVA-1.5: the ids, labels and pixels that it was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from llava.conversation import get_template
from llava.data import expand_image
from llava.errors import DataError
from llava.tokens import IMAGE_TOKEN_INDEX, Encoded, encode_conversation
from llava.vlm.base import Prepared, Vlm

if TYPE_CHECKING:
    from llava.data import Record
    from llava.model.checkpoint import Loaded


class LlavaVlm(Vlm):
    """A checkpoint read by `llava.model.checkpoint.load`."""

    kind = "llava"

    def __init__(self, loaded: Loaded, fingerprint: str) -> None:
        super().__init__(
            loaded.model, fingerprint, loaded.tokenizer.pad_id, loaded.model_max_length
        )
        self.loaded = loaded
        self.template = get_template(loaded.template_name)

    def identity(self) -> dict[str, Any]:
        images = self.loaded.image_processor
        return {
            **super().identity(),
            "template": self.loaded.template_name,
            "image_processor": images.fingerprint() if images else None,
        }

    def prepare(self, record: Record, image: Image | None) -> Prepared:
        if image is not None and self.loaded.image_processor is None:
            raise DataError("has an image, but the model is a language model without vision")
        encoded, shown = self._encode(record, image is not None)
        extras = {"pixel_values": self.loaded.image_processor(image)[None]} if shown else {}
        return Prepared(encoded.input_ids, encoded.labels, extras)

    def rewrite(self, item: Prepared, record: Record, image: Image | None) -> Prepared:
        encoded, shown = self._encode(record, image is not None)
        return Prepared(encoded.input_ids, encoded.labels, item.extras if shown else {})

    def _encode(self, record: Record, has_image: bool) -> tuple[Encoded, bool]:
        """Ids and labels with the image expanded, and whether the image is shown at all.

        As in LLaVA, an image that no turn refers to is not shown to the model.
        """
        loaded = self.loaded
        encoded = encode_conversation(record.turns, has_image, self.template, loaded.tokenizer)
        shown = bool((encoded.input_ids == IMAGE_TOKEN_INDEX).any())
        expanded = expand_image(
            encoded, loaded.n_image_tokens, loaded.image_token_id, self.max_length
        )
        return expanded, shown
