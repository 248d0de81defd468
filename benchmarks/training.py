"""Our training loop beside a plain Hugging Face Trainer, and with modality-length grouping.

    python benchmarks/training.py [--plain 32] [--grouped 256] [--repeats 2] [--layers 2]

plain     transformers.Trainer with LlavaForConditionalGeneration's own loss and a collator that
          pads, on the samples, pixels, order, optimizer and weights of ours
ours      `llava.train`, by its command-line flags
grouped   the same with --group_by_modality_length True

First, from lengths alone, what padding costs at several settings: positions that devices compute or
wait for (each runs a batch as long as its longest sample, and all wait for the longest of these),
as a multiple of the tokens. Then times: random Llama (layers x 256), 576 image tokens, full
fine-tuning in float32 on one thread; process CPU seconds of `Trainer.train`, reading JPEGs and all.
Beside plain: batches of 8, the variants in turn, the smallest of the repeats. Grouping: batches of
16, two accumulated, once. Targets: ours / plain at most 1, random / grouped at least 1.2. Four
minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from small_llava import MAX_LENGTH, Mixture, make_mixture, save_model, save_samples
from torch.nn.utils.rnn import pad_sequence

from llava.data import ModalityLengthSampler, cut
from llava.model.checkpoint import load
from llava.packing import fill_rows
from llava.tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.train.__main__ import make_dataset, train
from llava.train.arguments import parse

BATCH = 8
SETTINGS = ((16, 8, 1), (16, 4, 2), (16, 1, 8), (8, 1, 2))  # rows, devices, accumulated batches


# ---- what padding costs, from lengths --------------------------------------------------------


def waited(order: Sequence[int], tokens: Sequence[int], size: int, n_devices: int) -> int:
    """Positions that devices run or wait for."""
    batches = [max(tokens[row] for row in rows) * len(rows) for rows in cut(order, size)]
    return sum(max(together) for together in cut(batches, n_devices)) * n_devices


def waited_packed(order: Sequence[int], tokens: Sequence[int], size: int, n_devices: int) -> int:
    batches = []
    for rows in cut(order, size):
        lengths = [tokens[row] for row in rows]
        packed = fill_rows(lengths, MAX_LENGTH)
        batches.append(len(packed) * max(sum(lengths[i] for i in row) for row in packed))
    return sum(max(together) for together in cut(batches, n_devices)) * n_devices


def print_padding(mixture: Mixture) -> None:
    tokens, words = mixture.tokens.tolist(), mixture.words
    print("positions / tokens   random   LLaVA's grouping   ours   grouped and packed")
    for size, n_devices, accumulation in SETTINGS:
        random = torch.randperm(len(tokens), generator=_seeded()).tolist()
        # LLaVA takes accumulated batches for devices.
        theirs = list(ModalityLengthSampler(words, size, n_devices * accumulation, _seeded()))
        ours = list(ModalityLengthSampler(words, size, n_devices, _seeded(), accumulation))
        found = [waited(o, tokens, size, n_devices) for o in (random, theirs, ours)]
        found.append(waited_packed(ours, tokens, size, n_devices))
        shares = [positions / sum(tokens) for positions in found]
        print(
            f"{size:3} x {n_devices} x {accumulation}           "
            f"{shares[0]:6.2f}   {shares[1]:16.2f}   {shares[2]:4.2f}   {shares[3]:18.2f}"
        )


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- times -----------------------------------------------------------------------------------


@contextlib.contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """CPU and wall seconds of every `Trainer.train` inside; silent."""
    inner, spent = transformers.Trainer.train, {"cpu": 0.0, "wall": 0.0}

    def timed(self: transformers.Trainer, *args: object, **kwargs: object) -> object:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            return inner(self, *args, **kwargs)
        finally:
            spent["cpu"] += time.process_time() - cpu
            spent["wall"] += time.perf_counter() - wall

    transformers.Trainer.train = timed
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield spent
    finally:
        transformers.Trainer.train = inner


def flags(world: Path, data: Path, output: Path, **changes: object) -> list[str]:
    values = {
        "model_name_or_path": world / "llava",
        "version": "v1",
        "data_path": data,
        "image_folder": world / "images",
        "image_aspect_ratio": "pad",
        "model_max_length": MAX_LENGTH,
        "output_dir": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **changes,
    }
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def losses(log_history: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in log_history if "loss" in line]


def train_ours(world: Path, data: Path, **changes: object) -> list[float]:
    with tempfile.TemporaryDirectory() as output:
        train(parse(flags(world, data, Path(output), **changes)))
        state = json.loads((Path(output) / "trainer_state.json").read_text())
        return losses(state["log_history"])


def train_plain(world: Path, data: Path) -> list[float]:
    """What somebody writes who has only transformers; samples and pixels are given to it."""
    with tempfile.TemporaryDirectory() as output:
        arguments = parse(flags(world, data, Path(output)))
        loaded = load(world / "llava")
        model = transformers.LlavaForConditionalGeneration.from_pretrained(world / "llava")
        model.model.vision_tower.requires_grad_(False)
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=output,
                num_train_epochs=1,
                per_device_train_batch_size=BATCH,
                learning_rate=2e-5,
                lr_scheduler_type="cosine",
                optim="adamw_torch",
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                remove_unused_columns=False,
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=make_dataset(arguments, loaded),
            data_collator=lambda items: collate_plainly(items, model.config.image_token_id),
        )
        trainer.train()
        return losses(trainer.state.log_history)


def collate_plainly(items: list[dict], image_token_id: int) -> dict[str, torch.Tensor]:
    ids, labels = [], []
    for item in items:
        repeats = torch.where(item["input_ids"] == IMAGE_TOKEN_INDEX, 576, 1)
        spread = item["input_ids"].repeat_interleave(repeats)[:MAX_LENGTH]
        ids.append(spread.masked_fill(spread == IMAGE_TOKEN_INDEX, image_token_id))
        labels.append(item["labels"].repeat_interleave(repeats)[:MAX_LENGTH])
    mask = [torch.ones_like(row) for row in ids]
    images = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence(mask, batch_first=True),
        **({"pixel_values": torch.stack(images)} if images else {}),
    }


def compare(variants: dict[str, Callable[[], list[float]]], repeats: int) -> dict[str, dict]:
    """Smallest times of each variant, which take turns, and its losses."""
    best = {name: {"cpu": float("inf"), "wall": float("inf")} for name in variants}
    for repeat in range(repeats):
        names = list(variants)[:: -1 if repeat % 2 else 1]
        for name in names:
            with stopwatch() as spent:
                best[name]["losses"] = variants[name]()
            for clock in spent:
                best[name][clock] = min(best[name][clock], spent[clock])
    return best


def report(found: dict[str, dict], n_tokens: int) -> None:
    for name, result in found.items():
        print(
            f"  {name:8} {result['cpu']:7.1f} CPU s   {result['wall']:7.1f} s   "
            f"{n_tokens / result['cpu']:7.0f} tokens / CPU s"
        )


def compare_with_plain(world: Path, n: int, repeats: int) -> None:
    mixture = make_mixture(n, seed=1)
    data, _ = save_samples(world, mixture)
    found = compare(
        {"plain": lambda: train_plain(world, data), "ours": lambda: train_ours(world, data)},
        repeats,
    )
    apart = max(abs(a - b) for a, b in zip(*(v["losses"] for v in found.values()), strict=True))
    print(f"{n} samples in random order, batch {BATCH}; losses differ by at most {apart:.1e}")
    report(found, int(mixture.tokens.sum()))
    print(f"  ours / plain: time {found['ours']['cpu'] / found['plain']['cpu']:.2f}", flush=True)


def compare_grouping(world: Path, n: int) -> None:
    mixture = make_mixture(n, seed=2)
    data, _ = save_samples(world, mixture)
    both = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    found = compare(
        {
            "random": lambda: train_ours(world, data, **both),
            "grouped": lambda: train_ours(world, data, group_by_modality_length=True, **both),
        },
        repeats=1,
    )
    print(f"{n} samples, batch 16, two accumulated")
    report(found, int(mixture.tokens.sum()))
    print(f"  random / grouped: time {found['random']['cpu'] / found['grouped']['cpu']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", type=int, default=32, help="samples beside plain, 0: leave out")
    parser.add_argument("--grouped", type=int, default=256, help="samples for grouping, likewise")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    print_padding(make_mixture(8192))
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        save_model(world, 256, arguments.layers)
        if arguments.plain:
            compare_with_plain(world, arguments.plain, arguments.repeats)
        if arguments.grouped:
            compare_grouping(world, arguments.grouped)


if __name__ == "__main__":
    main()
