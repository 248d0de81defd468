"""Write models so that others load them: Hugging Face's LLaVA, original LLaVA, its projector.

layout       weights                                     config.json
-----------  ------------------------------------------  ------------------------------------------
llava-hf     classic names: transformers 4.57 and 5      LlavaForConditionalGeneration
original     LLaVA's names, the vision tower among them  the language model's with LLaVA's settings,
                                                         and the tower's under `vision_config`
projector    mm_projector.bin                            as original, without `vision_config`

Every file appears whole or not at all, config.json last, so that a directory that was not finished
is not taken for a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from llava.errors import UsageError
from llava.files import atomic_write, write_json, writing
from llava.images import ImageProcessor
from llava.model import lora
from llava.model.assemble import EMBEDDING, OUTPUT
from llava.model.projector import DEFAULT_TYPE, type_of
from llava.model.sources import FEATURES, PREPROCESSOR, PROJECTOR_FILE, SETTINGS_FILE
from llava.model.weights import PROJECTOR, State, classic_name, original_name

if TYPE_CHECKING:
    from llava.model.checkpoint import Loaded

CLIP_L_336 = "openai/clip-vit-large-patch14-336"
_CLIP_L_336 = {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}
_SHARD_SIZE = "5GB"
_OF_HUGGING_FACE = ["<image>", "<pad>"]
_NOT_MODEL = ("architectures", "quantization_config")

Weights = Mapping[str, torch.Tensor]


def save(
    loaded: Loaded,
    path: str | Path,
    dtype: torch.dtype | None = None,
    state: Weights | None = None,
) -> None:
    """Write `loaded` as a whole model: in the llava-hf layout, or as a language model.

    Weights, those of `state` if the model holds only a share of them, are written as `dtype`
    unless that is None. Hugging Face's LLaVA knows one type of projector: with another the
    original layout is written, all rows kept. Raises StorageError.
    """
    model = loaded.model
    state = model.state_dict() if state is None else state
    if isinstance(model.config, LlavaConfig) and type_of(model.config) != DEFAULT_TYPE:
        _write_original(loaded, Path(path), dtype, state, state)
        return
    rename = classic_name if isinstance(model.config, LlavaConfig) else str
    like = write_state(_untied(model, state), Path(path), dtype, rename)
    _write_inputs(loaded, Path(path))
    write_json(Path(path) / "config.json", _config(model, like))


def save_hf(loaded: Loaded, path: Path, dtype: torch.dtype | None, state: Weights) -> None:
    """As `save`, for Hugging Face's LLaVA and nothing else: other projectors are refused."""
    kind = type_of(loaded.model.config)
    if kind != DEFAULT_TYPE:
        raise UsageError(
            f"a projector of type {kind}: Hugging Face's LLaVA has {DEFAULT_TYPE} only; "
            "use --to original"
        )
    save(loaded, path, dtype, state)


def save_original(loaded: Loaded, path: Path, dtype: torch.dtype | None, state: Weights) -> None:
    """Write `loaded` as original LLaVA's full fine-tuning does, with the tokenizer's rows only."""
    base = dict(lora.unmerged(state))
    for name in (EMBEDDING, OUTPUT):
        if name in base:
            base[name] = base[name][: loaded.tokenizer.vocab_size]
    cut = state.on(base) if isinstance(state, lora.Merged) else base
    _write_original(loaded, path, dtype, cut, base)


def _write_original(
    loaded: Loaded, path: Path, dtype: torch.dtype | None, state: Weights, base: State
) -> None:
    model = loaded.model
    like = write_state(_untied(model, state), path, dtype, original_name)
    _write_inputs(loaded, path, _original_tokenizer(loaded.tokenizer_files))
    values = original_config(loaded, path, n_rows=base[EMBEDDING].shape[0])
    vision = model.config.vision_config.to_diff_dict()
    kind = max(_dtype_names(like))  # float32 where types are mixed
    values.update(vision_config=vision, dtype=kind, torch_dtype=kind)
    write_json(path / "config.json", values)


def save_projector(loaded: Loaded, path: Path, dtype: torch.dtype | None, state: Weights) -> None:
    """Write LLaVA's mm_projector.bin and config.json."""
    projector = {k: state[k].to(dtype=dtype) for k in state if k.startswith(PROJECTOR)}
    lora.save_projector(projector, path / PROJECTOR_FILE)
    write_settings(loaded, path)
    write_json(path / "config.json", original_config(loaded, path))


def original_config(loaded: Loaded, folder: Path, n_rows: int | None = None) -> dict[str, Any]:
    """LLaVA's config.json: the language model's, with LLaVA's own settings in it.

    `folder` is where it will stand, `n_rows` the vocabulary's rows if not the tokenizer's number.
    A vision tower whose name is not known is left out.
    """
    config = loaded.model.config
    text = config.get_text_config()
    values = {k: v for k, v in text.to_dict().items() if v is not None and k not in _NOT_MODEL}
    values.update(
        _rope(text),
        vocab_size=n_rows or loaded.tokenizer.vocab_size,
        pad_token_id=loaded.tokenizer.pad_id,
    )
    if not isinstance(config, LlavaConfig):
        return {**values, "architectures": [_class_of(text)]}

    # What LLaVA's own loader and trainer look for; those that say False are off in LLaVA-1.5.
    features = {v: k for k, v in FEATURES.items()}
    return {
        **values,
        "model_type": f"llava_{text.model_type}",
        "architectures": [f"Llava{_class_of(text)}"],
        **_tower(loaded, folder),
        "mm_projector_type": type_of(config),
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": loaded.image_processor.aspect_ratio,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": loaded.model_max_length,
    }


def _class_of(text: PreTrainedConfig) -> str:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__


def tower_name(loaded: Loaded) -> str | None:
    """What the vision tower is called: as recorded, or CLIP-L/336 by its shape; None if unknown."""
    if loaded.vision_tower is not None:
        return loaded.vision_tower
    vision = loaded.model.config.vision_config
    is_clip = all(getattr(vision, key) == value for key, value in _CLIP_L_336.items())
    return CLIP_L_336 if is_clip else None


def _tower(loaded: Loaded, folder: Path) -> dict[str, str]:
    """A directory as its path from `folder`, so that both can move together; hub names as is."""
    name = tower_name(loaded)
    if name is None:
        return {}
    return {"mm_vision_tower": os.path.relpath(name, folder) if Path(name).is_dir() else name}


def _untied(model: PreTrainedModel, state: Weights) -> Weights:
    """`state` without the output layer where that is the embedding once more."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return state
    kept = {name: tensor for name, tensor in lora.unmerged(state).items() if name != OUTPUT}
    return state.on(kept) if isinstance(state, lora.Merged) else kept


def write_state(
    state: Weights,
    folder: Path,
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str] = str,
) -> State:
    """Write weights as safetensors, with an index when they take more than one file.

    A tensor is asked for when its file is written, so that a merge needs the memory of one file.
    Returns the names, shapes and types of what was written, on the meta device.
    """
    names = {rename(name): name for name in state}
    unmerged = lora.unmerged(state)
    like = {
        name: torch.empty_like(unmerged[old], dtype=dtype, device="meta")
        for name, old in names.items()
    }
    plan = split_torch_state_dict_into_shards(like, max_shard_size=_SHARD_SIZE)
    for file, written in plan.filename_to_tensors.items():
        tensors = {n: state[names[n]].detach().to("cpu", dtype).contiguous() for n in written}
        with writing(folder / file) as temp:
            save_file(tensors, temp, metadata={"format": "pt"})
        del tensors  # before the next file's are made
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return like


def _original_tokenizer(files: dict[str, bytes]) -> dict[str, bytes]:
    """Tokenizer files without the words that Hugging Face adds, for which LLaVA has no rows."""
    if "tokenizer.model" not in files:
        return files
    kept = {}
    for name, content in files.items():
        if not any(f'"{word}"'.encode() in content for word in _OF_HUGGING_FACE):
            kept[name] = content
        elif name != "tokenizer.json":  # tokenizer.model has all that is in it
            kept[name] = json.dumps(_without_words(json.loads(content)), indent=2).encode()
    return kept


def _without_words(value: dict[str, Any]) -> dict[str, Any]:
    """`value` without entries that name or describe such a word; padding is <unk> again."""
    kept = {}
    for key, entry in value.items():
        word = entry.get("content") if isinstance(entry, dict) else entry
        if key == "pad_token" and word in _OF_HUGGING_FACE:
            kept[key] = "<unk>"
        elif key == "added_tokens_decoder":
            kept[key] = _without_words(entry)
        elif key not in _OF_HUGGING_FACE and word not in _OF_HUGGING_FACE:
            kept[key] = entry
    return {k: v for k, v in kept.items() if k not in ("extra_special_tokens", "processor_class")}


def _write_inputs(loaded: Loaded, folder: Path, tokenizer: dict[str, bytes] | None = None) -> None:
    """Write what turns samples into inputs, and the ids that end an answer."""
    for name, content in (tokenizer or loaded.tokenizer_files).items():
        atomic_write(folder / name, content)
    if loaded.image_processor is not None:
        write_json(folder / PREPROCESSOR, _preprocessor(loaded.image_processor))
    write_settings(loaded, folder)
    write_json(folder / "generation_config.json", _generation(loaded.model))


def write_settings(loaded: Loaded, folder: Path) -> None:
    """Write llava.json: how samples are prepared for this model."""
    settings = {"template": loaded.template_name, "model_max_length": loaded.model_max_length}
    if loaded.image_processor is not None:
        settings["image_aspect_ratio"] = loaded.image_processor.aspect_ratio
    write_json(folder / SETTINGS_FILE, settings)


def _config(model: PreTrainedModel, like: State) -> dict[str, Any]:
    """The configuration of transformers, readable by version 4 as well."""
    values = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    text = values.get("text_config", values)
    for part in (values, text, values.get("vision_config", {})):
        part["dtype"] = max(_dtype_names(like))  # float32 where types are mixed
    text.update(_rope(model.config.get_text_config()))
    return values


def _dtype_names(state: State) -> set[str]:
    return {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}


def _rope(text: PreTrainedConfig) -> dict[str, Any]:
    """Rope settings where transformers before 5 looks for them."""
    rope = dict(text.rope_parameters or {})
    base = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    kind = rope.pop("rope_type", "default")
    return base if kind == "default" else {**base, "rope_scaling": {"type": kind, **rope}}


def _preprocessor(processor: ImageProcessor) -> dict[str, Any]:
    side = processor.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }


def _generation(model: PreTrainedModel) -> dict[str, Any]:
    """Ids only: sampling settings that contradict each other stop transformers from saving."""
    text = model.config.get_text_config()
    ids = {key: getattr(text, key, None) for key in ("bos_token_id", "eos_token_id")}
    pad = model.config.pad_token_id
    return {k: v for k, v in {**ids, "pad_token_id": pad}.items() if v is not None}
