"""Packing of a micro-batch's samples into fewer rows, against a row for each.

    python benchmarks/packing.py [--samples 96] [--batch-size 16] [--repeats 2]

Loss and gradients of a random Llama on samples of LLaVA-1.5's lengths (ids in place of images), in
the order of modality-length grouping. On a CPU: 2 layers x 256, float32, one thread, PyTorch's
attention; process CPU seconds. On a GPU: 8 layers of LLaVA-1.5-7B's width, bfloat16, and a third
variant, all samples in a single row for flash attention where flash_attn is installed; wall
seconds. The variants take turns, the smallest of the repeats. One minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from small_llava import MAX_LENGTH, N_IMAGE, Mixture, make_mixture
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from llava.data import Collator, ModalityLengthSampler, ModelInput, cut
from llava.packing import PackingCollator
from llava.tokens import IGNORE_INDEX
from llava.train.trainer import token_losses

VOCABULARY = 1000


def make_model(on_gpu: bool) -> LlamaForCausalLM:
    width, n_layers = (4096, 8) if on_gpu else (256, 2)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=n_layers,
        num_attention_heads=width // 128 if on_gpu else 4,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    return model.to("cuda", torch.bfloat16) if on_gpu else model


def make_items(mixture: Mixture) -> list[ModelInput]:
    """Random ids; the second half of the text is the answer."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for tokens, has_image in zip(mixture.tokens.tolist(), mixture.has_image, strict=True):
        ids = torch.randint(VOCABULARY, (tokens,), generator=generator)
        text = tokens - N_IMAGE * int(has_image)
        labels = ids.clone()
        labels[: tokens - text // 2] = IGNORE_INDEX
        items.append({"input_ids": ids, "labels": labels, "pixel_values": None})
    return items


def make_batches(
    items: list[ModelInput], mixture: Mixture, size: int, collate: Callable
) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    order = list(ModalityLengthSampler(mixture.words, size, 1, generator))
    return [collate([items[row] for row in rows]) for rows in cut(order, size)]


def run(model: LlamaForCausalLM, batches: list[dict]) -> float:
    """Loss and gradients of every batch; the sum of the losses."""
    total = torch.zeros((), device=model.device)
    for batch in batches:
        model.zero_grad()
        moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
        loss = token_losses(model, moved)[0].sum()
        loss.backward()
        total += loss.detach()
    return total.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    mixture = make_mixture(arguments.samples)
    items, model = make_items(mixture), make_model(on_gpu)
    plain = Collator(0, None)
    packed = PackingCollator(plain, MAX_LENGTH)
    variants = {"a row each": ("sdpa", plain), "packed": ("sdpa", packed)}
    if on_gpu and is_flash_attn_2_available():
        variants["a row each, flash"] = ("flash_attention_2", plain)
        variants["packed, flash"] = ("flash_attention_2", PackingCollator(plain, None))
    batches = {
        name: make_batches(items, mixture, arguments.batch_size, collate)
        for name, (_, collate) in variants.items()
    }
    best, losses = dict.fromkeys(variants, float("inf")), {}
    for _ in range(arguments.repeats):
        for name, (attention, _) in variants.items():
            model.set_attn_implementation(attention)
            started = clock()
            losses[name] = run(model, batches[name])
            best[name] = min(best[name], clock() - started)
    n_tokens = int(mixture.tokens.sum())
    for name, seconds in best.items():
        n_positions = sum(batch["input_ids"].numel() for batch in batches[name])
        n_rows = sum(len(batch["input_ids"]) for batch in batches[name])
        print(
            f"{name:18} {n_rows:5} rows, padding {1 - n_tokens / n_positions:4.0%}   "
            f"{seconds:7.2f} s   {n_tokens / seconds:9.0f} tokens/s   loss {losses[name]:.1f}"
        )
    for ours, theirs in (("packed", "a row each"), ("packed, flash", "a row each, flash")):
        if ours in best:
            print(f"{theirs} / {ours}: time {best[theirs] / best[ours]:.2f}")


if __name__ == "__main__":
    main()
