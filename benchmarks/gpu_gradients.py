"""Projected LoRA gradients of a 7B-shaped LLaVA in bfloat16 on a GPU: samples a second.

    python benchmarks/gpu_gradients.py [--batch-size 4] [--batches 12] [--peak TFLOPS]

The model, the mix of lengths and the peak of benchmarks/gpu_forward.py; LoRA r=128 on all linear
maps of the language model (320 million numbers), projected to 5120. Beside it the forward and
backward alone, through the same weights with the LoRA merged. The fraction of peak counts the
matrix products of real tokens: the language model's twice, because frozen weights have no gradient,
and the LoRA's four thin ones. The overhead aimed at is 5 %. Without a GPU it says so and stops.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from batching import make_lengths
from gpu_forward import flops, make_batch, make_model, measured_peak
from gradients import DIM, Adapted
from transformers import LlavaForConditionalGeneration

from llava.model.lora import LowRank
from llava.vlm.base import Prepared
from selection.signals.gradients.backward import fresh_adapter, sample_gradients
from selection.signals.gradients.gradients import Gradients

RANK = 128


def make_proxy(model: LlavaForConditionalGeneration) -> Adapted:
    """The proxy with an adapter both of whose halves have gradients."""
    proxy = Adapted(model, "random", 0, 4096)
    proxy.adapter = fresh_adapter(proxy, RANK, 0)
    for name, (down, _) in proxy.adapter.items():
        up = down.new_empty(proxy.decoder.get_submodule(name).out_features, RANK)
        proxy.adapter[name] = LowRank(down, up.normal_(std=1 / RANK))
    return proxy


def seconds(work: Callable[[list[Prepared]], object], batches: list[list[Prepared]]) -> float:
    """Of all batches, after one to warm up."""
    work(batches[0])
    torch.cuda.synchronize()
    started = time.perf_counter()
    for batch in batches:
        work(batch)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--peak", type=float, help="peak of the device, TFLOP/s")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: not measured")
        return
    peak = arguments.peak * 1e12 if arguments.peak else measured_peak()
    proxy = make_proxy(make_model())
    lengths = sorted(make_lengths(arguments.batches).tolist(), reverse=True)
    batches = [make_batch(length, arguments.batch_size) for length in lengths]
    first = dict(list(proxy.adapter.items())[:1])  # backward stops at the layer it begins with

    def plain(batch: list[Prepared]) -> None:
        sample_gradients(proxy, proxy.collate(batch), first, lambda name, found: None)

    def ours(batch: list[Prepared]) -> None:
        Gradients(dim=DIM).compute(proxy, batch)

    floor = seconds(plain, batches)
    torch.cuda.reset_peak_memory_stats()
    took = seconds(ours, batches)
    items = [item for batch in batches for item in batch]
    tokens = sum(len(item.input_ids) for item in items)
    thin = 4 * sum(down.numel() + up.numel() for down, up in proxy.adapter.values()) * tokens
    text = sum(2 * flops(item, proxy.model) - vision_flops(item, proxy.model) for item in items)
    work = (text + thin) / took
    print(
        f"{torch.cuda.get_device_name()}: {len(items) / took:.1f} samples/s, "
        f"{tokens / took:.0f} tokens/s, {work / 1e12:.0f} TFLOP/s = {work / peak:.2f} of "
        f"{peak / 1e12:.0f}, {took / floor - 1:.1%} over forward and backward, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    )


def vision_flops(item: Prepared, model: LlavaForConditionalGeneration) -> float:
    """The part of `flops` that has no backward."""
    without = Prepared(item.input_ids, item.labels)
    return flops(item, model) - flops(without, model)


if __name__ == "__main__":
    main()
