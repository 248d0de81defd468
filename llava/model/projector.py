"""The projector between vision tower and language model: LLaVA's `mm_projector_type`.

type        layers                                   names in LLaVA's files   names here
----------  ---------------------------------------  -----------------------  --------------------
linear      one linear map                           weight                   weight
mlpNx_gelu  N linear maps with exact GELU between    0.weight, 2.weight, ...  linear_1.weight, ...

Hugging Face's LLaVA is `mlp2x_gelu`, LLaVA-1.5's own, and nothing else. `LlavaWithProjector` is the
same model with any other; which one, its configuration says in `mm_projector_type`, and the names
of the weights say it too: that is how a checkpoint's type is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from llava.errors import UsageError
from llava.model.weights import PROJECTOR, State, canonical_name, read_tensors

DEFAULT_TYPE = "mlp2x_gelu"


def layer_prefixes(kind: str) -> list[str]:
    """What the names of each linear map of a projector begin with, in order.

    Raises UsageError on a type that is not `linear` or `mlpNx_gelu`.
    """
    if kind == "linear":
        return [""]
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if not match:
        raise UsageError(
            f"mm_projector_type {kind}: not supported; choose linear or mlpNx_gelu, for example "
            f"{DEFAULT_TYPE}"
        )
    return [f"linear_{number + 1}." for number in range(int(match[1]))]


def type_of(config: LlavaConfig) -> str:
    """The projector's type of a model with this configuration."""
    return getattr(config, "mm_projector_type", DEFAULT_TYPE)


def type_in(state: Iterable[str], where: Path) -> str:
    """The type of the projector in `state`, by its names; UsageError if there is no whole one."""
    weights = {name.removeprefix(PROJECTOR) for name in state if name.startswith(PROJECTOR)}
    n_layers = len([name for name in weights if name.endswith("weight")])
    kind = "linear" if "weight" in weights else f"mlp{max(n_layers, 1)}x_gelu"
    if weights != {prefix + part for prefix in layer_prefixes(kind) for part in ("weight", "bias")}:
        raise UsageError(
            f"{where}: no projector of type linear or mlpNx_gelu (mm_projector_type); weights of "
            f"one in it: {', '.join(sorted(weights)) or 'none'}"
        )
    return kind


class Projector(nn.Module):
    """Linear maps with exact GELU between them: (..., vision_size) -> (..., text_size)."""

    def __init__(self, n_layers: int, vision_size: int, text_size: int) -> None:
        super().__init__()
        for number in range(n_layers):
            inputs = text_size if number else vision_size
            self.add_module(f"linear_{number + 1}", nn.Linear(inputs, text_size))

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.children()):
            image_features = layer(F.gelu(image_features) if number else image_features)
        return image_features


class LlavaWithProjector(LlavaForConditionalGeneration):
    """LLaVA with the projector that `config.mm_projector_type` names."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        sizes = config.vision_config.hidden_size, config.text_config.hidden_size
        kind = type_of(config)
        n_layers = len(layer_prefixes(kind))
        self.model.multi_modal_projector = (
            nn.Linear(*sizes) if kind == "linear" else Projector(n_layers, *sizes)
        )
        self.post_init()


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Hugging Face's class of a LLaVA or a language model; ours for a projector it lacks."""
    if not isinstance(config, LlavaConfig):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return LlavaForConditionalGeneration if type_of(config) == DEFAULT_TYPE else LlavaWithProjector


def read_projector(path: Path) -> State:
    """The projector's weights: `mm_projector.bin` with any prefix, or safetensors.

    Raises UsageError if it is of no known type.
    """
    state = {}
    for name, tensor in read_tensors(path).items():
        for marker in ("mm_projector.", "multi_modal_projector."):
            if marker in name:
                state[canonical_name(marker + name.split(marker, 1)[1])] = tensor
                break
    type_in(state, path)
    return state


def check_projector_size(
    state: State, vision: PreTrainedConfig, text: PreTrainedConfig, where: Path
) -> None:
    """Raise UsageError unless the projector leads from the tower to the language model."""
    first = layer_prefixes(type_in(state, where))[0]
    shape = tuple(state[f"{PROJECTOR}{first}weight"].shape)
    if shape != (text.hidden_size, vision.hidden_size):
        raise UsageError(
            f"{where}: projects {shape[-1]} features to {shape[0]}, but the vision tower gives "
            f"{vision.hidden_size} and the language model takes {text.hidden_size}; it belongs "
            "to another language model or vision tower"
        )


def fresh_projector(
    vision_size: int, text_size: int, generator: torch.Generator, kind: str = DEFAULT_TYPE
) -> State:
    """Linear layers drawn uniformly from +-1/sqrt(inputs), PyTorch's own initialisation."""
    state = {}
    for number, prefix in enumerate(layer_prefixes(kind)):
        inputs = text_size if number else vision_size
        for part, shape in (("weight", (text_size, inputs)), ("bias", (text_size,))):
            drawn = torch.rand(shape, generator=generator)
            state[f"{PROJECTOR}{prefix}{part}"] = (2 * drawn - 1) * inputs**-0.5
    return state


def with_projector(state: State, projector: State) -> State:
    """`state` with `projector` in place of its own, whatever the types of the two."""
    return {k: v for k, v in state.items() if not k.startswith(PROJECTOR)} | projector
