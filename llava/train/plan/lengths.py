"""How long the samples are, and the batches they make: for plans, from a random part of the data.

Tokenisation, expansion of the image, truncation, order and padding are the training's own code. No
image is opened.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from llava.data import Collator, InputFormat, ModelInput, modality_lengths
from llava.errors import DataError
from llava.model.checkpoint import Loaded
from llava.packing import PackingCollator
from llava.records import Record
from llava.tokens import IGNORE_INDEX
from llava.train.arguments import TrainingArguments
from llava.train.trainer import EpochSampler

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class Sampled:
    """Some records as model input without pixels. Lengths are positions, an image's included."""

    records: list[Record]
    samples: list[ModelInput]
    show_image: list[bool]
    lengths: list[int]
    """After the cut at the model's maximum length."""
    uncut: list[int]
    supervised: list[int]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one device."""

    n_rows: int
    length: int
    """Positions of a row, padding included."""
    n_samples: int
    n_tokens: int
    """Positions that are no padding."""
    n_supervised: int
    n_logits: int
    """Positions of a row at which the output layer runs: where some row is supervised."""
    n_images: int

    @property
    def n_positions(self) -> int:
        return self.n_rows * self.length


@dataclass(frozen=True)
class Lengths:
    """The distribution of sample lengths, and what the batches make of it."""

    n_sampled: int
    mean: float
    standard_error: float
    """Of the mean, relative to it; 0 when all records were tokenised."""
    percentiles: dict[str, int]
    supervised_share: float
    truncated_share: float
    padding_share: float
    """Of the positions that this run computes."""
    padding_share_grouped: float
    """With --group_by_modality_length, whatever the flags say."""
    padding_share_random: float
    """In random order, likewise."""


def draw(records: Sequence[Record], loaded: Loaded, n_samples: int, seed: int) -> Sampled:
    """Tokenise `n_samples` records drawn with `seed`, or all, in their order.

    Raises DataError naming the row of a record that training would stop at.
    """
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = sorted(order[:n_samples])
    input_format = InputFormat.of(loaded)
    sampled = Sampled([records[row] for row in rows], [], [], [], [], [])
    for row, record in zip(rows, sampled.records, strict=True):
        try:
            ids, labels, shows_image, n_whole = input_format.encode(record.turns, record.has_image)
        except DataError as error:
            raise DataError(f"row {row}: {error}") from error
        sampled.samples.append(ModelInput(input_ids=ids, labels=labels, pixel_values=None))
        sampled.show_image.append(shows_image)
        sampled.lengths.append(len(ids))
        sampled.uncut.append(n_whole)
        sampled.supervised.append(int((labels != IGNORE_INDEX).sum()))
    return sampled


def make_batches(
    order: Sequence[int],
    sampled: Sampled,
    collate: Callable[[Sequence[ModelInput]], dict[str, torch.Tensor]],
    batch_size: int,
    world_size: int,
) -> list[Batch]:
    """The batches that each device's loader makes of `order`, all devices together."""
    whole = BatchSampler(order, batch_size, drop_last=False)
    shards = [BatchSamplerShard(whole, world_size, rank) for rank in range(world_size)]
    if world_size == 1:  # several devices fill their last batches up with rows from the beginning
        shards = [whole]
    return [_measure(rows, sampled, collate) for shard in shards for rows in shard]


def _measure(rows: Sequence[int], sampled: Sampled, collate: Callable) -> Batch:
    batch = collate([sampled.samples[row] for row in rows])
    ids, labels = batch["input_ids"], batch["labels"]
    supervised = labels[:, 1:] != IGNORE_INDEX
    return Batch(
        n_rows=ids.shape[0],
        length=ids.shape[1],
        n_samples=len(rows),
        n_tokens=sum(sampled.lengths[row] for row in rows),
        n_supervised=int(supervised.sum()),
        n_logits=int(supervised.any(dim=0).sum()),
        n_images=sum(sampled.show_image[row] for row in rows),
    )


def padding_share(batches: Sequence[Batch]) -> float:
    """1 - (tokens / positions): what of the computation is spent on padding."""
    positions = sum(batch.n_positions for batch in batches)
    return 1 - sum(batch.n_tokens for batch in batches) / positions


def grouped_order(sampled: Sampled, flags: TrainingArguments, world_size: int) -> list[int]:
    """The first epoch's order with --group_by_modality_length."""
    words = modality_lengths(sampled.records)
    if not flags.group_by_modality_length:
        words = [n or 1 for n in words]  # the sampler refuses 0, but it is not this run's
    sampler = EpochSampler(
        words,
        flags.per_device_train_batch_size,
        world_size,
        flags.data_seed or flags.seed,
        flags.gradient_accumulation_steps,
    )
    sampler.set_epoch(0)
    return list(sampler)


def random_order(sampled: Sampled, seed: int) -> list[int]:
    """Any shuffled order: the padding of one is that of another, up to chance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(sampled.samples), generator=generator).tolist()


def simulate(
    sampled: Sampled, loaded: Loaded, flags: TrainingArguments, world_size: int, packs_one_row: bool
) -> tuple[list[Batch], float, float]:
    """The batches of this run's flags, and the padding shares of both orders without packing."""
    plain = Collator(loaded.tokenizer.pad_id, image_size=None)
    size = flags.per_device_train_batch_size
    grouped = grouped_order(sampled, flags, world_size)
    shuffled = random_order(sampled, flags.seed)
    in_both = [make_batches(o, sampled, plain, size, world_size) for o in (grouped, shuffled)]
    shares = [padding_share(batches) for batches in in_both]
    order = grouped if flags.group_by_modality_length else shuffled
    if flags.train_sampling_strategy == "sequential":
        order = list(range(len(sampled.samples)))
    collate = plain
    if flags.packing:
        collate = PackingCollator(plain, None if packs_one_row else loaded.model_max_length)
    return make_batches(order, sampled, collate, size, world_size), *shares


def summarise(
    sampled: Sampled, n_records: int, batches: Sequence[Batch], grouped: float, shuffled: float
) -> Lengths:
    """The numbers that a plan shows of `sampled` and the batches made of it."""
    lengths = sampled.lengths
    mean = statistics.fmean(lengths)
    whole = len(lengths) == n_records
    spread = 0.0 if whole else statistics.stdev(lengths) / len(lengths) ** 0.5 / mean
    ordered = sorted(lengths)
    n_cut = sum(before > after for before, after in zip(sampled.uncut, lengths, strict=True))
    return Lengths(
        n_sampled=len(lengths),
        mean=mean,
        standard_error=spread,
        percentiles={f"p{p}": ordered[-(-p * len(ordered) // 100) - 1] for p in PERCENTILES},
        supervised_share=sum(sampled.supervised) / sum(lengths),
        truncated_share=n_cut / len(lengths),
        padding_share=padding_share(batches),
        padding_share_grouped=grouped,
        padding_share_random=shuffled,
    )
