"""A model out of its parts: language model, CLIP vision tower and projector.

The image and padding ids come right after the tokenizer's. A language model without room for them
gets new rows, to a multiple of 64, in the embedding and the output layer; each new row is the mean
of the rows of real tokens, so that assembling is deterministic and no new id is ever likely. A
model is built with exactly the weights that it needs, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state

from llava.errors import UsageError
from llava.model.projector import (
    DEFAULT_TYPE,
    check_projector_size,
    class_of,
    fresh_projector,
    read_projector,
    type_in,
    type_of,
)
from llava.model.sources import (
    find_directory,
    quiet_transformers,
    read_language_model,
    read_vision_config,
    read_vision_state,
)
from llava.model.weights import LANGUAGE, PROJECTOR, TOWER, State
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
    vision_tower_dir = find_directory(vision_tower_dir)
    vision_config = read_vision_config(vision_tower_dir)
    if projector is None:
        generator = generator or torch.Generator().manual_seed(0)
        sizes = vision_config.hidden_size, text_config.hidden_size
        state = fresh_projector(*sizes, generator, projector_type or DEFAULT_TYPE)
    else:
        state = _stored_projector(Path(projector), projector_type)
        check_projector_size(state, vision_config, text_config, Path(projector))
    vision_state = read_vision_state(vision_tower_dir)
    parts = Parts(text_config, text_state, vision_config, vision_state, state)
    vocab_size = load_tokenizer(language_model_dir).vocab_size
    config, full = combine(parts, vocab_size, feature_layer, feature_strategy)
    return build(config, full, dtype, language_model_dir)


def _stored_projector(path: Path, expected: str | None) -> State:
    state = read_projector(path)
    kind = type_in(state, path)
    if expected not in (None, kind):
        raise UsageError(
            f"{path}: a projector of type {kind}, not {expected}; pass --mm_projector_type {kind}"
        )
    return state


def combine(
    parts: Parts, vocab_size: int, feature_layer: int = -2, feature_strategy: str = "default"
) -> tuple[LlavaConfig, State]:
    """Configuration and weights of the LLaVA that `parts` make.

    `vocab_size` is the tokenizer's: the image id is `vocab_size`, the padding id the next.
    """
    text_state = with_rows(parts.text_state, vocab_size, vocab_size + 2)
    parts.text_config.vocab_size = text_state[EMBEDDING].shape[0]
    config = llava_config(
        parts.text_config, parts.vision_config, vocab_size, feature_layer, feature_strategy
    )
    return config, {**text_state, **parts.vision_state, **parts.projector_state}


def llava_config(
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    vocab_size: int,
    feature_layer: int = -2,
    feature_strategy: str = "default",
) -> LlavaConfig:
    """Configuration of a LLaVA whose language model has rows for the image and padding ids."""
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=vocab_size,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=feature_strategy,
        pad_token_id=vocab_size + 1,
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
    )
    config.image_seq_length = count_image_tokens(config)
    return config


def count_image_tokens(config: LlavaConfig) -> int:
    """Positions an image takes: its patches, and the class token if the strategy keeps it."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")


def with_rows(state: State, n_tokens: int, needed: int) -> State:
    """`state` with at least `needed` rows in embedding and output layer.

    New rows are the float32 mean of the first `n_tokens` rows. A model that has room is returned
    as it is.
    """
    rows = state[EMBEDDING].shape[0]
    total = enough_rows(rows, needed)
    if total == rows:
        return state
    grown = dict(state)
    for name in (EMBEDDING, OUTPUT):
        if name in state:  # with tied embeddings there is no output layer
            old = state[name]
            mean = old[:n_tokens].float().mean(dim=0, keepdim=True).to(old.dtype)
            grown[name] = torch.cat([old, mean.expand(total - rows, -1)])
    return grown


def enough_rows(rows: int, needed: int) -> int:
    """`rows` if they are enough, else the multiple of ROW_MULTIPLE that holds `needed`."""
    return rows if rows >= needed else -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE


def split(state: State) -> tuple[State, State, State]:
    """Language model, vision tower and projector weights of a whole LLaVA."""
    tower = {k: v for k, v in state.items() if k.startswith(TOWER)}
    projector = {k: v for k, v in state.items() if k.startswith(PROJECTOR)}
    text = {k: v for k, v in state.items() if k not in tower and k not in projector}
    return text, tower, projector


def build(
    config: PreTrainedConfig, state: State, dtype: torch.dtype | None, where: object
) -> PreTrainedModel:
    """The model of `config` in evaluation mode with exactly the weights in `state`.

    `state` has canonical names; `dtype` None keeps that of the language model. The projector's type
    in it goes into `config`. Raises UsageError naming the weights when one is missing, left over or
    of another shape.
    """
    dtype = dtype or state[EMBEDDING].dtype
    if is_deepspeed_zero3_enabled():  # it shards while it builds, and checks nothing
        with set_zero3_state():
            skeleton(config, state, where)
    state = _named_as_built(config, state, where)
    cls = class_of(config)
    with quiet_transformers():
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with a remedy
        )
    _check_shapes(info["mismatched_keys"], where)
    _check_names(info["missing_keys"], info["unexpected_keys"], where)
    return model


def skeleton(config: PreTrainedConfig, state: State, where: object) -> PreTrainedModel:
    """The model that `build` would make, on the meta device: no weight is read.

    `state` gives names and shapes. Raises as `build` does.
    """
    state = _named_as_built(config, state, where)
    model = empty(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = expected.keys() - {name for name, _ in model.named_parameters()}
    shared = expected.keys() & state.keys()
    shapes = ((name, state[name].shape, expected[name]) for name in shared)
    _check_shapes([shape for shape in shapes if shape[1] != shape[2]], where)
    _check_names(expected.keys() - state.keys() - tied, state.keys() - expected.keys(), where)
    return model


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config` on the meta device, in evaluation mode."""
    with quiet_transformers(), torch.device("meta"):
        return class_of(config)(config).eval()


def _named_as_built(config: PreTrainedConfig, state: State, where: object) -> State:
    """`state` under the names in the model's class, which the projector in it decides."""
    if not isinstance(config, LlavaConfig):
        return {name.replace(LANGUAGE, "model.", 1): t for name, t in state.items()}
    kind = type_in(state, where)
    if kind != type_of(config):
        config.mm_projector_type = kind
    return state


def _check_shapes(mismatched: Iterable[tuple], where: object) -> None:
    for name, shape, expected in sorted(mismatched):
        remedy = "config.json and weights do not belong together"
        if name.startswith(PROJECTOR):
            remedy = "this projector belongs to another language model or vision tower"
        raise UsageError(
            f"{where}: {name} has shape {tuple(shape)}, the model needs {tuple(expected)}; {remedy}"
        )


def _check_names(missing: Iterable[str], unexpected: Iterable[str], where: object) -> None:
    for problem, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(
                f"{where}: {problem} weights: {', '.join(names[:3])}{more}; copy the checkpoint "
                "again, or its config.json is of another model"
            )
