"""Records as model input: the one road from a record to tensors, dataset, collator and sampler.

Training, signals, checks and plans all go through `InputFormat`, so a sample looks the same to all.
`python -m llava.data show` (in `llava.show`) prints what the model will see; the format of the
files is described in docs/Data.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from PIL.Image import Image
from torch.utils.data import Dataset, Sampler

from llava.conversation import Template, get_template
from llava.errors import DataError
from llava.images import BadImage, ImageProcessor, open_image, shortened
from llava.records import Record
from llava.tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded, Tokenizer, encode_conversation

if TYPE_CHECKING:
    from llava.model.checkpoint import Loaded


class ModelInput(TypedDict):
    """One sample as a model takes it; `pixel_values` is None when no image is shown."""

    input_ids: torch.Tensor  # (L,) int64
    labels: torch.Tensor  # (L,) int64
    pixel_values: torch.Tensor | None  # (3, S, S) float32


class Positions(NamedTuple):
    """Ids and labels (L,) int64 of a conversation, its image expanded, cut at the maximum."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    shows_image: bool
    """Whether a turn refers to the image; as in LLaVA, the model does not see any other."""
    n_whole: int
    """Positions before the cut."""


@dataclass(frozen=True)
class InputFormat:
    """What decides how a record becomes model input."""

    template: Template
    tokenizer: Tokenizer
    image_processor: ImageProcessor | None
    """None where only ids and labels are made, and for a language model alone."""
    image_token_id: int | None
    n_image_tokens: int
    """Positions an image takes; 0 for a language model alone."""
    model_max_length: int
    """Positions after the image is expanded; longer samples are cut."""

    @classmethod
    def of(cls, loaded: Loaded) -> InputFormat:
        """That of a checkpoint."""
        return cls(
            get_template(loaded.template_name),
            loaded.tokenizer,
            loaded.image_processor,
            loaded.image_token_id,
            loaded.n_image_tokens,
            loaded.model_max_length,
        )

    def encode(self, turns: Sequence[tuple[str, str]], has_image: bool) -> Positions:
        """Ids and labels of a conversation.

        Without an image, `<image>` is ordinary text. Raises DataError where template or tokenizer
        refuse it, for an image shown to a language model, and if the cut goes through the image.
        """
        encoded = encode_conversation(turns, has_image, self.template, self.tokenizer)
        shows_image = bool((encoded.input_ids == IMAGE_TOKEN_INDEX).any())
        if shows_image:
            self.check_vision()
        n_whole = len(encoded.input_ids) + shows_image * (self.n_image_tokens - 1)
        cut = expand_image(encoded, self.n_image_tokens, self.image_token_id, self.model_max_length)
        return Positions(*cut, shows_image, n_whole)

    def model_input(
        self, turns: Sequence[tuple[str, str]], open_picture: Callable[[], Image] | None
    ) -> ModelInput:
        """Ids, labels and pixels of a conversation; without `open_picture` it has no image.

        `open_picture` is called only if the image is shown: LLaVA encodes any other and throws it
        away. Raises as `encode` and `open_picture` do.
        """
        positions = self.encode(turns, open_picture is not None)
        pixels = self.image_processor(open_picture()) if positions.shows_image else None
        return ModelInput(
            input_ids=positions.input_ids, labels=positions.labels, pixel_values=pixels
        )

    def check_vision(self) -> None:
        """Raise DataError for a language model alone, which takes no image."""
        if not self.n_image_tokens:
            raise DataError(
                "has an image, but the model has no vision tower; it is a language model without "
                "vision"
            )


def expand_image(
    encoded: Encoded, n_image_tokens: int, image_token_id: int, model_max_length: int
) -> Encoded:
    """Replace the image placeholder by its positions, then cut at `model_max_length`.

    Image positions are `image_token_id` and unsupervised. DataError if the cut goes through them.
    """
    ids, labels = encoded
    places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    if places:
        (at,) = places
        if at + n_image_tokens > model_max_length:
            raise DataError(
                f"the image ends at position {at + n_image_tokens}, beyond the maximum length of "
                f"{model_max_length}; shorten the text before it or raise model_max_length"
            )
        image = torch.full((n_image_tokens,), image_token_id)
        ids = torch.cat([ids[:at], image, ids[at + 1 :]])
        ignored = torch.full((n_image_tokens,), IGNORE_INDEX)
        labels = torch.cat([labels[:at], ignored, labels[at + 1 :]])
    return Encoded(ids[:model_max_length], labels[:model_max_length])


class ConversationDataset(Dataset):
    """Records as `ModelInput`; `extra_roots`: see `open_image`.

    An item raises DataError or BadImage naming its row; no item is ever replaced by another.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_folder: str | Path,
        input_format: InputFormat,
        extra_roots: Sequence[Path] = (),
    ) -> None:
        self.records = records
        self.image_folder = Path(image_folder)
        self.input_format = input_format
        self.extra_roots = extra_roots

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> ModelInput:
        record, open_picture = self.records[row], None
        if record.has_image:
            open_picture = partial(
                open_image, self.image_folder, record.image, extra_roots=self.extra_roots
            )
        try:
            return self.input_format.model_input(record.turns, open_picture)
        except (BadImage, DataError) as error:
            message = f"row {row} (id {shortened(str(record.id))}): {error}"
            if isinstance(error, BadImage):
                raise BadImage(message, refused=error.refused) from error
            raise DataError(message) from error


def modality_lengths(records: Sequence[Record]) -> list[int]:
    """Words of each record, negative for text-only ones: what the sampler groups by."""
    words = [sum(len(turn.value.split()) for turn in record.conversations) for record in records]
    return [n if r.has_image else -n for n, r in zip(words, records, strict=True)]


@dataclass(frozen=True)
class Collator:
    """Samples to a batch, padded on the right.

    `input_ids`, `labels`, `attention_mask` are (B, L) int64; `pixel_values` (n, 3, S, S) float32
    has one row for each sample with an image, in order. A batch without any gets one zero image and
    `dummy_image=True`: every rank must run the vision tower in every step, or ZeRO-3 waits for
    ever (P19); the trainer multiplies its features by zero. With `image_size=None` (a language
    model alone) a batch never holds pixels.
    """

    pad_id: int
    image_size: int | None

    def __call__(self, samples: Sequence[ModelInput]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": pad_rows(ids, self.pad_id),
            "labels": pad_rows([sample["labels"] for sample in samples], IGNORE_INDEX),
            "attention_mask": pad_rows([torch.ones_like(row) for row in ids], 0),
            **self.pictures(samples),
        }

    def pictures(self, samples: Sequence[ModelInput]) -> dict[str, Any]:
        """`pixel_values` of the samples' images in order, or the zero image and `dummy_image`."""
        pixels = [sample["pixel_values"] for sample in samples]
        images = [picture for picture in pixels if picture is not None]
        if images:
            return {"pixel_values": torch.stack(images)}
        if self.image_size is None:
            return {}
        zero = torch.zeros(1, 3, self.image_size, self.image_size)
        return {"pixel_values": zero, "dummy_image": True}


def pad_rows(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """Rows of different length as one (B, L) tensor, filled up on the right with `value`."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


class ModalityLengthSampler(Sampler[int]):
    """Row order in which a global step sees one modality and similar lengths, as LLaVA trains.

    Args:
        lengths: (N,) words of each row, never 0, negative for text-only rows.
        batch_size: rows of one device and micro-batch.
        world_size: devices.
        generator: source of randomness; give every rank the same state. It advances each epoch.
        accumulation: micro-batches of an optimizer step.

    Only the last block of two global steps or fewer can mix modalities. The steps hold the rows
    that LLaVA's hold, but LLaVA deals a step's rows to micro-batches as if each were a device: a
    long row in each of them, to which the others are padded. Here the longest rows share a
    micro-batch. Raises DataError on a zero length.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        world_size: int,
        generator: torch.Generator,
        accumulation: int = 1,
    ) -> None:
        if 0 in lengths:
            raise DataError(f"row {lengths.index(0)} has no words, so it cannot be grouped")
        self.lengths = lengths
        self.batch_size = batch_size
        self.world_size = world_size
        self.generator = generator
        self.accumulation = accumulation

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rows = range(len(self.lengths))
        with_image = [row for row in rows if self.lengths[row] > 0]
        text_only = [row for row in rows if self.lengths[row] < 0]
        if not with_image or not text_only:
            return iter(self._grouped(rows, self.lengths))
        steps, leftover = [], []
        for modality in (with_image, text_only):
            lengths = [abs(self.lengths[row]) for row in modality]
            *full, last = cut(self._grouped(modality, lengths), self._step_size)
            steps += full
            leftover += last
        order = torch.randperm(len(steps), generator=self.generator).tolist()
        return iter([row for step in order for row in steps[step]] + sorted(leftover))

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.world_size * self.accumulation

    def _grouped(self, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Shuffle, cut in global steps, sort each; deal what devices run at a time evenly."""
        shuffled = torch.randperm(len(rows), generator=self.generator).tolist()
        order: list[int] = []
        for step in cut(shuffled, self._step_size):
            longest_first = sorted(step, key=lambda i: -lengths[i])
            for together in cut(longest_first, self.batch_size * self.world_size):
                for share in deal_evenly(together, lengths, self.world_size):
                    order += [rows[i] for i in share]
        return order


def cut(items: Sequence[int], size: int) -> list[Sequence[int]]:
    """Consecutive pieces of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def deal_evenly(items: Sequence[int], lengths: Sequence[int], n_shares: int) -> list[list[int]]:
    """Deal items, each to the shortest share that still has room; strided if counts differ."""
    if len(items) % n_shares:
        return [list(items[start::n_shares]) for start in range(n_shares)]
    capacity = len(items) // n_shares
    shares: list[list[int]] = [[] for _ in range(n_shares)]
    open_shares = [(0, share) for share in range(n_shares)]  # a heap: shortest, then first
    for item in items:
        total, share = heapq.heappop(open_shares)
        shares[share].append(item)
        if len(shares[share]) < capacity:
            heapq.heappush(open_shares, (total + lengths[item], share))
    return shares


if __name__ == "__main__":
    from llava.launch import process
    from llava.show import main

    process(main)
