"""Versions of one conversation scored together against one full forward each.

    python benchmarks/shared_prefix.py [--quick] [--repeats 3]

    apart      a full forward of each version, image included, logits of the answer tokens only
    together   llava.vlm.versions: image and common prefix once, all ends in one batch

    pair       a sample and its perturbed copy, 150 text tokens, the last 40 differ
    orders     a sample and 24 orders of its options, 150 text tokens, the last 60 differ

Random LLaVA: CLIP of 12 layers x 512 with 576 image tokens, Llama of 12 layers x 1024 (--quick:
6 x 512), float32, one thread. Process CPU time, the smallest of the repeats (`orders` apart is run
once). Target: pair at least 1.5 times faster. Three minutes on an idle core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.tokens import IGNORE_INDEX
from llava.vlm.base import Prepared
from llava.vlm.versions import run_together, score

VOCABULARY, IMAGE_ID, N_IMAGE = 32000, 32000, 576
N_TEXT, N_ANSWER = 150, 2
CASES = {"pair": (2, 40), "orders": (25, 60)}  # versions, tokens that differ
TARGET = 1.5


def make_model(quick: bool) -> LlavaForConditionalGeneration:
    width, layers = (512, 6) if quick else (1024, 12)
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=VOCABULARY + 64,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_ID)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def make_versions(n_versions: int, n_different: int) -> list[Prepared]:
    generator = torch.Generator().manual_seed(n_versions)

    def words(n: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (n,), generator=generator)

    image = torch.full((N_IMAGE,), IMAGE_ID)
    common = torch.cat([words(35), image, words(N_TEXT - 35 - n_different)])
    versions = []
    for _ in range(n_versions):
        ids = torch.cat([common, words(n_different)])
        labels = ids.clone()
        labels[:-N_ANSWER] = IGNORE_INDEX
        versions.append(Prepared(ids, labels))
    return versions


def apart(model: LlavaForConditionalGeneration, versions: list[Prepared], pixels: torch.Tensor):
    """Mean answer loss of each version, (B,) float64, from full forwards one at a time."""
    losses = []
    for version in versions:
        out = model.model(version.input_ids[None], pixels, use_cache=False)
        logits = model.lm_head(out.last_hidden_state[0, -N_ANSWER - 1 : -1]).double()
        losses.append(torch.nn.functional.cross_entropy(logits, version.labels[-N_ANSWER:]))
    return torch.stack(losses)


def together(model: LlavaForConditionalGeneration, versions: list[Prepared], pixels: torch.Tensor):
    """The same from the shared prefix."""
    run = run_together(model, versions, {"pixel_values": pixels})
    return score(run, model.lm_head).nll_mean


def seconds(work: Callable[[], torch.Tensor], repeats: int) -> tuple[float, torch.Tensor]:
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        result = work()
        times.append(time.process_time() - begun)
    return min(times), result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(args.quick)
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    print(f"{'case':8}{'versions':>9}{'apart s':>9}{'together s':>12}{'ratio':>7}{'loss diff':>11}")
    ratios = {}
    with torch.inference_mode():
        together(model, make_versions(2, 40), pixels)  # libraries get their own buffers here
        for name, (n_versions, n_different) in CASES.items():
            versions = make_versions(n_versions, n_different)
            slow, expected = seconds(
                lambda v=versions: apart(model, v, pixels), args.repeats if name == "pair" else 1
            )
            fast, found = seconds(lambda v=versions: together(model, v, pixels), args.repeats)
            ratios[name] = slow / fast
            difference = (found - expected).abs().max()
            print(
                f"{name:8}{n_versions:9}{slow:9.2f}{fast:12.2f}{ratios[name]:7.2f}{difference:11.1e}"
            )
    verdict = "met" if ratios["pair"] >= TARGET else "MISSED"
    print(f"target: pair at least {TARGET} times faster: {verdict}")


if __name__ == "__main__":
    main()
