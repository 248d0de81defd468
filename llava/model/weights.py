"""Weights and configurations read as data: nothing in a checkpoint is ever executed (promise P22).

Tensors come from safetensors, or from pickles through `torch.load(weights_only=True)`; a
configuration becomes a class that transformers itself ships, never one the checkpoint names.
Every layout of LLaVA keys is renamed to the one transformers 5 uses in memory:
`model.language_model.*`, `model.vision_tower.*`, `model.multi_modal_projector.*`, `lm_head.*`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

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
# Keys of a configuration that choose code, files or machinery instead of describing the model.
_NOT_MODEL = ("auto_map", "custom_pipelines", "transformers_weights", "fusion_config")
_UNREADABLE = "check that it is a file, its owner and its mode"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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


def find_directory(name: str | Path, beside: Path | None = None) -> Path:
    """The directory that `name` means: a path, first from `beside`; one next to it; a hub's.

    Raises UsageError when there is none, or the hub cannot be reached and has no cached copy.
    """
    text = str(name)
    places = [Path(text).expanduser()]
    if beside is not None:
        places = [beside / text, *places, beside.resolve().parent / Path(text).name]
    for place in places:
        if _is_directory(place):
            return place
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


def _from_hub(name: str) -> Path:
    """Download, or find in the cache, a repository's weights, configuration and tokenizer."""
    import huggingface_hub

    wanted = ["*.json", "*.model", "*.safetensors", "*.bin"]
    try:
        files = [] if huggingface_hub.is_offline_mode() else huggingface_hub.list_repo_files(name)
        # Many repositories hold the same weights twice; mm_projector.bin and its like stay.
        twice = any(f.startswith("model") and f.endswith(".safetensors") for f in files)
        unwanted = ["pytorch_model*.bin", "*/*"] if twice else ["*/*"]
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=wanted, ignore_patterns=unwanted
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise UsageError(
            f"{name}: no such directory, and the hub gave nothing ({type(error).__name__}); "
            "download the model and pass its directory"
        ) from error
    return Path(found)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UsageError if it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {_UNREADABLE}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: holds a {type(value).__name__} instead of an object")
    return value


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
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {_UNREADABLE}") from error
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
