"""Model directories: found by a name, told by their files, their configurations read as data.

kind            told by                                             needs besides
--------------  --------------------------------------------------  ---------------------------
hf_llava        config.json of LlavaForConditionalGeneration
llava_full      mm_vision_tower or its architecture in config.json  the vision tower named there
llava_lora      adapter_config.json                                 base, perhaps the tower
projector_only  mm_projector.bin without whole weights              base, perhaps the tower
language_model  config.json of a causal language model
hf_other        any other vision-language model of transformers     read by `llava.vlm`

A directory's own name tells nothing. A configuration becomes a class that transformers itself
ships, never one that the checkpoint names: nothing in it is ever executed (promise P22).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    LlavaConfig,
    PreTrainedConfig,
)
from transformers.utils import logging

from llava.errors import RefusedError, UsageError
from llava.model.weights import UNREADABLE, State, canonical, read_start, read_tensors

ADAPTER_CONFIG = "adapter_config.json"
NON_LORA = "non_lora_trainables.bin"
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
FEATURES = {"patch": "default", "cls_patch": "full"}
"""LLaVA's mm_vision_select_feature -> transformers' vision_feature_select_strategy."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ORIGINAL = re.compile(r"Llava\w*ForCausalLM")
# Settings of LLaVA's own that stand in its config.json beside those of the language model.
_OF_LLAVA = re.compile(r"(mm_|tune_mm_|freeze_mm_|unfreeze_mm_|use_mm_|image_|tokenizer_)")
# Keys of a configuration that choose code, files or machinery instead of describing the model.
_NOT_MODEL = ("auto_map", "custom_pipelines", "transformers_weights", "fusion_config")


class Kind(StrEnum):
    """What a model directory holds."""

    HF_LLAVA = "hf_llava"
    LLAVA_FULL = "llava_full"
    LLAVA_LORA = "llava_lora"
    PROJECTOR_ONLY = "projector_only"
    LANGUAGE_MODEL = "language_model"
    HF_OTHER = "hf_other"


def find_directory(name: str | Path, beside: Path | None = None, download: bool = True) -> Path:
    """The directory that `name` means: a path, first from `beside`; one next to it; a hub's.

    Without `download` a hub's is taken from the cache, as much of it as there is. Raises UsageError
    when there is none, or the hub cannot be reached and has no cached copy.
    """
    text = str(name)
    places = [Path(text).expanduser()]
    if beside is not None:
        places = [beside / text, *places, beside.resolve().parent / Path(text).name]
    for place in places:
        if _is_directory(place):
            return place
    if not download:
        return _from_cache(text)
    if Path(text).exists() or not HUB_NAME.fullmatch(text):
        raise UsageError(f"{text}: no such model directory")
    return _from_hub(text)


def _is_directory(place: Path) -> bool:
    try:
        if not place.is_dir():
            return False
        os.listdir(place)
    except PermissionError as error:
        raise UsageError(f"{place}: permission denied; check the owner and mode of it") from error
    return True


def _from_cache(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name}: neither a directory nor a model in the hub's cache, and a plan downloads "
            "nothing; its config.json and tokenizer files are enough"
        ) from error


def _from_hub(name: str) -> Path:
    """Download, or find in the cache, a repository's weights, configuration and tokenizer."""
    import huggingface_hub

    patterns = ["*.json", "*.model", "*.safetensors", "*.bin"]
    try:
        files = [] if huggingface_hub.is_offline_mode() else huggingface_hub.list_repo_files(name)
        # Many repositories hold the same weights twice; mm_projector.bin and its like stay.
        twice = any(f.startswith("model") and f.endswith(".safetensors") for f in files)
        ignored = ["pytorch_model*.bin", "*/*"] if twice else ["*/*"]
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=ignored
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise UsageError(
            f"{name}: no such directory, and the hub gave nothing ({type(error).__name__}); "
            "download the model and pass its directory"
        ) from error
    return Path(folder)


def kind_of(folder: Path) -> Kind:
    """The kind of the model in `folder`, by its files.

    Raises UsageError when nothing in it can be loaded, RefusedError when only its own code could.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return Kind.LLAVA_LORA
    has_config, has_weights = (folder / "config.json").is_file(), bool(weight_files(folder))
    if (folder / PROJECTOR_FILE).is_file() and not has_weights:
        return Kind.PROJECTOR_ONLY
    if not (has_config and has_weights):
        raise UsageError(f"{folder}: {_what_lacks(folder, has_config, has_weights)}")
    return kind_by_config(folder)


def _what_lacks(folder: Path, has_config: bool, has_weights: bool) -> str:
    """Why a folder without configuration or without weights cannot be loaded, and what to do."""
    names = {path.name for path in folder.iterdir()}
    runs = sorted(name for name in names if re.fullmatch(r"checkpoint-\d+", name))
    # From the file that says most of what the folder was meant to be, to none at all.
    if has_weights:
        return "weights without config.json; copy it from where the weights came from"
    if any(name.startswith("adapter_model.") for name in names):
        return f"a LoRA's weights without {ADAPTER_CONFIG}; copy it from the same run"
    if NON_LORA in names:
        return f"{NON_LORA} without its LoRA; copy {ADAPTER_CONFIG} and adapter_model.*"
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
        f"no model in this directory: it has neither config.json nor {ADAPTER_CONFIG} nor "
        f"{PROJECTOR_FILE}; name the folder that holds them"
    )


def kind_by_config(folder: Path) -> Kind:
    """The kind of a whole model by its config.json alone. Raises as `kind_of` does."""
    path = folder / "config.json"
    values = read_json(path)
    if is_original(values):
        return Kind.LLAVA_FULL
    config = make_config(values, path)
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


def is_original(values: dict[str, Any]) -> bool:
    """Whether a config.json is one that LLaVA itself wrote."""
    architectures = values.get("architectures") or []
    return "mm_vision_tower" in values or any(_ORIGINAL.fullmatch(a) for a in architectures)


def original_text_config(folder: Path, values: dict[str, Any]) -> PreTrainedConfig:
    """The language model's part of a config.json that LLaVA itself wrote; UsageError on others."""
    kind = str(values.get("model_type"))
    text_kind = "llama" if kind == "llava" else kind.removeprefix("llava_")
    if text_kind == kind:
        raise UsageError(
            f"{folder}: an original LLaVA of type {kind!r}; known: llava, llava_llama, "
            "llava_mistral and others whose language model transformers has"
        )
    other = ("architectures", "auto_map", "_name_or_path", "torch_dtype", "vision_config")
    text = {k: v for k, v in values.items() if not _OF_LLAVA.match(k) and k not in other}
    return make_config(text, folder / "config.json", text_kind)


def read_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration of the model in `folder`. Raises as `make_config` does."""
    path = folder / "config.json"
    return make_config(read_json(path), path)


def make_config(values: dict[str, Any], where: Path, kind: str | None = None) -> PreTrainedConfig:
    """transformers' configuration of `values`, which may not bring code of its own.

    `kind` replaces the `model_type` in `values`. Raises RefusedError if the type exists only as
    code in the checkpoint, or an attention kernel is to be downloaded; UsageError on a type
    unknown to transformers, a value of the wrong type or quantised weights.
    """
    kind = kind or values.get("model_type")
    if kind not in CONFIG_MAPPING:
        if "auto_map" in values:
            raise RefusedError(
                f"{where}: its model type {kind!r} is code inside the checkpoint (auto_map), which "
                "is never run; convert it to a model that transformers ships"
            )
        raise UsageError(f"{where}: unknown model type {kind!r}")
    if values.get("quantization_config"):
        raise UsageError(f"{where}: quantised weights; give the checkpoint in 16 or 32 bits")
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[kind].from_dict(_plain({**values, "model_type": kind}, where))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from error


def _plain(values: dict[str, Any], where: Path) -> dict[str, Any]:
    """`values` without private keys and those that choose code, at every depth."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if "_implementation" in key and re.search(r"[/:@]", str(value)):
            raise RefusedError(
                f"{where}: {key} {value!r} would download and run code; remove the key"
            )
        if key.startswith("_") or "_implementation" in key or key in _NOT_MODEL:
            continue
        kept[key] = _plain(value, where) if isinstance(value, dict) else value
    return kept


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UsageError if it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {UNREADABLE}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: holds a {type(value).__name__} instead of an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights, sorted; safetensors are preferred to pickles.

    Empty if there are none. Raises UsageError when the index names a shard that is absent.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        single = folder / f"{stem}.{suffix}"
        if index.is_file():
            return _shards(index)
        if single.is_file():
            return [single]
    return []


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if any(os.path.basename(name) != name for name in names):
        raise RefusedError(f"{index}: names a shard outside its own directory")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UsageError(f"{index}: shard {missing[0]} is missing{more}; finish the download")
    return [index.parent / name for name in names]


def read_weights(folder: Path) -> State:
    """All weights of the model in `folder`, under the names in the files, on the CPU.

    Files are mapped, not copied, where their format allows. Raises UsageError without any.
    """
    files = weight_files(folder)
    if not files:
        raise UsageError(f"{folder}: no model.safetensors or pytorch_model.bin, whole or sharded")
    state: State = {}
    for file in files:
        state.update(read_tensors(file))
    return state


def read_language_model(folder: Path) -> tuple[PreTrainedConfig, State]:
    """Configuration and weights of a causal language model."""
    config = read_config(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{folder}: {config.model_type!r} is no causal language model")
    return config, canonical(read_weights(folder))


def read_vision_config(folder: Path) -> PreTrainedConfig:
    """Configuration of the vision half of a CLIPVisionModel or CLIPModel directory."""
    config = read_config(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise UsageError(f"{folder}: {config.model_type!r} is no CLIP vision tower")
    return config


def read_vision_state(folder: Path) -> State:
    """Weights of a CLIP vision tower; text half and projections are left out."""
    state = {}
    for name, tensor in read_weights(folder).items():
        bare = name.removeprefix("vision_model.")
        if bare.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")):
            state[f"vision_tower.{bare}"] = tensor
    return canonical(state)


def tokenizer_folder(folders: list[Path]) -> Path:
    """The first of `folders` that holds a vocabulary; UsageError if none does."""
    for folder in folders:
        vocabularies = [folder / name for name in TOKENIZER_FILES[:2] if (folder / name).is_file()]
        for path in vocabularies:
            read_start(path)
        if vocabularies:
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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' reports and bars; what matters in them is raised as an error here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
