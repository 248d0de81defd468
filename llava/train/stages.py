"""LLaVA's training stages: which model starts, which weights train, and what is written.

stage                        trains                        writes
---------------------------  ----------------------------  ------------------------------
text only (no vision tower)  the language model            the language model
--tune_mm_mlp_adapter        the projector                 mm_projector.bin + config.json
full fine-tuning             language model and projector  a llava-hf directory
--lora_enable                adapters and projector        LLaVA's LoRA directory

The vision tower is never trained.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import LlavaConfig, PreTrainedModel

from llava.errors import UsageError
from llava.images import ImageProcessor
from llava.model import lora
from llava.model.assemble import assemble, read_projector
from llava.model.checkpoint import Loaded, fitting_length, load, save, wrap, write_settings
from llava.model.sources import DEFAULTS, PROJECTOR_FILE, Kind, inspect
from llava.model.weights import (
    PROJECTOR,
    canonical,
    find_directory,
    read_tensors,
    read_weights,
    write_json,
    writing,
)

from .arguments import Arguments

TRAINABLE = "trainable.safetensors"
_FEATURES = {"patch": "default", "cls_patch": "full"}


def load_model(arguments: Arguments) -> Loaded:
    """The model that training starts from, with the samples' settings of the flags.

    In float32, or in the type of the computation when its language model stays frozen.
    """
    name = arguments.model.model_name_or_path
    folder = find_directory(name)
    kind = inspect(folder)
    if kind in (Kind.LLAVA_LORA, Kind.PROJECTOR_ONLY, Kind.HF_OTHER):
        raise UsageError(
            f"--model_name_or_path {name}: is {kind}; give a language model or a whole LLaVA"
        )
    if kind is Kind.LANGUAGE_MODEL and arguments.model.vision_tower:
        loaded = _assembled(arguments, folder)
    else:
        if arguments.model.vision_tower:
            print(f"--vision_tower is not used: {name} brings its own", file=sys.stderr)
        loaded = load(folder, dtype=_start_dtype(arguments))
        if arguments.model.pretrain_mm_mlp_adapter:
            _replace_projector(loaded, Path(arguments.model.pretrain_mm_mlp_adapter))
    _check_stage(arguments, loaded)
    loaded.template_name = arguments.model.version
    loaded.model_max_length = fitting_length(loaded.model, arguments.training.model_max_length)
    if loaded.image_processor is not None:
        old = loaded.image_processor
        loaded.image_processor = ImageProcessor(
            old.size, old.mean, old.std, arguments.data.image_aspect_ratio
        )
    return loaded


def _assembled(arguments: Arguments, folder: Path) -> Loaded:
    flags = arguments.model
    tower = find_directory(flags.vision_tower)
    model = assemble(
        folder,
        tower,
        flags.pretrain_mm_mlp_adapter,
        dtype=_start_dtype(arguments),
        generator=torch.Generator().manual_seed(arguments.training.seed),
        feature_layer=flags.mm_vision_select_layer,
        feature_strategy=_FEATURES[flags.mm_vision_select_feature],
    )
    return wrap(model, Kind.HF_LLAVA, [folder], [tower], DEFAULTS)


def _start_dtype(arguments: Arguments) -> torch.dtype:
    frozen = arguments.model.tune_mm_mlp_adapter or arguments.training.lora_enable
    return arguments.training.compute_dtype if frozen else torch.float32


def _replace_projector(loaded: Loaded, path: Path) -> None:
    if loaded.image_processor is None:
        raise UsageError("--pretrain_mm_mlp_adapter needs --vision_tower")
    state = {name.removeprefix(PROJECTOR): t for name, t in read_projector(path).items()}
    try:
        loaded.model.model.multi_modal_projector.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"{path}: a projector of another size than the model's") from error


def _check_stage(arguments: Arguments, loaded: Loaded) -> None:
    has_vision = loaded.image_processor is not None
    if arguments.model.tune_mm_mlp_adapter and not has_vision:
        raise UsageError("--tune_mm_mlp_adapter needs --vision_tower")
    if has_vision and arguments.data.image_folder is None:
        raise UsageError("--image_folder is required with a vision tower")


def prepare(arguments: Arguments, loaded: Loaded) -> PreTrainedModel | PeftModel:
    """`loaded.model` with the stage's weights trainable in float32 and all others frozen.

    Frozen weights are kept in the type they are computed in. With LoRA the result wraps the model.
    """
    model = loaded.model
    flags = arguments.training
    if flags.lora_enable:
        trained = lora.attach(
            model, rank=flags.lora_r, alpha=flags.lora_alpha, dropout=flags.lora_dropout
        )
    else:
        trained = model
        model.requires_grad_(not arguments.model.tune_mm_mlp_adapter)
    if isinstance(model.config, LlavaConfig):
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    for parameter in trained.parameters():
        dtype = torch.float32 if parameter.requires_grad else flags.compute_dtype
        parameter.data = parameter.data.to(dtype)
    return trained


class Exporter:
    """Writes the model of a run, and puts a checkpoint's weights back into it.

    `folder` is usable by `llava.model.checkpoint.load` whatever the stage. Trainable weights stay
    float32 in a `checkpoint-N`, so that resuming loses nothing.
    """

    def __init__(self, arguments: Arguments, loaded: Loaded, model: PreTrainedModel) -> None:
        self.arguments, self.loaded, self.model = arguments, loaded, model

    def final(self) -> None:
        """Write to the output directory, in the type of the computation."""
        self._write(Path(self.arguments.training.output_dir), self.arguments.training.compute_dtype)

    def checkpoint(self, folder: Path) -> None:
        """Write an intermediate model from which training can go on."""
        self._write(folder, None)
        if self._is_partial():
            with writing(folder / TRAINABLE) as temp:
                save_file(self._trainable(), temp)

    def restore(self, folder: Path) -> None:
        """Put back the trainable weights of a folder that `checkpoint` wrote."""
        if self._is_partial():
            state = read_tensors(folder / TRAINABLE)
        elif isinstance(self.model.config, LlavaConfig):
            state = canonical(read_weights(folder))
        else:
            state = read_weights(folder)
        missing = self._trainable().keys() - state.keys()
        if missing:
            raise UsageError(f"{folder}: of another kind of training; lacks {min(missing)}")
        self.model.load_state_dict(state, strict=False)

    def _is_partial(self) -> bool:
        return isinstance(self.model, PeftModel) or self.arguments.model.tune_mm_mlp_adapter

    def _trainable(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {k: p.detach().cpu().contiguous() for k, p in named if p.requires_grad}

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        if not self._is_partial():
            save(self.loaded, folder, dtype)
            return
        if isinstance(self.model, PeftModel):
            lora.save(self.model, folder, self.arguments.model.model_name_or_path)
        else:
            lora.save_projector(self._trainable(), folder / PROJECTOR_FILE)
        write_settings(self.loaded, folder)
        write_json(folder / "config.json", self._original_config(folder))

    def _original_config(self, folder: Path) -> dict[str, Any]:
        """LLaVA's config.json: the language model's, with LLaVA's own settings in it."""
        config = self.loaded.model.config
        text = config.get_text_config()
        values = {**text.to_diff_dict(), "vocab_size": self.loaded.tokenizer.vocab_size}
        if not isinstance(config, LlavaConfig):
            return values
        features = {v: k for k, v in _FEATURES.items()}
        values.update(
            model_type=f"llava_{text.model_type}",
            architectures=["LlavaLlamaForCausalLM"],
            mm_projector_type="mlp2x_gelu",
            mm_hidden_size=config.vision_config.hidden_size,
            mm_vision_select_layer=config.vision_feature_layer,
            mm_vision_select_feature=features[config.vision_feature_select_strategy],
            mm_use_im_start_end=False,
            mm_use_im_patch_token=False,
            use_mm_proj=True,
            tune_mm_mlp_adapter=self.arguments.model.tune_mm_mlp_adapter,
            image_aspect_ratio=self.loaded.image_processor.aspect_ratio,
            tokenizer_padding_side="right",
            tokenizer_model_max_length=self.loaded.model_max_length,
        )
        tower = self.arguments.model.vision_tower
        if tower:
            values["mm_vision_tower"] = _portable(tower, folder)
        return values


def _portable(tower: str, folder: Path) -> str:
    """The tower's path relative to `folder`, so that both can move together; hub names as is."""
    return os.path.relpath(tower, folder) if Path(tower).is_dir() else tower
