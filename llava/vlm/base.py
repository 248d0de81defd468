"""A vision-language model behind one small interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llava.errors import UsageError
from llava.tokens import IGNORE_INDEX
from llava.vlm.attention import LastRow

if TYPE_CHECKING:
    from llava.model.lora import LowRank
    from llava.model.moments import Moments
    from llava.records import Record

MIN_ROWS = 16
"""Below this, CPU matrix products use other kernels, with other rounding, than for many rows."""


def padded_length(length: int) -> int:
    """Length that a sequence of `length` tokens is padded to: a function of its own length only.

    The next multiple of 8, 16, 32, ... (about a sixteenth of the length, at least 8), at least
    `MIN_ROWS`: on average 2-3 % of padding from 130 tokens on.
    """
    quantum = max(8, 1 << max(length // 16, 1).bit_length() - 1)
    return max(MIN_ROWS, -(-length // quantum) * quantum)


@dataclass
class Prepared:
    """Model inputs of one sample: `input_ids` and `labels` (L,) int64, images expanded to tokens.

    `token_inputs` hold one number a token, (L,); `extras` are further model inputs whose first
    axis counts images or patches (`pixel_values`, `image_sizes`, ...).
    """

    input_ids: Tensor
    labels: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    token_inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Tokens of the sequence after padding, what a batch's size is counted in."""
        return padded_length(len(self.input_ids))

    @property
    def key(self) -> tuple:
        """Samples with equal keys may share a batch: same padded length, same kinds of images."""
        extras = sorted((name, *tensor.shape[1:]) for name, tensor in self.extras.items())
        return (self.n_tokens, *extras)


@dataclass
class Batch:
    """Right-padded inputs on the model's device; `last` is each sample's last real position."""

    input_ids: Tensor  # (B, S)
    labels: Tensor  # (B, S)
    last: Tensor  # (B,)
    inputs: dict[str, Tensor]


@dataclass
class ForwardOut:
    """`hidden` (B, S, H): states after the final norm; `attention` (B, S) float32: last rows."""

    hidden: Tensor
    attention: Tensor


class StableRows(TorchFunctionMode):
    """Linear layers on the CPU whose rows do not depend on how many others they are computed with.

    Fewer than `MIN_ROWS` rows (image mergers and heads see few) are padded. Every input becomes one
    matrix in one piece: the image states without the class token's are that already for a single
    image, not for two, and PyTorch adds the bias inside the product only where they are, which
    rounds once in bfloat16 instead of twice.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and args[0].is_cpu:
            x = args[0]
            rows = x.numel() // max(x.shape[-1], 1)
            flat = x.reshape(rows, x.shape[-1]).contiguous()
            if rows < MIN_ROWS:
                flat = F.pad(flat, (0, 0, 0, MIN_ROWS - rows))
            out = func(flat, *args[1:], **(kwargs or {}))
            return out[:rows].reshape(*x.shape[:-1], out.shape[-1])
        return func(*args, **(kwargs or {}))


class Vlm:
    """A vision-language model in evaluation mode. Subclasses know how a record becomes inputs.

    The model's text decoder is causal, so right padding needs no attention mask; without a mask
    every kernel takes its fast path and a sample's numbers do not depend on its batch.
    """

    kind: str

    def __init__(self, model: nn.Module, fingerprint: str, pad_id: int, max_length: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.fingerprint = fingerprint
        self.pad_id = pad_id
        self.max_length = max_length
        self._end_ids = _end_ids(model)
        text = model.config.get_text_config()
        self.hidden_size: int = text.hidden_size
        if text is not self.decoder.config:
            # A model put together from parts: otherwise the attention switch misses one of them.
            model.config.text_config = self.decoder.config
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(text, name, None) not in (None, 1, 1.0):
                raise UsageError(
                    f"{type(model).__name__} rescales its logits ({name}), which the answer loss "
                    "here does not do; choose another model"
                )
        self.recorder = LastRow(self.decoder)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def stored_dtype(self) -> str:
        """Dtype in which states are stored: float32 for float32 proxies, else float16."""
        return "float32" if self.dtype == torch.float32 else "float16"

    @property
    def adapter(self) -> Mapping[str, LowRank]:
        """The LoRA that was merged into the decoder, by the name of the layer in it; often none."""
        return {}

    @property
    def moments(self) -> Moments:
        """Adam's moments of the adapter, from the training that made the checkpoint."""
        raise UsageError(f"{type(self.model).__name__}: no LoRA checkpoint, so no moments of one")

    def identity(self) -> dict[str, Any]:
        """Everything about the model that decides numbers, JSON-serialisable."""
        return {
            "kind": self.kind,
            "checkpoint": self.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model_max_length": self.max_length,
            "torch": _minor(torch.__version__),
            "transformers": _minor(transformers.__version__),
        }

    def prepare(self, record: Record, image: Image | None) -> Prepared:
        """Model inputs of one record, on the CPU. Raises `DataError` when it cannot be used."""
        raise NotImplementedError

    def rewrite(self, item: Prepared, record: Record, image: Image | None) -> Prepared:
        """Model inputs of `record`, which is the sample of `item` in other words, same image."""
        return self.prepare(record, image)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the checkpoint's own and what closes a turn in training."""
        return frozenset(self._end_ids | self._closing_ids())

    def _closing_ids(self) -> set[int]:
        raise NotImplementedError

    def prompt(self, text: str, images: Sequence[Image] = ()) -> Prepared:
        """Model inputs of one question, images in front, up to where its answer begins.

        No label is supervised. Never cut: a long question would lose its options.
        """
        raise NotImplementedError

    def reprompt(self, item: Prepared, text: str, images: Sequence[Image] = ()) -> Prepared:
        """`prompt(text, images)`, where `item` is another question about the same images."""
        return self.prompt(text, images)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids that the model wrote; special tokens are left out."""
        raise NotImplementedError

    def first_token(self, answer: str) -> int:
        """The id with which an answer that begins with `answer` begins in training."""
        raise NotImplementedError

    def collate(self, items: Sequence[Prepared], pad_to: int | None = None) -> Batch:
        """Pad to `pad_to` tokens (default: the longest padded length) and move to the device."""
        length = pad_to or max(item.n_tokens for item in items)

        def stack(tensors: list[Tensor], fill: int) -> Tensor:
            padded = [F.pad(tensor, (0, length - len(tensor)), value=fill) for tensor in tensors]
            return torch.stack(padded).to(self.device, non_blocking=True)

        inputs = {
            name: stack([item.token_inputs[name] for item in items], 0)
            for name in items[0].token_inputs
        }
        return Batch(
            input_ids=stack([item.input_ids for item in items], self.pad_id),
            labels=stack([item.labels for item in items], IGNORE_INDEX),
            last=torch.tensor([len(item.input_ids) - 1 for item in items], device=self.device),
            inputs={**inputs, **self.image_inputs(items)},
        )

    def image_inputs(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """The `extras` of all items, one after another, on the device."""
        inputs = {}
        for name in items[0].extras:
            tensor = torch.cat([item.extras[name] for item in items]).to(self.device)
            inputs[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return inputs

    def forward(self, batch: Batch) -> ForwardOut:
        """Final hidden states and last attention rows of a batch, in one pass."""
        with StableRows(), self.recorder as recorder:
            recorder.last = batch.last
            hidden = self.hidden(batch)
            row, recorder.row = recorder.row, None
        return ForwardOut(hidden, row)

    def hidden(self, batch: Batch) -> Tensor:
        """States of a batch after the final norm, (B, S, H)."""
        out = self.model.base_model(
            input_ids=batch.input_ids, use_cache=False, return_dict=True, **batch.inputs
        )
        return out.last_hidden_state


def _end_ids(model: nn.Module) -> set[int]:
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
