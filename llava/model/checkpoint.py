"""Load a LLaVA whatever wrote it (kinds: `sources.py`); save it so that everyone can load it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlavaConfig,
    PreTrainedModel,
)

from llava.errors import UsageError
from llava.images import ImageProcessor
from llava.tokens import Tokenizer, load_tokenizer

from . import lora
from .assemble import EMBEDDING
from .projector import build_llava
from .sources import (
    DEFAULTS,
    PROJECTOR_FILE,
    SETTINGS_FILE,
    TOKENIZER_FILES,
    Kind,
    Source,
    inspect,
    read,
    tokenizer_folder,
)
from .weights import (
    LANGUAGE,
    State,
    build,
    classic_name,
    find_directory,
    read_json,
    weight_files,
    write_json,
    writing,
)

__all__ = ["Kind", "Loaded", "fingerprint", "inspect", "load", "save"]

_PREPROCESSOR = "preprocessor_config.json"
# Of other vision-language models: how they spell a conversation, split text and count tiles.
_OF_PROCESSORS = (
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
_SHARD_SIZE = "5GB"


@dataclass
class Loaded:
    """A model ready to run, with everything that decides its inputs.

    Of a language model without vision, `image_processor` and `image_token_id` are None and
    `n_image_tokens` is 0.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    image_processor: ImageProcessor | None
    template_name: str
    image_token_id: int | None
    n_image_tokens: int
    """Positions an image takes in the sequence."""
    model_max_length: int
    """Positions after the image is expanded; longer samples are cut."""
    kind: Kind
    tokenizer_files: dict[str, bytes] = field(default_factory=dict, repr=False)


def load(
    path: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load the checkpoint at `path`: a directory or a hub name.

    Args:
        base: what a LoRA or a projector was trained on.
        dtype: of all parameters; None keeps that of the stored language model.

    The model is in evaluation mode. Raises UsageError (nothing loadable, base or tower missing,
    weights that do not fit), RefusedError (code in a file), StorageError (damaged file).
    """
    folder = find_directory(path)
    kind = inspect(folder)
    source = read(folder, kind, base)
    model = _build(source, dtype or source.state[EMBEDDING].dtype, folder).to(device)
    return wrap(model, kind, source.tokenizer_folders, source.image_folders, source.settings)


def wrap(
    model: PreTrainedModel,
    kind: Kind,
    tokenizer_folders: list[Path],
    image_folders: list[Path],
    settings: dict[str, Any] = DEFAULTS,
) -> Loaded:
    """`model` with tokenizer and image processor from the first folder that has them."""
    tokenizer = tokenizer_folder(tokenizer_folders)
    config = model.config
    loaded = Loaded(
        model=model,
        tokenizer=load_tokenizer(tokenizer),
        image_processor=None,
        template_name=settings["template"],
        image_token_id=None,
        n_image_tokens=0,
        model_max_length=fitting_length(model, settings["model_max_length"]),
        kind=kind,
        tokenizer_files=_read_files(tokenizer),
    )
    if isinstance(config, LlavaConfig):
        loaded.image_processor = _image_processor(config, image_folders, settings)
        loaded.image_token_id = config.image_token_id
        loaded.n_image_tokens = count_image_tokens(config)
    return loaded


def fitting_length(model: PreTrainedModel, length: int) -> int:
    """`length`, or the number of positions that the language model has if that is less."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if longest is None else min(length, longest)


def count_image_tokens(config: LlavaConfig) -> int:
    """Positions an image takes: its patches, and the class token if the strategy keeps it."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")


def _build(source: Source, dtype: torch.dtype, where: Path) -> PreTrainedModel:
    if isinstance(source.config, LlavaConfig):
        return build_llava(source.config, source.state, dtype, where)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]
    state = {name.replace(LANGUAGE, "model.", 1): t for name, t in source.state.items()}
    return build(cls, source.config, state, dtype, where)


def _read_files(folder: Path) -> dict[str, bytes]:
    paths = [folder / name for name in TOKENIZER_FILES]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _image_processor(
    config: LlavaConfig, folders: list[Path], settings: dict[str, Any]
) -> ImageProcessor:
    folder = next((f for f in folders if (f / _PREPROCESSOR).is_file()), None)
    if folder is None:
        places = " or ".join(str(folder) for folder in folders)
        raise UsageError(f"no {_PREPROCESSOR} in {places}; copy the vision tower's")
    processor = ImageProcessor.from_pretrained(folder, settings["image_aspect_ratio"])
    expected = config.vision_config.image_size
    if processor.size != expected:
        raise UsageError(
            f"{folder / _PREPROCESSOR}: makes images of {processor.size} pixels, "
            f"the vision tower takes {expected}"
        )
    return processor


def save(
    loaded: Loaded,
    path: str | Path,
    dtype: torch.dtype | None = None,
    state: State | None = None,
) -> None:
    """Write `loaded` as a llava-hf directory that this module and transformers 4.57 and 5 load.

    Weights, those of `state` if the model holds only a share of them, go under the classic
    llava-hf names, as `dtype` unless that is None; `config.json` comes last, so that a directory
    that was not finished is not taken for a model. Raises StorageError.
    """
    folder = Path(path)
    model = loaded.model
    state = model.state_dict() if state is None else state
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    if isinstance(model.config, LlavaConfig):
        state = {classic_name(name): tensor for name, tensor in state.items()}
        output = "language_model.lm_head.weight"
    else:
        output = "lm_head.weight"
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop(output)  # the embedding, once more
    write_state(state, folder)
    for name, content in loaded.tokenizer_files.items():
        with writing(folder / name) as temp:
            temp.write_bytes(content)
    if loaded.image_processor is not None:
        write_json(folder / _PREPROCESSOR, _preprocessor(loaded.image_processor))
    write_settings(loaded, folder)
    write_json(folder / "generation_config.json", _generation(model))
    write_json(folder / "config.json", _config(model, state))


def write_settings(loaded: Loaded, folder: Path) -> None:
    """Write llava.json: how samples are prepared for this model."""
    settings = {"template": loaded.template_name, "model_max_length": loaded.model_max_length}
    if loaded.image_processor is not None:
        settings["image_aspect_ratio"] = loaded.image_processor.aspect_ratio
    write_json(folder / SETTINGS_FILE, settings)


def write_state(state: State, folder: Path) -> None:
    """Write weights as safetensors, with an index when they take more than one file."""
    plan = split_torch_state_dict_into_shards(state, max_shard_size=_SHARD_SIZE)
    for name, tensors in plan.filename_to_tensors.items():
        with writing(folder / name) as temp:
            save_file({t: state[t] for t in tensors}, temp, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _config(model: PreTrainedModel, state: State) -> dict[str, Any]:
    """The configuration, with the rope base also where transformers before 5 looks for it."""
    values = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    text = values.get("text_config", values)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    for part in (values, text, values.get("vision_config", {})):
        part["dtype"] = max(dtypes)  # float32 where types are mixed
    rope = model.config.get_text_config().rope_parameters or {}
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
    return values


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


def fingerprint(path: str | Path, base: str | Path | None = None) -> str:
    """xxh3-128 over the contents of all files that decide what the model computes.

    Weights, configurations, tokenizer and preprocessing of the checkpoint, of its vision tower
    where that is elsewhere, and of `base`. Directory names do not count. Reads every byte.
    """
    folder = find_directory(path)
    digest = xxhash.xxh3_128()
    for part in _folders(folder, base):
        for file in _deciding_files(part):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        digest.update(b"\0")
    return digest.hexdigest()


def _folders(folder: Path, base: str | Path | None) -> list[Path]:
    folders = [folder]
    config = folder / "config.json"
    tower = read_json(config).get("mm_vision_tower") if config.is_file() else None
    if tower:
        folders.append(find_directory(tower, beside=folder))
    return folders if base is None else folders + _folders(find_directory(base), None)


def _deciding_files(folder: Path) -> list[Path]:
    extras = (
        "adapter_model.safetensors",
        "adapter_model.bin",
        lora.ADAPTER_CONFIG,
        lora.NON_LORA,
        PROJECTOR_FILE,
        SETTINGS_FILE,
        _PREPROCESSOR,
        "config.json",
        *TOKENIZER_FILES,
        *_OF_PROCESSORS,
    )
    files = {folder / name for name in extras if (folder / name).is_file()}
    return sorted(files.union(weight_files(folder)))
