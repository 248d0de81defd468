"""Load a LLaVA whatever wrote it (kinds: `sources.py`); saving is `export.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlavaConfig, PreTrainedModel

from llava.errors import UsageError
from llava.images import ImageProcessor
from llava.model import lora
from llava.model.assemble import EMBEDDING
from llava.model.building import build, skeleton
from llava.model.projector import llava_class
from llava.model.sources import (
    DEFAULTS,
    PREPROCESSOR,
    PROJECTOR_FILE,
    SETTINGS_FILE,
    TOKENIZER_FILES,
    Kind,
    Source,
    inspect,
    preprocessor_folder,
    read,
    tokenizer_folder,
)
from llava.model.weights import LANGUAGE, State, find_directory, read_json, weight_files
from llava.tokens import Tokenizer, load_tokenizer

__all__ = ["Kind", "Loaded", "fingerprint", "inspect", "load"]

# Of other vision-language models: how they spell a conversation, split text and count tiles.
_OF_PROCESSORS = (
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


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
    vision_tower: str | None = None
    """Directory or hub name of the tower that a LLaVA was made with, where it is known."""
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
    cls, state = _class_and_state(source, folder)
    dtype = dtype or source.state[EMBEDDING].dtype
    model = build(cls, source.config, state, dtype, folder).to(device)
    return _wrapped(model, kind, source)


def outline(path: str | Path, base: str | Path | None = None) -> tuple[Loaded, Source]:
    """What `load` would give, but with its model on the meta device, and where the weights are.

    Files are mapped and only their names, types and shapes looked at. Raises as `load` does.
    """
    folder = find_directory(path)
    kind = inspect(folder)
    source = read(folder, kind, base)
    cls, state = _class_and_state(source, folder, shapes_only=True)
    return _wrapped(skeleton(cls, source.config, state, folder), kind, source), source


def _wrapped(model: PreTrainedModel, kind: Kind, source: Source) -> Loaded:
    loaded = wrap(model, kind, source.tokenizer_folders, source.image_folders, source.settings)
    loaded.vision_tower = source.vision_tower
    return loaded


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


def _class_and_state(
    source: Source, where: Path, shapes_only: bool = False
) -> tuple[type[PreTrainedModel], State]:
    """The class, and the weights under its names; unmerged ones if only their shapes count."""
    state = source.state
    if isinstance(state, lora.Merged):
        state = state.base if shapes_only else dict(state)
    if isinstance(source.config, LlavaConfig):
        return llava_class(source.config, state, where), state
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]
    return cls, {name.replace(LANGUAGE, "model.", 1): t for name, t in state.items()}


def _read_files(folder: Path) -> dict[str, bytes]:
    paths = [folder / name for name in TOKENIZER_FILES]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _image_processor(
    config: LlavaConfig, folders: list[Path], settings: dict[str, Any]
) -> ImageProcessor:
    folder = preprocessor_folder(folders)
    processor = ImageProcessor.from_pretrained(folder, settings["image_aspect_ratio"])
    expected = config.vision_config.image_size
    if processor.size != expected:
        raise UsageError(
            f"{folder / PREPROCESSOR}: makes images of {processor.size} pixels, "
            f"the vision tower takes {expected}; copy the tower's own"
        )
    return processor


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
    values = read_json(config) if config.is_file() else {}
    tower = values.get("mm_vision_tower")
    if tower and "vision_config" not in values:
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
        PREPROCESSOR,
        "config.json",
        *TOKENIZER_FILES,
        *_OF_PROCESSORS,
    )
    files = {folder / name for name in extras if (folder / name).is_file()}
    return sorted(files.union(weight_files(folder)))
