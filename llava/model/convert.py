"""Convert between original LLaVA and Hugging Face's, and merge a LoRA or a projector into its base.

target     from                                   written
---------  -------------------------------------  ------------------------------------------------
hf         any LLaVA; LoRA or projector + base    a llava-hf directory
original   the same                               original LLaVA's full checkpoint, tower included
projector  the same                               mm_projector.bin and config.json
hf-lora    a LoRA                                 PEFT's adapter for Hugging Face's LLaVA
lora       a LoRA                                 original LLaVA's LoRA directory

Weights are mapped from their files and written one file (5 GB) at a time, so memory holds one file
whatever the model's size. The result appears whole, or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlavaConfig

from llava.errors import UsageError
from llava.files import write_json, writing, writing_folder
from llava.model import lora
from llava.model.checkpoint import Checkpoint, Loaded
from llava.model.export import original_config, save_hf, save_original, save_projector, tower_name
from llava.model.projector import DEFAULT_TYPE, type_in
from llava.model.sources import ADAPTER_CONFIG, NON_LORA, SETTINGS_FILE, Kind, read_json
from llava.model.weights import PROJECTOR, State

_WHOLE = {"hf": save_hf, "original": save_original, "projector": save_projector}
_ADAPTERS = ("hf-lora", "lora")
TARGETS = (*_WHOLE, *_ADAPTERS)


def convert(
    path: str | Path,
    target: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    vision_tower: str | None = None,
) -> None:
    """Write the LLaVA at `path` as `target`, one of TARGETS, to the new or empty folder `out`.

    Args:
        base: what a LoRA or a projector was trained on.
        dtype: of all weights written; None keeps each as it is.
        vision_tower: what original LLaVA's config.json is to name as its tower; None takes the
            name in the checkpoint, or CLIP-L/336 if the tower has its shape.

    Raises UsageError (nothing to convert, `out` in use, a target that cannot hold the model) and
    all that `Checkpoint.load` raises.
    """
    _write(Checkpoint.open(path, base), target, Path(out), dtype, vision_tower)


def _write(
    checkpoint: Checkpoint,
    target: str,
    out: Path,
    dtype: torch.dtype | None,
    vision_tower: str | None = None,
) -> None:
    with whole_directory(out) as temp:
        if target in _ADAPTERS:
            _convert_lora(checkpoint, target, temp, dtype, vision_tower)
            return
        loaded, state = checkpoint.outline()
        if not isinstance(loaded.model.config, LlavaConfig):
            raise UsageError(
                f"{checkpoint.folder}: {loaded.kind}, without a vision tower; give a LLaVA"
            )
        loaded.vision_tower = vision_tower or loaded.vision_tower
        if target != "hf":
            _check_tower(loaded)
        _WHOLE[target](loaded, temp, dtype, state)


def _check_tower(loaded: Loaded) -> None:
    if tower_name(loaded) is None:
        raise UsageError(
            "the vision tower has no name in this checkpoint and is not CLIP-L/336; give its "
            "directory or hub name with --vision-tower"
        )


def merge(
    path: str | Path, base: str | Path, out: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Merge a LoRA or a projector into the model it was trained on: a llava-hf directory."""
    checkpoint = Checkpoint.open(path, base)
    if checkpoint.kind not in (Kind.LLAVA_LORA, Kind.PROJECTOR_ONLY):
        raise UsageError(
            f"{path}: is {checkpoint.kind}, nothing to merge; to convert it use convert"
        )
    _write(checkpoint, "hf", Path(out), dtype)


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Give a folder to write to; it then appears as `out` at once. Nothing stays of a failure."""
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty; give another --out or remove it")
    with writing_folder(out, "give --out on another disk or check its permissions") as folder:
        yield folder


def _convert_lora(
    checkpoint: Checkpoint,
    target: str,
    out: Path,
    dtype: torch.dtype | None,
    vision_tower: str | None,
) -> None:
    folder = checkpoint.folder
    if checkpoint.kind is not Kind.LLAVA_LORA:
        raise UsageError(
            f"{folder}: is {checkpoint.kind}, no LoRA; for whole models use --to hf or original"
        )
    lora.scale(folder)  # refuses an adapter of another formula
    factors, others = lora.read(folder)
    _check_portable(folder, factors, others)
    settings = checkpoint.settings(partial=True)
    if settings:
        write_json(out / SETTINGS_FILE, settings)

    # The base is recorded as a place, or as a hub name as it is.
    base = checkpoint.base_name
    if base and Path(base).is_dir():
        base = Path(base).resolve()
    name = base and str(base)
    config = {**read_json(folder / ADAPTER_CONFIG), "base_model_name_or_path": name}
    if target == "hf-lora":
        _write_peft(folder, factors, others, config, out, dtype)
    else:
        values = _lora_config(checkpoint, out, vision_tower)
        _write_original_lora(factors, others, config, out, dtype)
        write_json(out / "config.json", values)


def _check_portable(folder: Path, factors: dict[str, Any], others: State) -> None:
    inside = re.compile(r"model\.language_model\.layers\.")
    foreign = [name for name in factors if not inside.match(name)]
    foreign += [name for name in others if not name.startswith(PROJECTOR)]
    if foreign:
        raise UsageError(
            f"{folder}: also trains {min(foreign)}, which an adapter of the language model cannot "
            "hold; merge it instead: python -m llava.model merge"
        )


def _write_peft(
    folder: Path,
    factors: dict[str, lora.Factors],
    projector: State,
    config: dict[str, Any],
    out: Path,
    dtype: torch.dtype | None,
) -> None:
    """PEFT's files: names of Hugging Face's LLaVA, the projector as a module it saves whole."""
    if projector and type_in(projector, folder) != DEFAULT_TYPE:
        raise UsageError(
            f"{folder}: a projector of type {type_in(projector, folder)}; Hugging Face's LLaVA has "
            f"{DEFAULT_TYPE} only"
        )
    named = lora.named_factors(factors, str)
    named.update({lora.PREFIX + name: tensor for name, tensor in projector.items()})
    _save_adapter(named, out, dtype)
    leaves = {name.split(".")[-2] for name in factors}
    config.update(
        target_modules=lora.layer_pattern(leaves),
        modules_to_save=["multi_modal_projector"] if projector else None,
    )
    write_json(out / ADAPTER_CONFIG, config)


def _write_original_lora(
    factors: dict[str, lora.Factors],
    projector: State,
    config: dict[str, Any],
    out: Path,
    dtype: torch.dtype | None,
) -> None:
    _save_adapter(lora.named_factors(factors, lora.original_name), out, dtype)
    if projector:
        cast = {name: tensor.to(dtype=dtype) for name, tensor in projector.items()}
        lora.save_projector(cast, out / NON_LORA, prefix=lora.PREFIX)
    leaves = sorted({name.split(".")[-2] for name in factors})
    config.update(target_modules=leaves, modules_to_save=None)
    write_json(out / ADAPTER_CONFIG, config)


def _save_adapter(named: State, out: Path, dtype: torch.dtype | None) -> None:
    tensors = {name: tensor.to(dtype=dtype).contiguous() for name, tensor in named.items()}
    with writing(out / "adapter_model.safetensors") as temp:
        save_file(tensors, temp, metadata={"format": "pt"})


def _lora_config(checkpoint: Checkpoint, out: Path, vision_tower: str | None) -> dict[str, Any]:
    """LLaVA's config.json for a LoRA: its own, or made from its base."""
    folder, values = checkpoint.folder, checkpoint.values
    if checkpoint.base_name is None and "mm_vision_tower" not in values:
        raise UsageError(
            f"{folder}: no config.json of LLaVA in it; give the LLaVA it was trained on with "
            "--model-base"
        )
    if checkpoint.base_name is not None:
        loaded, _ = checkpoint.outline()
        loaded.vision_tower = vision_tower or loaded.vision_tower
        _check_tower(loaded)
        return original_config(loaded, out)
    tower = vision_tower or values["mm_vision_tower"]
    place = Path(tower) if vision_tower else folder / tower
    relative = os.path.relpath(place.resolve(), out.resolve()) if place.is_dir() else tower
    return {**values, "mm_vision_tower": relative}
