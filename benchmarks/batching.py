"""Length-bucketed batches against batches in file order, on LLaVA-1.5's mix of lengths.

    python benchmarks/batching.py [--samples 4096] [--timed 48] [--repeats 2]

Lengths: text log-normal, median 110 tokens, sigma 0.85, within 30..900, plus 577 for the image;
6 % of the samples are text-only and have no image. First the share of tokens that are not padding,
counted exactly (target: at least 0.95 bucketed); then the time of both orders through a small
random Llama (4 layers x 512, float32, one thread; process CPU time, smallest of the repeats, the
two in turn). File order pads to the longest sample of a batch and needs a mask, as a collator does.
One minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from llava.vlm.base import Prepared, Vlm
from selection.extract.loop import buckets
from selection.store.store import DEFAULT_BLOCK_SIZE

VOCABULARY = 1000
TIMED_BATCH_SIZE = 8


def make_lengths(n: int) -> np.ndarray:
    """(n,) tokens per sample, seeded."""
    rng = np.random.default_rng(0)
    text = np.clip(rng.lognormal(np.log(110), 0.85, n), 30, 900).astype(int)
    return text + np.where(rng.random(n) < 0.06, 1, 577)


def make_samples(lengths: Sequence[int]) -> dict[int, Prepared]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]
    return {i: Prepared(x, x) for i, x in enumerate(ids)}


def bucketed(samples: dict[int, Prepared], batch_size: int) -> list[list[int]]:
    """Batches as `selection.extract.loop` makes them, block by block."""
    batches = []
    for start in range(0, len(samples), DEFAULT_BLOCK_SIZE):
        block = {i: x for i, x in samples.items() if start <= i < start + DEFAULT_BLOCK_SIZE}
        for group in buckets(block):
            batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return batches


def in_file_order(samples: dict[int, Prepared], batch_size: int) -> list[list[int]]:
    rows = list(samples)
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def print_shares(samples: dict[int, Prepared]) -> None:
    real = sum(len(sample.input_ids) for sample in samples.values())
    print("batch size   file order   bucketed   batches (file order, bucketed)")
    for batch_size in (4, 8, 16, 32):
        plain, ours = (make(samples, batch_size) for make in (in_file_order, bucketed))
        longest = [max(len(samples[i].input_ids) for i in batch) * len(batch) for batch in plain]
        padded = [samples[batch[0]].n_tokens * len(batch) for batch in ours]
        print(
            f"{batch_size:10}   {real / sum(longest):10.3f}   {real / sum(padded):8.3f}   "
            f"{len(plain)}, {len(ours)}"
        )


def time_both(samples: dict[int, Prepared], batch_size: int, repeats: int) -> tuple[float, float]:
    """CPU seconds of all samples in file order and bucketed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
    )
    model = LlamaForCausalLM(config)
    proxy = Vlm(model, "random", 0, 2048)

    def plain() -> None:
        for batch in in_file_order(samples, batch_size):
            rows = [samples[i].input_ids for i in batch]
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            ids = pad_sequence(rows, batch_first=True)
            model.model(ids, attention_mask=mask, use_cache=False)

    def ours() -> None:
        for batch in bucketed(samples, batch_size):
            proxy.forward(proxy.collate([samples[i] for i in batch]))

    best = {plain: float("inf"), ours: float("inf")}
    with torch.inference_mode():
        for _ in range(repeats):
            for run in best:
                started = time.process_time()
                run()
                best[run] = min(best[run], time.process_time() - started)
    return best[plain], best[ours]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4096, help="for the shares")
    parser.add_argument("--timed", type=int, default=48, help="for the times")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    lengths = make_lengths(arguments.samples)
    print_shares(make_samples(lengths))
    samples = make_samples(lengths[: arguments.timed])
    plain, ours = time_both(samples, TIMED_BATCH_SIZE, arguments.repeats)
    print(
        f"batch size {TIMED_BATCH_SIZE}, {arguments.timed} samples: file order {plain:.1f} s, "
        f"bucketed {ours:.1f} s, ratio {plain / ours:.2f}"
    )


if __name__ == "__main__":
    main()
