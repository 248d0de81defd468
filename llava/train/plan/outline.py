"""The model of a run without its weights: made of configurations, on PyTorch's meta device.

The directory needs no more than `config.json` and the tokenizer; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from llava.errors import UsageError
from llava.model import lora
from llava.model.assemble import EMBEDDING, OUTPUT, Parts, combine, read_vision_config
from llava.model.checkpoint import Kind, Loaded, count_image_tokens, fitting_length
from llava.model.projector import DEFAULT_TYPE, LlavaWithProjector, type_of
from llava.model.sources import FEATURES, is_original, original_text_config, tokenizer_folder
from llava.model.weights import State, make_config, quiet_transformers, read_json
from llava.tokens import load_tokenizer
from llava.train.arguments import Arguments
from llava.train.stages import prepare

_PARTS = (  # of a name in the model, first match wins
    ("lora_", "adapters"),
    ("vision_tower.", "vision tower"),
    ("multi_modal_projector.", "projector"),
    ("lm_head.", "output layer"),
    ("", "language model"),
)


@dataclass(frozen=True)
class Matrices:
    """Numbers of weights in the linear maps of one part: they decide its FLOPs."""

    all: int = 0
    trained: int = 0


@dataclass(frozen=True)
class Tower:
    """Sizes of a CLIP vision tower."""

    hidden: int
    n_layers: int
    n_positions: int
    """Patches and the class token."""
    patch_weights: int
    """Of the convolution that embeds a patch."""


@dataclass(frozen=True)
class Outline:
    """Sizes of a model that is about to be trained."""

    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    head_dim: int
    vocabulary: int
    """Rows of the output layer."""
    tower: Tower | None
    n_image_tokens: int
    parameters: dict[str, int]
    """By part."""
    trained: dict[str, int]
    """Trainable ones by part."""
    exported: int
    """Parameters in the files of a run that does not write the whole model."""
    quantised: int
    """Parameters that --bits 4 or 8 stores in fewer bits."""
    matrices: dict[str, Matrices]
    adapted: tuple[int, int]
    """Sums over the adapted linear maps of one layer: of their inputs, of their ranks."""

    @property
    def n_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def n_trained(self) -> int:
        return sum(self.trained.values())

    @property
    def n_frozen(self) -> int:
        return self.n_parameters - self.n_trained

    @property
    def trains_language_model(self) -> bool:
        return self.trained["language model"] > 0


def locate(name: str, beside: Path | None = None) -> Path:
    """The directory that `name` means; a hub's name must be in the local cache.

    Raises UsageError, with how to get what a plan needs, if there is none.
    """
    places = [Path(name).expanduser()]
    if beside is not None:
        places += [beside / name, beside.resolve().parent / Path(name).name]
    for place in places:
        if place.is_dir():
            return place
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name}: neither a directory nor a model in the hub's cache, and a plan downloads "
            "nothing; its config.json and tokenizer files are enough"
        ) from error


def load_outline(arguments: Arguments) -> Loaded:
    """What `stages.load_model` gives, with a model on the meta device and no image processor.

    Raises UsageError on a model that training could not start from.
    """
    name = arguments.model.model_name_or_path
    folder = locate(name)
    if not (folder / "config.json").is_file() or (folder / lora.ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"--model_name_or_path {name}: no config.json of a language model or a whole LLaVA"
        )
    tokenizer = load_tokenizer(tokenizer_folder([folder]))
    config = _config(arguments, folder, tokenizer.vocab_size)
    model = _on_meta(config)
    sees = isinstance(config, LlavaConfig)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        image_processor=None,
        template_name=arguments.model.version,
        image_token_id=config.image_token_id if sees else None,
        n_image_tokens=count_image_tokens(config) if sees else 0,
        model_max_length=fitting_length(model, arguments.training.model_max_length),
        kind=Kind.HF_LLAVA if sees else Kind.LANGUAGE_MODEL,
    )


def _config(arguments: Arguments, folder: Path, vocab_size: int) -> PreTrainedConfig:
    """The configuration of the model that training would build."""
    path, flags = folder / "config.json", arguments.model
    values = read_json(path)
    if is_original(values):
        settings = {"mm_projector_type": "linear", "mm_vision_select_feature": "patch", **values}
        tower = locate(settings["mm_vision_tower"], beside=folder)
        text = original_text_config(folder, values)
        return _combined(text, tower, vocab_size, settings)
    config = make_config(values, path)
    if isinstance(config, LlavaConfig):
        return config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{folder}: {config.model_type!r} is no language model and no LLaVA-1.5")
    if not flags.vision_tower:
        return config
    settings = vars(flags)
    return _combined(config, locate(flags.vision_tower), vocab_size, settings)


def _combined(
    text: PreTrainedConfig, tower: Path, vocab_size: int, settings: dict[str, Any]
) -> LlavaConfig:
    rows = torch.empty(text.vocab_size, text.hidden_size, device="meta")
    names = [EMBEDDING] if text.tie_word_embeddings else [EMBEDDING, OUTPUT]
    state: State = {name: rows for name in names}
    parts = Parts(text, state, read_vision_config(tower), {}, {})
    strategy = FEATURES[settings["mm_vision_select_feature"]]
    config, _ = combine(parts, vocab_size, feature_strategy=strategy)
    if settings["mm_projector_type"] != DEFAULT_TYPE:
        config.mm_projector_type = settings["mm_projector_type"]
    return config


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    if not isinstance(config, LlavaConfig):
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    elif type_of(config) == DEFAULT_TYPE:
        cls = LlavaForConditionalGeneration
    else:
        cls = LlavaWithProjector
    with torch.device("meta"), quiet_transformers():
        return cls(config)


def outline(arguments: Arguments, loaded: Loaded) -> Outline:
    """Measure the model as the run would train it: with adapters, frozen where it freezes."""
    model = prepare(arguments, loaded)
    config = loaded.model.config
    text = config.get_text_config()
    n_heads = text.num_attention_heads
    parameters, trained = dict.fromkeys(_names(), 0), dict.fromkeys(_names(), 0)
    exported = 0
    for name, parameter in model.named_parameters():
        part, size = _part(name), parameter.numel()
        parameters[part] += size
        trained[part] += size * parameter.requires_grad
        exported += size * (parameter.requires_grad or part == "projector")
    inside = [m for name, m in _linears(model) if _part(name) == "adapters" and "lora_A" in name]
    n_layers = text.num_hidden_layers
    return Outline(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        n_layers=n_layers,
        n_heads=n_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // n_heads,
        vocabulary=text.vocab_size,
        tower=_tower(config),
        n_image_tokens=loaded.n_image_tokens,
        parameters=parameters,
        trained=trained,
        exported=exported,
        quantised=_quantised(arguments, model),
        matrices=_matrices(model),
        adapted=(
            sum(m.in_features for m in inside) // n_layers,
            sum(m.out_features for m in inside) // n_layers,
        ),
    )


def _names() -> list[str]:
    return [part for _, part in _PARTS]


def _part(name: str) -> str:
    return next(part for marker, part in _PARTS if marker in name)


def _tower(config: PreTrainedConfig) -> Tower | None:
    if not isinstance(config, LlavaConfig):
        return None
    vision = config.vision_config
    n_patches = (vision.image_size // vision.patch_size) ** 2
    weights = vision.num_channels * vision.patch_size**2 * vision.hidden_size
    return Tower(vision.hidden_size, vision.num_hidden_layers, n_patches + 1, weights)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((n + ".", m) for n, m in model.named_modules() if isinstance(m, nn.Linear))


def _matrices(model: nn.Module) -> dict[str, Matrices]:
    found = dict.fromkeys(_names(), Matrices())
    for name, module in _linears(model):
        old, weight = found[_part(name)], module.weight
        trained = weight.numel() * weight.requires_grad
        found[_part(name)] = Matrices(old.all + weight.numel(), old.trained + trained)
    return found


def _quantised(arguments: Arguments, model: nn.Module) -> int:
    """--bits 4 or 8 stores the frozen linear maps of the language model's layers so."""
    if arguments.training.bits == 16:
        return 0
    linears = (m for name, m in _linears(model) if _part(name) == "language model")
    return sum(m.weight.numel() for m in linears)
