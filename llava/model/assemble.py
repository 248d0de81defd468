"""A LLaVA out of its parts: language model, CLIP vision tower and projector.

The image and padding ids come right after the tokenizer's. A language model without room for them
gets new rows, to a multiple of 64, in the embedding and the output layer; each new row is the mean
of the rows of real tokens, so that assembling is deterministic and no new id is ever likely.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from llava.errors import UsageError
from llava.model.building import build
from llava.model.projector import (
    DEFAULT_TYPE,
    check_projector_size,
    fresh_projector,
    llava_class,
    read_projector,
    type_in,
)
from llava.model.weights import (
    LANGUAGE,
    PROJECTOR,
    TOWER,
    State,
    canonical,
    find_directory,
    make_config,
    read_json,
    read_weights,
)
from llava.tokens import load_tokenizer

EMBEDDING = LANGUAGE + "embed_tokens.weight"
OUTPUT = "lm_head.weight"
ROW_MULTIPLE = 64  # matrix kernels like it, and llava-hf checkpoints have it


@dataclass
class Parts:
    """What a LLaVA is made of, read but not yet built; weights under canonical names."""

    text_config: PreTrainedConfig
    text_state: State
    vision_config: PreTrainedConfig
    vision_state: State
    projector_state: State


def assemble(
    language_model_dir: str | Path,
    vision_tower_dir: str | Path,
    projector: str | Path | None = None,
    *,
    projector_type: str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    feature_layer: int = -2,
    feature_strategy: str = "default",
) -> LlavaForConditionalGeneration:
    """Put a LLaVA together.

    Args:
        language_model_dir: a causal language model with its tokenizer; directory or hub name.
        vision_tower_dir: a CLIPVisionModel or a full CLIPModel.
        projector: `mm_projector.bin` of LLaVA, or safetensors; None draws fresh weights, from
            `generator` or, if that is None, from seed 0.
        projector_type: LLaVA's mm_projector_type, `linear` or `mlpNx_gelu`; None takes the one
            in `projector`, or LLaVA-1.5's `mlp2x_gelu` for a fresh one.
        dtype: of all parameters; None keeps the language model's.
        feature_layer: index of the vision tower's hidden state that the projector reads.
        feature_strategy: "default" leaves the class token out, "full" keeps it.

    Raises UsageError on parts that do not fit each other.
    """
    language_model_dir = find_directory(language_model_dir)
    text_config, text_state = read_language_model(language_model_dir)
    vision_config, vision_state = read_vision_tower(find_directory(vision_tower_dir))
    if projector is None:
        generator = generator or torch.Generator().manual_seed(0)
        sizes = vision_config.hidden_size, text_config.hidden_size
        state = fresh_projector(*sizes, generator, projector_type or DEFAULT_TYPE)
    else:
        state = _stored_projector(Path(projector), projector_type)
        check_projector_size(state, vision_config, text_config, Path(projector))
    parts = Parts(text_config, text_state, vision_config, vision_state, state)
    vocab_size = load_tokenizer(language_model_dir).vocab_size
    config, full = combine(parts, vocab_size, feature_layer, feature_strategy)
    dtype = dtype or full[EMBEDDING].dtype
    cls = llava_class(config, full, language_model_dir)
    return build(cls, config, full, dtype, language_model_dir)


def _stored_projector(path: Path, wanted: str | None) -> State:
    state = read_projector(path)
    found = type_in(state, path)
    if wanted not in (None, found):
        raise UsageError(
            f"{path}: a projector of type {found}, not {wanted}; pass --mm_projector_type {found}"
        )
    return state


def read_language_model(folder: Path) -> tuple[PreTrainedConfig, State]:
    """Configuration and weights of a causal language model."""
    path = folder / "config.json"
    config = make_config(read_json(path), path)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{folder}: {config.model_type!r} is no causal language model")
    return config, canonical(read_weights(folder))


def read_vision_config(folder: Path) -> PreTrainedConfig:
    """Configuration of the vision half of a CLIPVisionModel or CLIPModel directory."""
    path = folder / "config.json"
    values = read_json(path)
    config = make_config(values, path)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise UsageError(f"{folder}: {config.model_type!r} is no CLIP vision tower")
    return config


def read_vision_tower(folder: Path) -> tuple[PreTrainedConfig, State]:
    """Configuration and weights of a CLIP vision tower; text half and projections are left out."""
    state = {}
    for name, tensor in read_weights(folder).items():
        bare = name.removeprefix("vision_model.")
        if bare.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")):
            state[f"vision_tower.{bare}"] = tensor
    return read_vision_config(folder), canonical(state)


def combine(
    parts: Parts, vocab_size: int, feature_layer: int = -2, feature_strategy: str = "default"
) -> tuple[LlavaConfig, State]:
    """Configuration and weights of the LLaVA that `parts` make.

    `vocab_size` is the tokenizer's: the image id is `vocab_size`, the padding id the next.
    """
    text_config = parts.text_config
    text_state = with_rows(parts.text_state, vocab_size, vocab_size + 2)
    text_config.vocab_size = text_state[EMBEDDING].shape[0]
    patches = (parts.vision_config.image_size // parts.vision_config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=parts.vision_config,
        text_config=text_config,
        image_token_index=vocab_size,
        image_seq_length=patches + (feature_strategy == "full"),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=feature_strategy,
        pad_token_id=vocab_size + 1,
        **_generation_ids(text_config),
    )
    return config, {**text_state, **parts.vision_state, **parts.projector_state}


def _generation_ids(text_config: PreTrainedConfig) -> dict[str, Any]:
    return {key: getattr(text_config, key) for key in ("bos_token_id", "eos_token_id")}


def with_rows(state: State, n_tokens: int, needed: int) -> State:
    """`state` with at least `needed` rows in embedding and output layer.

    New rows are the float32 mean of the first `n_tokens` rows; their number makes the total a
    multiple of ROW_MULTIPLE. A model that has room is returned as it is.
    """
    rows = state[EMBEDDING].shape[0]
    if rows >= needed:
        return state
    total = -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE
    grown = dict(state)
    for name in (EMBEDDING, OUTPUT):
        if name in state:  # with tied embeddings there is no output layer
            old = state[name]
            mean = old[:n_tokens].float().mean(dim=0, keepdim=True).to(old.dtype)
            grown[name] = torch.cat([old, mean.expand(total - rows, -1)])
    return grown


def split(state: State) -> tuple[State, State, State]:
    """Language model, vision tower and projector weights of a whole LLaVA."""
    tower = {k: v for k, v in state.items() if k.startswith(TOWER)}
    projector = {k: v for k, v in state.items() if k.startswith(PROJECTOR)}
    text = {k: v for k, v in state.items() if k not in tower and k not in projector}
    return text, tower, projector
