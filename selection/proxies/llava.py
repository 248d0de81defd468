"""LLaVA-1.5 as proxy: the ids, labels and pixels that it was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from llava.conversation import get_template
from llava.data import expand_image
from llava.errors import DataError
from llava.tokens import IMAGE_TOKEN_INDEX, encode_conversation
from selection.proxies.base import Prepared, Proxy

if TYPE_CHECKING:
    from llava.data import Record
    from llava.model.checkpoint import Loaded


class LlavaProxy(Proxy):
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
        loaded, has_image = self.loaded, image is not None
        if has_image and loaded.image_processor is None:
            raise DataError("has an image, but the proxy is a language model without vision")
        turns = [(turn.from_, turn.value) for turn in record.conversations]
        encoded = encode_conversation(turns, has_image, self.template, loaded.tokenizer)
        # As in LLaVA, an image that no turn refers to is not shown to the model.
        shown = bool((encoded.input_ids == IMAGE_TOKEN_INDEX).any())
        encoded = expand_image(
            encoded, loaded.n_image_tokens, loaded.image_token_id, self.max_length
        )
        extras = {"pixel_values": loaded.image_processor(image)[None]} if shown else {}
        return Prepared(encoded.input_ids, encoded.labels, extras)
