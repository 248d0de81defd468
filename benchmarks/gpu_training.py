"""Training steps of a 7B-shaped LLaVA in bfloat16 on a GPU: tokens a second, memory, share of peak.

    python benchmarks/gpu_training.py [--mode lora] [--batch-size 16] [--steps 8] [--packing]
                                      [--attention sdpa] [--peak TFLOPS] [--tiny]

Random weights in LLaVA-1.5-7B's shape (Llama 32 x 4096, CLIP-L/14 at 336 pixels), samples of
LLaVA-1.5's lengths in the order of modality-length grouping, images already on the host, gradient
checkpointing, AdamW, the loss of `llava.train`. lora: adapters of rank 128 on the language model,
and the projector. full: language model and projector, weights and AdamW's two moments in bfloat16,
which is 56 GB (with float32 copies it takes more GPUs; those runs share it out with ZeRO).

Work is counted for real tokens, padding is not: of the language model's layers and output, forward
2 x parameters x tokens and attention, backward twice that for full, once for lora (no gradient of
frozen weights); the tower's forward. Recomputation of checkpointing is not counted, so that the
share of peak is a model's, not the hardware's. Peak: --peak, or the device's measured rate on an
8192 x 8192 product. Without a GPU it says so and stops; --tiny runs the same code small on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import time

import torch
from small_llava import MAX_LENGTH, N_IMAGE, Mixture, make_mixture
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.data import Collator, ModalityLengthSampler, ModelInput, cut, expand_image
from llava.model import lora
from llava.packing import PackingCollator
from llava.tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded
from llava.train.trainer import seen_beside, token_losses

IMAGE_ID = 32000
SHAPES = {  # language model: width, inner width, layers, heads; tower: likewise
    "7B": ((4096, 11008, 32, 32), (1024, 4096, 24, 16)),
    "tiny": ((64, 128, 2, 2), (32, 64, 2, 2)),
}


def make_model(
    shape: str, mode: str, attention: str, device: torch.device
) -> tuple[torch.nn.Module, LlavaForConditionalGeneration]:
    """What is trained (wrapped for lora) and the LLaVA inside."""
    (width, inner, layers, heads), (v_width, v_inner, v_layers, v_heads) = SHAPES[shape]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=v_width,
            intermediate_size=v_inner,
            num_hidden_layers=v_layers,
            num_attention_heads=v_heads,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=4096,
        ),
        image_token_id=IMAGE_ID,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    trained = model
    if mode == "lora":
        trained = lora.attach(model, rank=128, alpha=256, dropout=0.05, bias="none").to(
            torch.bfloat16
        )
        model.model.multi_modal_projector.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return trained.train(), model


def make_items(mixture: Mixture) -> list[ModelInput]:
    """Random ids and pixels; the second half of the text is the answer."""
    items = []
    for tokens, has_image in zip(mixture.tokens.tolist(), mixture.has_image, strict=True):
        ids = torch.randint(3, 32000, (tokens - (N_IMAGE - 1) * int(has_image),))
        labels = ids.clone()
        labels[: len(ids) // 2] = IGNORE_INDEX
        if has_image:
            ids[1] = IMAGE_TOKEN_INDEX
        ids, labels = expand_image(Encoded(ids, labels), N_IMAGE, IMAGE_ID, MAX_LENGTH)
        pixels = torch.randn(3, 336, 336) if has_image else None
        items.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return items


def flops(
    mixture: Mixture, rows: list[int], model: LlavaForConditionalGeneration, mode: str
) -> float:
    """Floating-point operations of a step on these samples."""
    text = model.config.text_config
    layers = sum(
        p.numel() for n, p in model.get_decoder().layers.named_parameters() if "lora_" not in n
    )
    output = model.lm_head.weight.numel()
    forward, images = 0.0, 0
    for row in rows:
        tokens, has_image = int(mixture.tokens[row]), bool(mixture.has_image[row])
        answer = (tokens - N_IMAGE * has_image) // 2  # the output layer runs there alone
        causal = 2 * text.num_hidden_layers * text.hidden_size * tokens**2
        forward += 2 * layers * tokens + 2 * output * answer + causal
        images += has_image
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    return forward * (3 if mode == "full" else 2) + 2 * tower * (N_IMAGE + 1) * images


def measured_peak(device: torch.device, side: int) -> float:
    """bfloat16 operations a second of a large square product."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    synchronize(device)
    started = time.perf_counter()
    for _ in range(20):
        a @ a
    synchronize(device)
    return 20 * 2 * side**3 / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step(
    trained: torch.nn.Module,
    model: LlavaForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batch: dict,
    device: torch.device,
) -> None:
    dummy = batch.pop("pixel_values") if batch.pop("dummy_image", False) else None
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    n_tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    beside = contextlib.nullcontext()
    if dummy is not None:
        beside = seen_beside(model, dummy.to(device, torch.bfloat16))
    with beside:
        loss = token_losses(trained, inputs)[0].sum() / n_tokens
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(
    arguments: argparse.Namespace, shape: str, device: torch.device
) -> tuple[str, float, float]:
    """Run the steps; what was run and how fast, its operations a second, and memory in GiB."""
    trained, model = make_model(shape, arguments.mode, arguments.attention, device)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
    mixture = make_mixture(arguments.batch_size * (arguments.steps + 2))
    items = make_items(mixture)
    collate = Collator(0, 336)
    if arguments.packing:
        collate = PackingCollator(collate, None if "flash" in arguments.attention else MAX_LENGTH)
    generator = torch.Generator().manual_seed(0)
    order = ModalityLengthSampler(mixture.words, arguments.batch_size, 1, generator)
    rows = cut(list(order), arguments.batch_size)
    batches = [collate([items[row] for row in chunk]) for chunk in rows]
    n_positions = sum(batch["input_ids"].numel() for batch in batches[2:])
    for batch in batches[:2]:
        step(trained, model, optimizer, batch, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    started = time.perf_counter()
    for batch in batches[2:]:
        step(trained, model, optimizer, batch, device)
    synchronize(device)
    seconds = time.perf_counter() - started

    timed = [row for chunk in rows[2:] for row in chunk]
    n_tokens = int(mixture.tokens[timed].sum())
    text = (
        f"{sum(p.numel() for p in parameters):,} parameters trained, padding "
        f"{1 - n_tokens / n_positions:.0%}, {len(timed) / seconds:.1f} samples/s, "
        f"{n_tokens / seconds:.0f} tokens/s"
    )
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return text, flops(mixture, timed, model, arguments.mode) / seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="timed, after two that are not")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--attention", default="sdpa", help="sdpa or flash_attention_2")
    parser.add_argument("--peak", type=float, help="peak of the device, TFLOP/s")
    parser.add_argument("--tiny", action="store_true", help="the same code, small, without a GPU")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.tiny:
        print("no GPU: not measured")
        return
    device = torch.device("cuda" if on_gpu else "cpu")
    side = 256 if arguments.tiny else 8192
    peak = arguments.peak * 1e12 if arguments.peak else measured_peak(device, side)
    shape = "tiny" if arguments.tiny else "7B"
    text, work, memory = train(arguments, shape, device)
    print(
        f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {shape} {arguments.mode}, "
        f"{arguments.attention}, batch {arguments.batch_size}, "
        f"{'packed' if arguments.packing else 'a row each'}: {text}, {work / 1e12:.3f} TFLOP/s = "
        f"{work / peak:.2f} of {peak / 1e12:.3f}, {memory:.1f} GiB"
    )


if __name__ == "__main__":
    main()
