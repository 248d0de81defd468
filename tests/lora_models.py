"""A tiny LLaVA with a LoRA, as a checkpoint and as the model that wrote it: for several files."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from llava.files import write_json
from llava.model import checkpoint, lora

RANK, ALPHA = 4, 8


def save_lora(base: Path, folder: Path, seed: int = 1) -> PeftModel:
    """Save a random LoRA of the LLaVA in `base`, both halves different from zero, to `folder`.

    To be loaded with `base`. Returns the model with the adapter beside the weights, not in them.
    """
    model = lora.attach(checkpoint.load(base).model, rank=RANK, alpha=ALPHA, dropout=0.05)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factors(model).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    lora.save(model, folder, base=str(base))
    write_json(folder / "config.json", {"model_type": "llava_llama"})
    return model.eval()


def factors(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's matrices by `layers.0.self_attn.q_proj.lora_A` and so on."""
    return {
        name.split("language_model.")[1].removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
