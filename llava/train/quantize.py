"""`--bits 4` and `--bits 8`: the frozen language model in few bits, under LoRA (QLoRA).

QLoRA: Dettmers et al. 2023, arXiv:2305.14314; LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339.
The package bitsandbytes does it, on a GPU and, slowly, on the CPU.

Only the linear maps that get an adapter are quantised: those of the language model's layers. Vision
tower, projector, embedding and output layer stay in the type of the computation, norms are float32.

Differs from LLaVA: weights are quantised once all are in place (it quantised the projector too
early, whose file then no longer fitted), the output layer never is, and without DeepSpeed the
adapters stay float32 and are computed with in the training's type, like all weights that train.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llava.errors import UsageError
from llava.model import lora
from llava.train import zero
from llava.train.arguments import TrainingArguments

INT8_THRESHOLD = 6.0  # activations beyond it are multiplied in 16 bits (LLM.int8(), section 3.2)


def check(flags: TrainingArguments) -> None:
    """Raise UsageError, with the remedy, if `--bits` cannot be followed here."""
    if flags.bits == 16:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"--bits {flags.bits}: bitsandbytes is not installed; pip install bitsandbytes, or "
            "leave --bits out"
        )
    if zero.stage(flags) == 3:
        raise UsageError(
            f"--bits {flags.bits}: ZeRO-3 cannot split quantised weights; use --deepspeed "
            "scripts/zero2.json"
        )


def quantise(model: PreTrainedModel, flags: TrainingArguments) -> None:
    """Quantise the maps that get an adapter, in place; nothing with 16 bits.

    Each is moved to `flags.device` alone, so a GPU never holds the model in 16 bits.
    """
    if flags.bits == 16:
        return
    # With 8 bits it says at every product that activations are multiplied in float16.
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)
    pattern = re.compile(lora.target_pattern(model))
    for name, module in list(model.named_modules()):
        if pattern.fullmatch(name):
            model.set_submodule(name, quantised(module, flags))
    setattr(model, f"is_loaded_in_{flags.bits}bit", True)  # PEFT chooses its layers by it


def quantised(layer: nn.Linear, flags: TrainingArguments) -> nn.Linear:
    """The same map with its weight in `flags.bits` bits on `flags.device`, frozen."""
    import bitsandbytes

    options: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
    sizes = layer.in_features, layer.out_features
    if flags.bits == 8:
        few = bitsandbytes.nn.Linear8bitLt(
            *sizes, has_fp16_weights=False, threshold=INT8_THRESHOLD, **options
        )
        few.weight = bitsandbytes.nn.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=False
        )
    else:
        few = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=flags.compute_dtype, **options)
        few.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data,
            requires_grad=False,
            compress_statistics=flags.double_quant,
            quant_type=flags.quant_type,
            module=few,
        )
        # Else the first evaluation on a CPU would repack the weight for good, for products that
        # have no gradient, and training would go on without a word.
        few.support_avx512bf16_for_cpu = False
    few.bias = layer.bias
    few.requires_grad_(False)
    return few.to(flags.device)


def widen_norms(model: PreTrainedModel, flags: TrainingArguments) -> None:
    """Norms of a quantised language model in float32; nothing with 16 bits."""
    if flags.bits == 16:
        return
    for module in model.get_decoder().modules():
        if "Norm" in type(module).__name__:
            module.to(torch.float32)
