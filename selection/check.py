"""`python -m selection check`: every defect of a pool before a GPU is used (promise P4).

It reads records, images and labels with the very functions that runs use.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import json

from tqdm import tqdm

from llava import files
from llava.conversation import get_template
from llava.errors import DataError, UsageError, UserError, at_least
from llava.lazy import Lazy
from selection.pool.pool import Pool

# Not imported for annotations either: to read the flags, jsonargparse imports those as well.
data, images, tokens = Lazy("llava.data"), Lazy("llava.images"), Lazy("llava.tokens")

MAX_IN_FLIGHT = 4096  # records queued to the threads at a time: bounds memory for any pool size


@dataclasses.dataclass(frozen=True)
class CheckSettings:
    """What to check."""

    tokenizer: str | None = None
    """directory with the proxy's tokenizer: to find samples with nothing supervised"""
    template: str = "v1"
    """conversation template for that"""
    model_max_length: int = 2048
    """context length for that; a sample with nothing supervised before it is a defect"""
    image_tokens: int = 576
    """tokens an image takes, for that"""
    decode: bool = False
    """decode every image instead of reading its header: finds truncated files, much slower"""
    report: str | None = None
    """write the defects to this file, one JSON object a line"""
    workers: int = 16
    """threads"""

    def __post_init__(self) -> None:
        get_template(self.template)
        at_least(1, self, "workers", "image_tokens", "model_max_length")


@dataclasses.dataclass(frozen=True)
class Defect:
    """One unusable sample."""

    row: int
    uid: str
    id: object
    kind: str
    """record, image or labels"""
    reason: str


def check_pool(
    pool: Pool, settings: CheckSettings, tokenizer: tokens.Tokenizer | None
) -> list[Defect]:
    """All defects of `pool`, by row. Without `pool.images` a record with an image is a defect."""
    input_format = None
    if tokenizer is not None:
        # The image token's id does not matter here: only which positions are left, and supervised.
        input_format = data.InputFormat(
            template=get_template(settings.template),
            tokenizer=tokenizer,
            image_processor=None,
            image_token_id=0,
            n_image_tokens=settings.image_tokens,
            model_max_length=settings.model_max_length,
        )
    check = functools.partial(_check_row, pool, settings.decode, input_format)
    defects = []
    with (
        concurrent.futures.ThreadPoolExecutor(settings.workers) as threads,
        tqdm(total=len(pool), desc="check", unit=" samples", disable=None) as bar,
    ):
        for start in range(0, len(pool), MAX_IN_FLIGHT):
            rows = range(len(pool))[start : start + MAX_IN_FLIGHT]
            defects += [defect for defect in threads.map(check, rows) if defect]
            bar.update(len(rows))
    return defects


def write_report(path: str, defects: list[Defect]) -> None:
    """The defects as JSON lines."""
    lines = [json.dumps(dataclasses.asdict(defect), ensure_ascii=False) for defect in defects]
    files.atomic_write(path, "".join(line + "\n" for line in lines).encode())


def print_defects(pool: Pool, defects: list[Defect], most: int = 20) -> None:
    """A count by kind, and the first defects one a line."""
    for defect in defects[:most]:
        print(f"{pool.path.name} row {defect.row} (id {defect.id!r}): {defect.reason}")
    if len(defects) > most:
        print(f"... and {len(defects) - most} more; --report FILE lists them all")
    kinds = collections.Counter(defect.kind for defect in defects)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    print(
        f"{len(pool)} samples, {int(pool.has_image.sum())} with an image, "
        f"{pool.duplicate_ids} repeated ids (allowed); defects: {counts}"
    )


def _check_row(
    pool: Pool, decode: bool, input_format: data.InputFormat | None, row: int
) -> Defect | None:
    """What is wrong with a row, or None: its record, else its image, else its labels."""
    if row in pool.bad:
        return Defect(row, pool.uid(row), pool.id(row), "record", pool.bad[row])
    record = pool.record(row)
    try:
        kind = "image"
        if record.image is not None:
            if pool.images is None:
                raise UsageError("has an image, and no --images folder is given")
            look = images.open_image if decode else images.check_image
            look(pool.images, record.image, extra_roots=pool.image_roots)
        kind = "labels"
        if input_format is not None:
            labels = input_format.encode(record.turns, record.has_image).labels
            if not (labels != tokens.IGNORE_INDEX).any():
                limit = input_format.model_max_length
                raise DataError(f"no supervised token within {limit} positions")
    except UserError as error:
        return Defect(row, pool.uid(row), record.id, kind, str(error))
    return None
