"""Find out what a model directory holds, and read it: by its files, never by its name.

kind            told by                                             needs besides
--------------  --------------------------------------------------  ---------------------------
hf_llava        config.json of LlavaForConditionalGeneration
llava_full      mm_vision_tower or its architecture in config.json  the vision tower named there
llava_lora      adapter_config.json                                 base, perhaps the tower
projector_only  mm_projector.bin without whole weights              base, perhaps the tower
language_model  config.json of a causal language model
hf_other        any other vision-language model of transformers     read by `llava.vlm`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    LlavaConfig,
    PreTrainedConfig,
)

from llava.errors import UsageError
from llava.model import lora
from llava.model.assemble import (
    Parts,
    combine,
    read_language_model,
    read_vision_config,
    read_vision_tower,
    split,
)
from llava.model.projector import check_projector_size, read_projector, with_projector
from llava.model.weights import (
    HUB_NAME,
    PROJECTOR,
    canonical,
    find_directory,
    make_config,
    read_json,
    read_start,
    read_weights,
    weight_files,
)
from llava.tokens import load_tokenizer

PROJECTOR_FILE = "mm_projector.bin"
SETTINGS_FILE = "llava.json"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_ORIGINAL = re.compile(r"Llava\w*ForCausalLM")
# Settings of LLaVA's own that stand in its config.json beside those of the language model.
_OF_LLAVA = re.compile(r"(mm_|tune_mm_|freeze_mm_|unfreeze_mm_|use_mm_|image_|tokenizer_)")
DEFAULTS = {"template": "v1", "image_aspect_ratio": "pad", "model_max_length": 2048}
FEATURES = {"patch": "default", "cls_patch": "full"}
"""LLaVA's mm_vision_select_feature -> transformers' vision_feature_select_strategy."""


class Kind(StrEnum):
    """What a model directory holds."""

    HF_LLAVA = "hf_llava"
    LLAVA_FULL = "llava_full"
    LLAVA_LORA = "llava_lora"
    PROJECTOR_ONLY = "projector_only"
    LANGUAGE_MODEL = "language_model"
    HF_OTHER = "hf_other"


@dataclass
class Source:
    """A checkpoint that is read but not yet built. Folders are searched in order."""

    config: PreTrainedConfig
    state: Mapping[str, torch.Tensor]
    """Under canonical names; those that a LoRA adapts are merged when they are asked for."""
    settings: dict[str, Any]
    tokenizer_folders: list[Path]
    image_folders: list[Path]
    vision_tower: str | None = None
    """Directory or hub name of the vision tower, where the checkpoint says it."""


def inspect(path: str | Path) -> Kind:
    """The kind of the model `path`, a directory or a hub name, by the files in it.

    Raises UsageError when nothing in it can be loaded, RefusedError when only its own code could.
    """
    folder = find_directory(path)
    if (folder / lora.ADAPTER_CONFIG).is_file():
        return Kind.LLAVA_LORA
    has_config, has_weights = (folder / "config.json").is_file(), bool(weight_files(folder))
    if (folder / PROJECTOR_FILE).is_file() and not has_weights:
        return Kind.PROJECTOR_ONLY
    if not (has_config and has_weights):
        raise UsageError(f"{folder}: {_what_lacks(folder, has_config, has_weights)}")
    return kind_by_config(folder)


def kind_by_config(folder: Path) -> Kind:
    """The kind of a whole model by its config.json alone. Raises as `inspect` does."""
    values = read_json(folder / "config.json")
    return Kind.LLAVA_FULL if is_original(values) else _hugging_face_kind(folder, values)


def _what_lacks(folder: Path, has_config: bool, has_weights: bool) -> str:
    """Why a folder without configuration or without weights cannot be loaded, and what to do."""
    names = {path.name for path in folder.iterdir()}
    runs = sorted(name for name in names if re.fullmatch(r"checkpoint-\d+", name))
    if has_weights:
        return "weights without config.json; copy it from where the weights came from"
    if any(name.startswith("adapter_model.") for name in names):
        return f"a LoRA's weights without {lora.ADAPTER_CONFIG}; copy it from the same run"
    if lora.NON_LORA in names:
        return f"{lora.NON_LORA} without its LoRA; copy {lora.ADAPTER_CONFIG} and adapter_model.*"
    if runs:
        return f"no model in this directory, but {', '.join(runs[:5])} in it; name one of them"
    if has_config and read_json(folder / "config.json").get("tune_mm_mlp_adapter"):
        return f"config.json of a projector without {PROJECTOR_FILE}; copy it from the same run"
    if has_config:
        return (
            "config.json without weights (model.safetensors or pytorch_model.bin, whole or with "
            "an index); copy them, or finish the download"
        )
    return (
        f"no model in this directory: it has neither config.json nor {lora.ADAPTER_CONFIG} nor "
        f"{PROJECTOR_FILE}; name the folder that holds them"
    )


def is_original(values: dict[str, Any]) -> bool:
    """Whether a config.json is one that LLaVA itself wrote."""
    architectures = values.get("architectures") or []
    return "mm_vision_tower" in values or any(_ORIGINAL.fullmatch(a) for a in architectures)


def _hugging_face_kind(folder: Path, values: dict[str, Any]) -> Kind:
    config = make_config(values, folder / "config.json")
    if isinstance(config, LlavaConfig):
        return Kind.HF_LLAVA
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return Kind.HF_OTHER
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return Kind.LANGUAGE_MODEL
    raise UsageError(
        f"{folder}: a {config.model_type!r} model is neither a language model nor a "
        "vision-language model"
    )


def read(folder: Path, kind: Kind, base: str | Path | None) -> Source:
    """Configuration, weights and settings of `folder`, put on `base` where it needs one."""
    if kind in (Kind.LLAVA_LORA, Kind.PROJECTOR_ONLY):
        return _read_on_base(folder, kind, base)
    if kind is Kind.HF_OTHER:
        raise UsageError(
            f"{folder}: a vision-language model, but no LLaVA-1.5; it can score a pool "
            "(python -m selection extract), not be trained or converted here"
        )
    values = read_json(folder / "config.json")
    settings = settings_in(folder)
    if kind is Kind.LLAVA_FULL:
        text_config = original_text_config(folder, values)
        return _with_tower(folder, values, text_config, canonical(read_weights(folder)), [folder])
    if kind is Kind.LANGUAGE_MODEL:
        return Source(*read_language_model(folder), settings, [folder], [])
    config = make_config(values, folder / "config.json")
    return Source(config, canonical(read_weights(folder)), settings, [folder], [folder])


def _read_on_base(folder: Path, kind: Kind, base: str | Path | None) -> Source:
    """A LoRA or a projector put on the model it was trained on."""
    if base is None:
        what = "a LoRA" if kind is Kind.LLAVA_LORA else "only a projector"
        raise UsageError(
            f"{folder}: {what}; give the model it was trained on with --model-base"
            + _recorded_base(folder)
        )
    base_folder = find_directory(base)
    base_kind = inspect(base_folder)
    if base_kind in (Kind.LLAVA_LORA, Kind.PROJECTOR_ONLY):
        raise UsageError(f"--model-base {base}: is itself {base_kind}; give a whole model")
    source = read(base_folder, base_kind, None)
    config_path = folder / "config.json"
    values = read_json(config_path) if config_path.is_file() else {}
    if kind is Kind.LLAVA_LORA:
        state: Mapping[str, torch.Tensor] = lora.merged(source.state, folder)
    else:
        state = with_projector(source.state, read_projector(folder / PROJECTOR_FILE))
    folders = [folder, *source.tokenizer_folders]
    if not isinstance(source.config, LlavaConfig):
        has_projector = any(name.startswith(PROJECTOR) for name in state)
        if "mm_vision_tower" in values:
            if not has_projector:
                raise UsageError(
                    f"{folder}: no {lora.NON_LORA}, which holds the projector; copy it from the "
                    "same run, or give the whole LLaVA it was trained on as --model-base"
                )
            return _with_tower(folder, values, source.config, state, folders)
        if has_projector:
            raise UsageError(
                f"{folder}: needs a config.json that names mm_vision_tower; copy it from where it "
                "was trained, or give a whole LLaVA as --model-base"
            )
    settings = {**source.settings, **settings_in(folder, partial=True)}
    places = source.image_folders
    return Source(source.config, state, settings, folders, places, source.vision_tower)


def _recorded_base(folder: Path) -> str:
    for name, key in (
        (lora.ADAPTER_CONFIG, "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
    ):
        if (folder / name).is_file():
            recorded = read_json(folder / name).get(key)
            if recorded:
                return f" (its {name} says {recorded})"
    return ""


def original_text_config(folder: Path, values: dict[str, Any]) -> PreTrainedConfig:
    """The language model's part of a config.json that LLaVA itself wrote; UsageError on others."""
    kind = str(values.get("model_type"))
    text_kind = "llama" if kind == "llava" else kind.removeprefix("llava_")
    if text_kind == kind:
        raise UsageError(
            f"{folder}: an original LLaVA of type {kind!r}; known: llava, llava_llama, "
            "llava_mistral and others whose language model transformers has"
        )
    own = ("architectures", "auto_map", "_name_or_path", "torch_dtype", "vision_config")
    text = {k: v for k, v in values.items() if not _OF_LLAVA.match(k) and k not in own}
    return make_config(text, folder / "config.json", text_kind)


def _with_tower(
    folder: Path,
    values: dict[str, Any],
    text_config: PreTrainedConfig,
    state: Mapping[str, torch.Tensor],
    tokenizer_folders: list[Path],
) -> Source:
    """Original LLaVA's weights completed by the vision tower that its configuration names."""
    if values.get("mm_use_im_start_end"):
        raise UsageError(
            f"{folder}: mm_use_im_start_end is of an older LLaVA and not supported; use a LLaVA-1.5"
        )
    text_state, tower, projector = split(state.base if isinstance(state, lora.Merged) else state)
    name, image_folders = values.get("mm_vision_tower"), [folder]
    if tower and "vision_config" in values:  # complete in itself: no other folder is needed
        vision_config = make_config(values["vision_config"], folder / "config.json")
    else:
        place = tower_folder(folder, name)
        image_folders.append(place)
        vision_config = read_vision_config(place)
        tower = tower or read_vision_tower(place)[1]
    check_projector_size(projector, vision_config, text_config, folder)
    vocab_size = load_tokenizer(tokenizer_folder(tokenizer_folders)).vocab_size
    config, full = combine(
        Parts(text_config, text_state, vision_config, tower, projector),
        vocab_size,
        values.get("mm_vision_select_layer", -2),
        FEATURES.get(values.get("mm_vision_select_feature", "patch"), "default"),
    )
    settings = settings_in(folder)
    full = state.on(full) if isinstance(state, lora.Merged) else full
    lasting = _lasting_name(folder, name)
    return Source(config, full, settings, tokenizer_folders, image_folders, lasting)


def _lasting_name(folder: Path, name: str | None) -> str | None:
    """A tower's directory as it is found from anywhere; a hub name, or one not found, as it is."""
    if not name or (HUB_NAME.fullmatch(name) and not (folder / name).is_dir()):
        return name
    try:
        return str(find_directory(name, beside=folder).resolve())
    except UsageError:
        return name


def tower_folder(folder: Path, name: str | None) -> Path:
    """The directory of the vision tower that a checkpoint names; UsageError if there is none."""
    if not name:
        raise UsageError(
            f"{folder}: config.json does not name its vision tower; add mm_vision_tower, for "
            "LLaVA-1.5 openai/clip-vit-large-patch14-336"
        )
    try:
        return find_directory(name, beside=folder)
    except UsageError as error:
        raise UsageError(
            f"{folder}: its vision tower was not found ({error}); put it beside the checkpoint "
            f"as {folder.resolve().parent / Path(name).name}"
        ) from error


def settings_in(folder: Path, partial: bool = False) -> dict[str, Any]:
    """How to prepare samples: llava.json, else LLaVA's config.json, else LLaVA-1.5's defaults.

    `partial` leaves the defaults out.
    """
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else {}
    found = {} if partial else dict(DEFAULTS)
    for key, original in (
        ("image_aspect_ratio", "image_aspect_ratio"),
        ("model_max_length", "tokenizer_model_max_length"),
    ):
        if values.get(original) is not None:
            found[key] = values[original]
    if (folder / SETTINGS_FILE).is_file():
        found.update(read_json(folder / SETTINGS_FILE))
    return found


def tokenizer_folder(folders: list[Path]) -> Path:
    """The first of `folders` that holds a vocabulary; UsageError if none does."""
    for folder in folders:
        found = [folder / name for name in TOKENIZER_FILES[:2] if (folder / name).is_file()]
        for path in found:
            read_start(path)
        if found:
            return folder
    places = " or ".join(str(folder) for folder in folders)
    raise UsageError(f"no tokenizer.model or tokenizer.json in {places}; copy the base model's")


def preprocessor_folder(folders: list[Path]) -> Path:
    """The first of `folders` that says how images are preprocessed; UsageError if none does."""
    for folder in folders:
        if (folder / PREPROCESSOR).is_file():
            return folder
    places = " or ".join(str(folder) for folder in folders)
    raise UsageError(f"no {PREPROCESSOR} in {places}; copy the vision tower's")
