"""LLaVA JSON to model input: records, dataset, collator and sampler, for training and for scoring.

`python -m llava.data show` (in `llava.show`) prints what the model will see; the format is
described in docs/Data.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from llava.conversation import Template
from llava.errors import DataError, run_main
from llava.images import BadImage, ImageProcessor, open_image, shortened
from llava.records import Record
from llava.tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded, Tokenizer, encode_conversation

Item = dict[str, torch.Tensor | None]  # of `ConversationDataset`


class ConversationDataset(Dataset):
    """Records as model input: `input_ids` and `labels` (L,) int64, `pixel_values` or None.

    `pixel_values` (3, size, size) float32 is there exactly when `input_ids` holds
    IMAGE_TOKEN_INDEX: an image whose record never says `<image>` is not read, because it would
    reach no position (LLaVA encodes it and throws it away). `extra_roots`: see `open_image`.

    An item raises DataError or BadImage naming its row; no item is ever replaced by another.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_folder: str | Path,
        template: Template,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor | None,
        extra_roots: Sequence[Path] = (),
    ) -> None:
        self.records = records
        self.image_folder = Path(image_folder)
        self.template = template
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.extra_roots = extra_roots

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Item:
        record = self.records[row]
        try:
            encoded = encode_conversation(
                record.turns, record.has_image, self.template, self.tokenizer
            )
            shows_image = bool((encoded.input_ids == IMAGE_TOKEN_INDEX).any())
            pixels = self._pixels(record.image) if shows_image else None
        except BadImage as error:
            raise BadImage(f"{self._where(row)}: {error}", refused=error.refused) from error
        except DataError as error:
            raise DataError(f"{self._where(row)}: {error}") from error
        return {**encoded._asdict(), "pixel_values": pixels}

    def _where(self, row: int) -> str:
        return f"row {row} (id {shortened(str(self.records[row].id))})"

    def _pixels(self, ref: str) -> torch.Tensor:
        if self.image_processor is None:
            raise DataError("has an image, but the model has no vision tower")
        return self.image_processor(
            open_image(self.image_folder, ref, extra_roots=self.extra_roots)
        )

    def modality_lengths(self) -> list[int]:
        """Words of each record, negative for text-only ones: what the sampler groups by."""
        words = [sum(len(turn.value.split()) for turn in r.conversations) for r in self.records]
        return [n if r.has_image else -n for n, r in zip(words, self.records, strict=True)]


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


@dataclass(frozen=True)
class Collator:
    """Items of `ConversationDataset` to a batch, padded on the right.

    `input_ids`, `labels`, `attention_mask` are (B, L) int64; `pixel_values` (n, 3, S, S) float32
    has one row for each item with an image, in order. A batch without any gets one zero image and
    `dummy_image=True`: every rank must run the vision tower in every step, or ZeRO-3 waits for
    ever (P19); the trainer multiplies its features by zero. With `image_size=None` (a language
    model alone) a batch never holds pixels.
    """

    pad_id: int
    image_token_id: int
    n_image_tokens: int
    model_max_length: int
    image_size: int | None

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        encoded = [self.expand(item) for item in items]
        mask = [torch.ones_like(e.input_ids) for e in encoded]
        return {
            "input_ids": pad_rows([e.input_ids for e in encoded], self.pad_id),
            "labels": pad_rows([e.labels for e in encoded], IGNORE_INDEX),
            "attention_mask": pad_rows(mask, 0),
            **self.pictures(items),
        }

    def expand(self, item: Item) -> Encoded:
        """Ids and labels of one item with its image expanded, cut at `model_max_length`."""
        encoded = Encoded(item["input_ids"], item["labels"])
        return expand_image(
            encoded, self.n_image_tokens, self.image_token_id, self.model_max_length
        )

    def pictures(self, items: Sequence[Item]) -> dict[str, Any]:
        """`pixel_values` of the items' images in order, or the zero image and `dummy_image`."""
        images = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
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
    from llava.show import main

    run_main(main)
