"""Any vision-language model behind one small interface, loaded by the files in its folder.

Selection calls the model that scores a pool its proxy; evaluation asks the one to be judged.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llava.errors import UsageError
from llava.model.checkpoint import Checkpoint
from llava.model.sources import Kind
from llava.vlm.base import Batch, ForwardOut, Prepared, Vlm, padded_length
from llava.vlm.llava import LlavaVlm
from llava.vlm.processor import ProcessorVlm

__all__ = [
    "Batch",
    "ForwardOut",
    "LlavaVlm",
    "Prepared",
    "ProcessorVlm",
    "Vlm",
    "load_vlm",
    "padded_length",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_vlm(
    path: str | Path,
    base: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Vlm:
    """Read a checkpoint.

    `base` is the language model under a LoRA or projector-only checkpoint. `dtype` None or "auto"
    is bfloat16 on a GPU that has it, float16 on another, float32 on a CPU; `device` None or "auto"
    is this process's GPU where there is one. Raises UsageError, in one line, when the folder
    cannot be read as a vision-language model.
    """
    where = pick_device(device)
    checkpoint = Checkpoint.open(path, base)
    kind, number = checkpoint.kind, pick_dtype(dtype, where)
    if kind is Kind.HF_OTHER:
        return ProcessorVlm.load(checkpoint, number, where)
    loaded = checkpoint.load(number, where)
    return LlavaVlm(loaded, checkpoint.fingerprint(), checkpoint.folder)


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; None or "auto" is the GPU of this local rank, else the CPU."""
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: PyTorch sees no CUDA device; use --device cpu")
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: use auto, cpu or cuda") from None


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype called `name`; None or "auto" is the widest fast one of the device."""
    if name in (None, "auto"):
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]
