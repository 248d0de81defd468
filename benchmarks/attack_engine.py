"""A permutation attack by the two engines: one prefix for all orders, or one generation an order.

    python benchmarks/attack_engine.py [--quick] [--gpu]

    naive    every order on its own: picture, whole prompt, `generate`, as the released evaluations
    shared   picture and stem once, all orders from there as one tree

One item of four options in its 24 orders, none skipped; stem and options as long as ScienceQA's are
on average (22 and 14 tokens), the instruction as long as LLaVA's (16), a picture of 576 positions,
answers of two tokens (a letter and the end). Both engines from a PIL picture and text to replies,
which must agree. Then one item of each number of options by the shared engine: the estimate for
ScienceQA's 2,017 questions with pictures, 27,586 orders, under one set of symbols.

Random LLaVA: CLIP of 12 layers x 512, Llama of 12 layers x 1024 (--quick: 6 x 512), float32, one
thread, process CPU time. Target: at least 10 times less. Five minutes on an idle core. --gpu: the
shape of LLaVA-1.5-7B in bfloat16 on a GPU, elapsed time; without one it says so and stops.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_llava import save_model, single_tokens
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.eval.engine import open_engine
from llava.eval.question import Ask, Question, Reply, orders
from llava.model import checkpoint
from llava.vlm import LlavaVlm

IMAGE_ID = 32000
N_STEM, N_INSTRUCTION = 22, 16  # tokens in Llama's vocabulary
N_NEW = 2
ITEMS = {2: 677, 3: 532, 4: 770, 5: 38}  # ScienceQA's test questions with pictures, by options
TARGET = 10
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))


def make_config(shape: str) -> LlavaConfig:
    """`shape` is "7B" or "LAYERSxWIDTH" of the language model."""
    layers, width = (32, 4096) if shape == "7B" else map(int, shape.split("x"))
    large = shape == "7B"
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=11008 if large else width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=32 if large else width // 64,
        vocab_size=IMAGE_ID + 64,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024 if large else 512,
        intermediate_size=4096 if large else 2048,
        num_hidden_layers=24 if large else 12,
        num_attention_heads=16 if large else 8,
        image_size=336,
        patch_size=14,
    )
    return LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_ID)


def make_vlm(shape: str, device: str, dtype: torch.dtype) -> LlavaVlm:
    """Random weights of that shape behind a small vocabulary and CLIP's preprocessing."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = checkpoint.load(save_model(Path(folder), 64, 1))
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlavaForConditionalGeneration(make_config(shape))
    torch.set_default_dtype(torch.float32)
    loaded = dataclasses.replace(loaded, model=model, image_token_id=IMAGE_ID)
    return LlavaVlm(loaded, "random", Path(folder))


def make_asks(n_options: int) -> list[Ask]:
    """All orders of one question under the letters."""
    draw, known = np.random.default_rng(n_options), single_tokens()

    def words(n: int) -> str:
        return " ".join(draw.choice(known, n))

    options = tuple(words(n) for n in (3, 4, 3, 4, 4)[:n_options])
    question = Question(words(N_STEM), options, words(N_INSTRUCTION))
    symbols = question.symbols[:n_options]
    return [Ask(question.render(order), symbols) for order in orders(n_options, "")]


def measure(vlm: LlavaVlm, name: str, n_options: int) -> tuple[float, int, list[Reply]]:
    """Seconds, positions that the language model processed, and replies."""
    clock = time.process_time if vlm.device.type == "cpu" else time.perf_counter
    session = open_engine(name, vlm, max_new_tokens=N_NEW).item([PICTURE], make_asks(n_options))
    started = clock()
    replies = session.reply(session.asks)
    return clock() - started, session.n_tokens, replies


def report(vlm: LlavaVlm) -> None:
    for name in ("shared", "naive"):  # libraries get their own buffers here
        measure(vlm, name, 2)
    found = {name: measure(vlm, name, 4) for name in ("naive", "shared")}
    print(f"{'engine':8}{'seconds':>9}{'positions':>11}   4 options, 24 orders")
    for name, (seconds, n_tokens, _) in found.items():
        print(f"{name:8}{seconds:9.2f}{n_tokens:11,}")
    naive, shared = found["naive"], found["shared"]
    n_same = sum(a.text == b.text for a, b in zip(naive[2], shared[2], strict=True))
    ratio = naive[0] / shared[0]
    verdict = "met" if ratio >= TARGET else "MISSED"
    print(
        f"{ratio:.1f} times less time, {naive[1] / shared[1]:.1f} times fewer positions; "
        f"{n_same} of 24 answers equal; target {TARGET} times: {verdict}"
    )
    each = {n: measure(vlm, "shared", n)[0] for n in ITEMS}
    total = sum(count * each[n] for n, count in ITEMS.items())
    n_orders = sum(count * math.factorial(n) for n, count in ITEMS.items())
    hours = total / 3600, naive[0] / 24 * n_orders / 3600
    print(f"{sum(ITEMS.values()):,} ScienceQA items, {n_orders:,} orders:", end=" ")
    print(f"shared {hours[0]:.2f} h, naive {hours[1]:.2f} h")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        print("no GPU: not measured")
    elif args.gpu:
        print(torch.cuda.get_device_name())
        report(make_vlm("7B", "cuda", torch.bfloat16))
    else:
        torch.set_num_threads(1)
        report(make_vlm("6x512" if args.quick else "12x1024", "cpu", torch.float32))


if __name__ == "__main__":
    main()
