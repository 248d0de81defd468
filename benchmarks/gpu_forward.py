"""Forward signals of a 7B-shaped LLaVA in bfloat16 on a GPU: samples and tokens a second.

    python benchmarks/gpu_forward.py [--batch-size 16] [--batches 20] [--peak TFLOPS]

Random weights in LLaVA-1.5-7B's shape (Llama 32 x 4096, CLIP-L/14 at 336 pixels), the length mix of
benchmarks/batching.py, 60 answer tokens a sample, images already on the host. The fraction of peak
counts the matrix products of real tokens (2 x parameters x tokens, plus attention and the vision
tower) against --peak, by default the device's measured bfloat16 rate on an 8192 x 8192 product.
Without a GPU it says so and stops.
"""

from __future__ import annotations

import argparse
import time

import torch
from batching import make_lengths
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.tokens import IGNORE_INDEX
from llava.vlm.base import Prepared, Vlm
from selection.signals.forward import Forward

N_IMAGE, IMAGE_ID, N_ANSWER = 576, 32000, 60


def make_model() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096),
        image_token_id=IMAGE_ID,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return model


def make_batch(length: int, batch_size: int) -> list[Prepared]:
    """`batch_size` samples of `length` tokens, with an image where it fits."""
    items = []
    for _ in range(batch_size):
        ids = torch.randint(3, 32000, (length,))
        extras = {}
        if length > N_IMAGE:
            ids[1 : 1 + N_IMAGE] = IMAGE_ID
            extras["pixel_values"] = torch.randn(1, 3, 336, 336)
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[-min(N_ANSWER, length // 2) :] = ids[-min(N_ANSWER, length // 2) :]
        items.append(Prepared(ids, labels, extras))
    return items


def flops(item: Prepared, model: LlavaForConditionalGeneration) -> float:
    """Floating-point operations of one sample's matrix products, padding not counted."""
    length, text = len(item.input_ids), model.config.text_config
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    attention = 2 * text.num_hidden_layers * text.hidden_size * length**2  # causal half
    vision = sum(p.numel() for p in model.model.vision_tower.parameters())
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    images = 2 * (vision + projector) * (N_IMAGE + 1) if item.extras else 0
    return 2 * layers * length + attention + images


def measured_peak() -> float:
    """bfloat16 operations a second of a large square product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--peak", type=float, help="peak of the device, TFLOP/s")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: not measured")
        return
    peak = arguments.peak * 1e12 if arguments.peak else measured_peak()
    model = make_model()
    proxy = Vlm(model, "random", 0, 4096)
    lengths = sorted(make_lengths(arguments.batches).tolist(), reverse=True)
    batches = [make_batch(length, arguments.batch_size) for length in lengths]
    with torch.inference_mode():
        Forward().compute(proxy, batches[0])
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for batch in batches:
            Forward().compute(proxy, batch)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    items = [item for batch in batches for item in batch]
    tokens = sum(len(item.input_ids) for item in items)
    work = sum(flops(item, model) for item in items) / seconds
    print(
        f"{torch.cuda.get_device_name()}: {len(items) / seconds:.1f} samples/s, "
        f"{tokens / seconds:.0f} tokens/s, {work / 1e12:.0f} TFLOP/s = {work / peak:.2f} of "
        f"{peak / 1e12:.0f}, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    )


if __name__ == "__main__":
    main()
