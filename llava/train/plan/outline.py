"""The model of a run without its weights: made of configurations, on PyTorch's meta device.

The directory needs no more than `config.json` and the tokenizer; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlavaConfig, PreTrainedConfig

from llava.errors import UsageError
from llava.model.assemble import empty, enough_rows, llava_config
from llava.model.checkpoint import Checkpoint, Loaded, fitting_length, wrap
from llava.model.sources import (
    ADAPTER_CONFIG,
    FEATURES,
    Kind,
    find_directory,
    is_original,
    make_config,
    original_text_config,
    read_vision_config,
    tokenizer_folder,
)
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


def load_outline(arguments: Arguments) -> Loaded:
    """What `stages.load_model` gives, with a model on the meta device and no image processor.

    Raises UsageError on a model that training could not start from.
    """
    flags = arguments.model
    checkpoint = Checkpoint.open(flags.model_name_or_path, download=False)
    folder, values = checkpoint.folder, checkpoint.values
    if not values or (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"--model_name_or_path {flags.model_name_or_path}: no config.json of a language model "
            "or a whole LLaVA"
        )

    # As training would put it together, from what no weights are needed for.
    if is_original(values):
        given = {"mm_projector_type": "linear", "mm_vision_select_feature": "patch", **values}
        text = original_text_config(folder, values)
        config = _with_tower(text, checkpoint.tower, folder, given)
    else:
        config = make_config(values, folder / "config.json")
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            if flags.vision_tower:
                tower = find_directory(flags.vision_tower, download=False)
                config = _with_tower(config, tower, folder, vars(flags))
        elif not isinstance(config, LlavaConfig):
            raise UsageError(
                f"{folder}: {config.model_type!r} is no language model and no LLaVA-1.5"
            )

    # As training would set it: the flags decide, whatever the checkpoint says.
    kind = Kind.HF_LLAVA if isinstance(config, LlavaConfig) else Kind.LANGUAGE_MODEL
    loaded = wrap(empty(config), kind, [folder], [])
    loaded.template_name = flags.version
    loaded.model_max_length = fitting_length(loaded.model, arguments.training.model_max_length)
    return loaded


def _with_tower(
    text: PreTrainedConfig, tower: Path, tokenizer: Path, given: Mapping[str, Any]
) -> LlavaConfig:
    """The LLaVA that training would assemble, with the settings `given` by flags or LLaVA."""
    vocab_size = load_tokenizer(tokenizer_folder([tokenizer])).vocab_size
    text.vocab_size = enough_rows(text.vocab_size, vocab_size + 2)
    strategy = FEATURES[given["mm_vision_select_feature"]]
    vision = read_vision_config(tower)
    config = llava_config(text, vision, vocab_size, feature_strategy=strategy)
    config.mm_projector_type = given["mm_projector_type"]
    return config


def outline(arguments: Arguments, loaded: Loaded) -> Outline:
    """Measure the model as the run would train it: with adapters, frozen where it freezes."""
    model = prepare(arguments, loaded)
    config = loaded.model.config

    # Every weight belongs to one part, by its name.
    text = config.get_text_config()
    n_heads = text.num_attention_heads
    parameters, trained = dict.fromkeys(_names(), 0), dict.fromkeys(_names(), 0)
    exported = 0
    for name, parameter in model.named_parameters():
        part, size = _part(name), parameter.numel()
        parameters[part] += size
        trained[part] += size * parameter.requires_grad
        exported += size * (parameter.requires_grad or part == "projector")

    # Layers are alike, so that the sizes of one say what the language model needs.
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
    matrices = dict.fromkeys(_names(), Matrices())
    for name, module in _linears(model):
        old, weight = matrices[_part(name)], module.weight
        trained = weight.numel() * weight.requires_grad
        matrices[_part(name)] = Matrices(old.all + weight.numel(), old.trained + trained)
    return matrices


def _quantised(arguments: Arguments, model: nn.Module) -> int:
    """--bits 4 or 8 stores the frozen linear maps of the language model's layers so."""
    if arguments.training.bits == 16:
        return 0
    linears = (m for name, m in _linears(model) if _part(name) == "language model")
    return sum(m.weight.numel() for m in linears)
