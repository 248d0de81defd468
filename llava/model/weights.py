"""Weights and their names. Read as data: nothing in a file is ever executed (promise P22).

Tensors come from safetensors, or from pickles through `torch.load(weights_only=True)`. Every layout
of LLaVA keys is renamed to the one transformers 5 uses in memory:
`model.language_model.*`, `model.vision_tower.*`, `model.multi_modal_projector.*`, `lm_head.*`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava.errors import RefusedError, StorageError, UsageError

State = dict[str, torch.Tensor]

PROJECTOR = "model.multi_modal_projector."
TOWER = "model.vision_tower."
LANGUAGE = "model.language_model."


def _linear(match: re.Match[str]) -> str:
    """LLaVA counts the GELUs between the linear maps of its projector, Hugging Face does not."""
    return f"{PROJECTOR}linear_{int(match[2]) // 2 + 1}."


# From original LLaVA, classic llava-hf and both generations of transformers; first match wins.
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", LANGUAGE),
        (r"^(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", TOWER),
        (r"^(model\.)?multi_modal_projector\.", PROJECTOR),
        (r"^(model\.)?mm_projector\.(\d*[02468])\.", _linear),
        (r"^(model\.)?mm_projector\.(?=weight|bias)", PROJECTOR),
        (r"^model\.(?!language_model\.|mm_projector\.)", LANGUAGE),
    )
]
_CLASSIC = [
    ("lm_head.", "language_model.lm_head."),
    (LANGUAGE, "language_model.model."),
    (TOWER, "vision_tower.vision_model."),
    (PROJECTOR, "multi_modal_projector."),
]
# Buffers that older versions saved, and a parameter of LLaVA-1.6 that 1.5 does not use.
_NOT_WEIGHTS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids|image_newline)$")
UNREADABLE = "check that it is a file, its owner and its mode"


def canonical_name(name: str) -> str:
    """The name transformers 5 uses in memory for a weight of any LLaVA or language model layout."""
    for pattern, replacement in _RENAMES:
        renamed, hits = pattern.subn(replacement, name, count=1)
        if hits:
            return renamed
    return name


def canonical(state: State) -> State:
    """`state` under canonical names, without saved buffers."""
    return {canonical_name(k): v for k, v in state.items() if not _NOT_WEIGHTS.search(k)}


def classic_name(name: str) -> str:
    """The name in a llava-hf file, which transformers 4 and 5 load, of a canonical name."""
    for new, old in _CLASSIC:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise ValueError(f"{name}: not a weight of LLaVA")


def original_name(name: str) -> str:
    """The name in original LLaVA's files of a canonical name."""
    if name.startswith(TOWER):
        return "model.vision_tower.vision_tower.vision_model." + name.removeprefix(TOWER)
    if name.startswith(PROJECTOR):
        bare = name.removeprefix(PROJECTOR)
        numbered = re.sub(r"^linear_(\d+)", lambda match: f"{2 * int(match[1]) - 2}", bare)
        return "model.mm_projector." + numbered
    return name.replace(LANGUAGE, "model.", 1)


def read_tensors(path: Path) -> State:
    """The tensors in one `.safetensors` or `.bin` file, by name.

    Raises RefusedError if a pickle holds anything but tensors, StorageError if the file is
    damaged, UsageError if it cannot be opened.
    """
    if path.suffix == ".safetensors":
        read_start(path)
        return _read_safetensors(path)
    value = read_pickle(path)
    if not isinstance(value, dict) or not all(torch.is_tensor(t) for t in value.values()):
        raise UsageError(f"{path}: holds no table of tensors")
    return {name: tensor.detach() for name, tensor in value.items()}


def read_start(path: Path) -> bytes:
    """The first 64 bytes of a file; UsageError if it cannot be read or Git LFS left it out."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {UNREADABLE}") from error
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    return start


def _read_safetensors(path: Path) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StorageError(f"{path}: damaged or incomplete ({error}); copy it again") from error


def read_pickle(path: Path) -> Any:
    """Tensors in plain containers, as PyTorch saved them. Raises as `read_tensors` does."""
    looks_like_pickle = read_start(path)[:1] in (b"\x80", b"P")
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        if looks_like_pickle:
            raise RefusedError(
                f"{path}: this pickle holds more than tensors and could run code; not loaded. "
                "Get the weights as safetensors"
            ) from error
        raise StorageError(f"{path}: not a file of weights, or damaged") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise StorageError(f"{path}: damaged or incomplete; copy it again") from error
