"""Any Hugging Face vision-language model, through its own processor and chat template.

Which tokens are supervised is known by construction: the conversation is rendered up to each
answer with the generation prompt, and again with the answer; what the second text adds is the
answer and its end-of-turn token. Nothing is searched for in the text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from PIL.Image import Image
from torch import Tensor

from llava.conversation import IMAGE_TOKEN, check_turns
from llava.errors import DataError, UsageError
from llava.tokens import IGNORE_INDEX
from llava.vlm.base import Prepared, Vlm

if TYPE_CHECKING:
    from llava.model.checkpoint import Checkpoint
    from llava.records import Record

ROLES = {"human": "user", "gpt": "assistant"}
SAFELY = {"local_files_only": True, "trust_remote_code": False}  # no code out of a checkpoint
VIDEO = "video_processor"
CONFIGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
NO_LIMIT = 1 << 20  # tokenizers without a limit report an astronomic one


class ProcessorVlm(Vlm):
    """A model of AutoModelForImageTextToText with its AutoProcessor."""

    kind = "processor"

    def __init__(self, model: Any, processor: Any, fingerprint: str) -> None:
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise UsageError(
                f"{type(tokenizer).__name__} gives no character offsets; save the checkpoint with "
                "its fast tokenizer (tokenizer.json)"
            )
        if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
            raise UsageError("the processor has no chat template; add chat_template.jinja")
        text = model.config.get_text_config()
        limits = [tokenizer.model_max_length, getattr(text, "max_position_embeddings", NO_LIMIT)]
        pad = tokenizer.pad_token_id
        super().__init__(model, fingerprint, 0 if pad is None else pad, min(*limits, NO_LIMIT))
        self.processor = processor
        processor.image_processor = LastImages(processor.image_processor)
        self.image_token_id: int = model.config.image_token_id
        self.image_token: str = tokenizer.convert_ids_to_tokens(self.image_token_id)

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> ProcessorVlm:
        """Read model and processor; UsageError in one line if that fails."""
        from transformers import AutoModelForImageTextToText

        path = checkpoint.folder
        try:
            processor = load_processor(path)
            model = AutoModelForImageTextToText.from_pretrained(
                path, dtype=dtype, use_safetensors=True, **SAFELY
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(
                f"{path}: no vision-language model with a processor can be read ({reason[0]})"
            ) from error
        return cls(model.to(device), processor, checkpoint.fingerprint())

    def identity(self) -> dict[str, Any]:
        template = self.processor.chat_template or self.processor.tokenizer.chat_template
        images = self.processor.image_processor.to_json_string()
        return {
            **super().identity(),
            "template": xxhash.xxh3_128_hexdigest(str(template).encode()),
            "image_processor": xxhash.xxh3_128_hexdigest(images.encode()),
        }

    def prepare(self, record: Record, image: Image | None) -> Prepared:
        messages, has_image = self._messages(check_turns(record.turns), image is not None)
        text, spans = render(self.processor, messages)
        item = self._inputs(text, [image] if has_image else [])
        supervised = self._supervised(text, spans, item.input_ids)
        item.labels = torch.where(supervised, item.input_ids, IGNORE_INDEX)
        return self._cut(item)

    def prompt(self, text: str, images: Sequence[Image] = ()) -> Prepared:
        content = [{"type": "image"}] * len(images)
        content.append({"type": "text", "text": text.replace(self.image_token, "")})
        rendered = self.processor.apply_chat_template(
            [{"role": ROLES["human"], "content": content}],
            tokenize=False,
            add_generation_prompt=True,
        )
        return self._inputs(rendered, images)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def first_token(self, answer: str) -> int:
        return self._answer_ids(answer)[0]

    def _closing_ids(self) -> set[int]:
        tokenizer = self.processor.tokenizer
        return {self._answer_ids("A")[-1], tokenizer.eos_token_id} & set(tokenizer.all_special_ids)

    def _answer_ids(self, answer: str) -> list[int]:
        """The supervised ids of an answer, its end of turn included."""
        messages, _ = self._messages([("human", "?"), ("gpt", answer)], False)
        text, spans = render(self.processor, messages)
        ids = self._inputs(text, []).input_ids
        return ids[self._supervised(text, spans, ids)].tolist()

    def _inputs(self, text: str, images: Sequence[Image]) -> Prepared:
        """What the processor makes of a rendered conversation and its images; no labels."""
        try:
            inputs = self.processor(
                text=[text],
                images=[list(images)] if images else None,
                return_tensors="pt",
                add_special_tokens=self._adds_special(text),
            )
        except ValueError as error:
            raise DataError(f"the processor refuses it: {error}") from error
        ids = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask", None)
        token_inputs = {n: inputs.pop(n)[0] for n in list(inputs) if n.endswith("token_type_ids")}
        return Prepared(ids, torch.full_like(ids, IGNORE_INDEX), dict(inputs), token_inputs)

    def _messages(
        self, turns: Sequence[tuple[str, str]], has_image: bool
    ) -> tuple[list[dict], bool]:
        """Chat messages with the image in front of the turn that has the placeholder."""
        messages, n_images = [], 0
        for role, text in turns:
            content = []
            if has_image and IMAGE_TOKEN in text:
                text = text.replace(IMAGE_TOKEN, "").strip()
                content.append({"type": "image"})
                n_images += 1
            # A literal placeholder of this model in the text would ask for another image.
            content.append({"type": "text", "text": text.replace(self.image_token, "")})
            messages.append({"role": ROLES[role], "content": content})
        if n_images > 1:
            raise DataError(f"{n_images} turns hold {IMAGE_TOKEN}; a record has one image")
        return messages, n_images == 1

    def _adds_special(self, text: str) -> bool:
        """Whether the tokenizer must add BOS: not when the chat template has written it."""
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _supervised(self, text: str, spans: list[tuple[int, int]], input_ids: Tensor) -> Tensor:
        """Mask (L,) of the tokens inside `spans` of the text before the image was expanded.

        Around the image the expanded ids equal those of the plain text, so tokens before it are
        counted from the front and tokens after it from the end.
        """
        plain = self.processor.tokenizer(
            text, add_special_tokens=self._adds_special(text), return_offsets_mapping=True
        )
        ids = torch.tensor(plain["input_ids"])
        inside = torch.tensor(
            [any(b < end and e > begin for begin, end in spans) for b, e in plain["offset_mapping"]]
        )
        places = torch.nonzero(ids == self.image_token_id).flatten().tolist()
        head, tail = (places[0], len(ids) - places[-1] - 1) if places else (len(ids), 0)
        mask = torch.zeros(len(input_ids), dtype=torch.bool)
        same = len(input_ids) >= head + tail and torch.equal(input_ids[:head], ids[:head])
        if not same or not torch.equal(*(x[len(x) - tail :] for x in (input_ids, ids))):
            raise DataError("the processor changes the text around the image; labels are unknown")
        mask[:head] = inside[:head]
        mask[len(mask) - tail :] = inside[len(inside) - tail :]
        return mask

    def _cut(self, item: Prepared) -> Prepared:
        """Keep the first `max_length` tokens; DataError when that cuts into the image."""
        if len(item.input_ids) <= self.max_length:
            return item
        rest = item.input_ids[self.max_length :]
        if bool((rest == self.image_token_id).any()):
            raise DataError(
                f"the image ends after the model's maximum of {self.max_length} tokens; "
                "shorten the text before it"
            )
        tokens = {name: x[: self.max_length] for name, x in item.token_inputs.items()}
        cut = slice(self.max_length)
        return Prepared(item.input_ids[cut], item.labels[cut], item.extras, tokens)


class LastImages:
    """An image processor that keeps what it made of the last images.

    A sample is prepared once for every order of its options, and its images cost the processor
    many times what the text costs.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._images: list[Image] = []
        self._made: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling look for these before there is anything
            raise AttributeError(name)
        return getattr(self._processor, name)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        shown = _flat(images)
        if list(map(id, shown)) != list(map(id, self._images)):
            self._made = self._processor(images, *args, **kwargs)
            self._images = shown
        return copy.copy(self._made)  # processors take out what the model does not need


def _flat(images: Any) -> list[Image]:
    """The images of a batch of one sample, however the processor nests them."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for part in images for image in _flat(part)]


def load_processor(path: Path) -> Any:
    """The folder's processor, without its part for videos, which would need torchvision."""
    import transformers

    name = next(filter(None, (_processor_class(path / file) for file in CONFIGS)), None)
    cls = getattr(transformers, name or "", None)
    if cls is None:
        raise ValueError(f"processor class {name!r} is not one of transformers")

    class StillImages(cls):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != VIDEO]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            parts = super()._get_arguments_from_pretrained(*args, **kwargs)
            all_parts = super().get_attributes()
            if VIDEO in all_parts:
                parts.insert(all_parts.index(VIDEO), None)
            return parts

    return StillImages.from_pretrained(path, **SAFELY)


def _processor_class(path: Path) -> str | None:
    return json.loads(path.read_text("utf-8")).get("processor_class") if path.is_file() else None


def render(processor: Any, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The chat template's text and the character spans of the answers, end of turn included.

    White space after the end-of-turn token is not supervised, nor is an empty answer. Raises
    DataError when the template does not write a conversation turn after turn.
    """
    spans = []
    text = processor.apply_chat_template(messages, tokenize=False)
    for k, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"][-1]["text"]:
            continue
        before = processor.apply_chat_template(
            messages[:k], tokenize=False, add_generation_prompt=True
        )
        after = processor.apply_chat_template(messages[: k + 1], tokenize=False)
        if not after.startswith(before) or not text.startswith(after.rstrip()):
            raise DataError(
                f"the chat template rewrites earlier turns at turn {k}; this model's answers "
                "cannot be located"
            )
        spans.append((len(before), len(after.rstrip())))
    return text, spans
