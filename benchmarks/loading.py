"""Loading training samples: its parts, whole loaders, and the share of a training step.

    python benchmarks/loading.py [--samples 256] [--repeats 3]

JPEGs of 640 x 480 from the page cache, padded to a square and resized to 336 pixels, with text of
LLaVA-1.5's lengths. Parts are CPU milliseconds a sample on one thread, the smallest of the repeats;
beside resizing and normalising stands transformers' own processor, which gives the same bits.
Loaders are PyTorch's, batches of 16, with 0, 1 and 2 worker processes: samples a second of wall
time, the best of the repeats. A step: LLaVA-1.5-7B's fine-tuning takes 10 hours on 8 A100, says its
README, so each GPU takes 2.3 samples a second, which 4 workers have to bring. One minute.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from PIL import Image
from small_llava import MAX_LENGTH, make_mixture, save_model, save_samples
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from llava.conversation import get_template
from llava.data import Collator, ConversationDataset, InputFormat
from llava.images import ImageProcessor, open_image, pad_to_square
from llava.records import load_records
from llava.tokens import load_tokenizer

SAMPLES_A_SECOND = 665_298 / 36_000 / 8  # that a GPU trains on
BATCH = 16
GREY = (122, 116, 104)


def make_dataset(world: Path, n: int) -> ConversationDataset:
    data, images = save_samples(world, make_mixture(n))
    tokenizer = load_tokenizer(world / "lm")
    input_format = InputFormat(
        template=get_template("v1"),
        tokenizer=tokenizer,
        image_processor=ImageProcessor(336, aspect_ratio="pad"),
        image_token_id=tokenizer.vocab_size,
        n_image_tokens=576,
        model_max_length=MAX_LENGTH,
    )
    return ConversationDataset(load_records(data), images, input_format)


def time_parts(dataset: ConversationDataset, repeats: int) -> dict[str, float]:
    """CPU milliseconds a sample of each part, on the samples with an image."""
    records = [record for record in dataset.records if record.has_image][:64]
    paths = [dataset.image_folder / record.image for record in records]
    pictures = [open_image(dataset.image_folder, record.image) for record in records]
    squares = [pad_to_square(picture, GREY) for picture in pictures]
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    fill = dataset.input_format.image_processor
    items = [dataset[row] for row in range(BATCH)]
    collate = Collator(0, 336)

    def each(call: Callable[[object], object], things: list) -> Callable[[], None]:
        return lambda: [call(thing) for thing in things] and None

    def decode(path: Path) -> None:
        with Image.open(path) as image:
            image.load()

    def tokenise(record: object) -> None:
        dataset.input_format.encode(record.turns, True)

    calls = {
        "JPEG decoding by Pillow alone": each(decode, paths),
        "open_image: checks, decoding, RGB": each(
            lambda record: open_image(dataset.image_folder, record.image), records
        ),
        "padding": each(lambda picture: pad_to_square(picture, GREY), pictures),
        "resizing by Pillow alone": each(lambda square: square.resize((336, 336), 3), squares),
        "resizing and normalising": each(fill, squares),
        "the same by transformers": each(lambda x: theirs(x, return_tensors="pt"), squares),
        "tokenising": each(tokenise, records),
        "whole item": each(dataset.__getitem__, list(range(64))),
    }
    found = {name: smallest(call, repeats) / 64 * 1e3 for name, call in calls.items()}
    found["collating"] = smallest(lambda: collate(items), repeats) / BATCH * 1e3
    return found


def smallest(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds of one call, after one that is not counted."""
    call()
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
    return best


def samples_a_second(dataset: ConversationDataset, n_workers: int, repeats: int) -> float:
    """Of a whole pass, the start of the workers not counted."""
    best = 0.0
    for _ in range(repeats):
        loader = iter(
            DataLoader(dataset, BATCH, num_workers=n_workers, collate_fn=Collator(0, 336))
        )
        next(loader)
        started = time.perf_counter()
        n = sum(len(batch["input_ids"]) for batch in loader)
        best = max(best, n / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), 64, 1)
        dataset = make_dataset(Path(folder), arguments.samples)
        found = time_parts(dataset, arguments.repeats)
        for name, milliseconds in found.items():
            print(f"{name:34} {milliseconds:6.2f} CPU ms a sample")
        for n_workers in (0, 1, 2):
            rate = samples_a_second(dataset, n_workers, arguments.repeats)
            print(f"{n_workers} workers: {rate:5.0f} samples/s")
    cpu = (found["whole item"] + found["collating"]) / 1e3
    print(
        f"one worker alone: {1 / cpu:.0f} samples per CPU second; LLaVA-1.5-7B on an A100 takes "
        f"{SAMPLES_A_SECOND:.1f} samples/s: {SAMPLES_A_SECOND * cpu:.1%} of one core, "
        f"{SAMPLES_A_SECOND * cpu / 4:.1%} of a step with 4 workers"
    )


if __name__ == "__main__":
    main()
