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

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import LlavaConfig, PreTrainedModel

from llava.errors import UsageError
from llava.files import write_json, writing
from llava.images import ImageProcessor
from llava.model import lora
from llava.model.assemble import assemble
from llava.model.checkpoint import Checkpoint, Loaded, fitting_length, wrap
from llava.model.export import original_config, save, write_settings
from llava.model.projector import read_projector
from llava.model.sources import FEATURES, PROJECTOR_FILE, Kind, find_directory, read_weights
from llava.model.weights import PROJECTOR, State, canonical, read_tensors
from llava.train import quantize, zero
from llava.train.arguments import Arguments

TRAINABLE = "trainable.safetensors"


def load_model(arguments: Arguments) -> Loaded:
    """The model that training starts from, with the samples' settings of the flags.

    In float32, or in the type of the computation when its language model stays frozen or DeepSpeed
    keeps the float32 copy. With ZeRO-3, after `zero.start`, each process holds its share of weights
    that the first reads.
    """
    # A language model gets a tower and a projector; a LLaVA brings its own.
    name = arguments.model.model_name_or_path
    checkpoint = Checkpoint.open(name)
    if checkpoint.kind in (Kind.LLAVA_LORA, Kind.PROJECTOR_ONLY, Kind.HF_OTHER):
        raise UsageError(
            f"--model_name_or_path {name}: is {checkpoint.kind}; "
            "give a language model or a whole LLaVA"
        )
    if checkpoint.kind is Kind.LANGUAGE_MODEL and arguments.model.vision_tower:
        loaded = _assembled(arguments, checkpoint.folder)
    else:
        if arguments.model.vision_tower and arguments.training.should_save:
            print(f"--vision_tower is not used: {name} brings its own", file=sys.stderr)
        loaded = checkpoint.load(_start_dtype(arguments))
        if arguments.model.pretrain_mm_mlp_adapter:
            _replace_projector(loaded, Path(arguments.model.pretrain_mm_mlp_adapter))

    # From here on the flags decide, not what the checkpoint was made with.
    has_vision = loaded.image_processor is not None
    if arguments.model.tune_mm_mlp_adapter and not has_vision:
        raise UsageError("--tune_mm_mlp_adapter needs --vision_tower")
    if has_vision and arguments.data.image_folder is None:
        raise UsageError("--image_folder is required with a vision tower")
    _set_attention(loaded.model, arguments.model.attn_implementation)
    loaded.template_name = arguments.model.version
    loaded.model_max_length = fitting_length(loaded.model, arguments.training.model_max_length)
    if has_vision:
        old = loaded.image_processor
        loaded.image_processor = ImageProcessor(
            old.size, old.mean, old.std, arguments.data.image_aspect_ratio
        )
    quantize.quantise(loaded.model, arguments.training)
    return loaded


def _set_attention(model: PreTrainedModel, implementation: str | None) -> None:
    if implementation is None:
        return
    try:
        model.set_attn_implementation(implementation)  # of the vision tower too
    except (ImportError, ValueError) as error:
        reason = str(error).split(". ")[0]
        raise UsageError(
            f"--attn_implementation {implementation}: {reason}; sdpa needs no package"
        ) from error


def _assembled(arguments: Arguments, folder: Path) -> Loaded:
    flags = arguments.model
    tower = find_directory(flags.vision_tower)
    model = assemble(
        folder,
        tower,
        flags.pretrain_mm_mlp_adapter,
        projector_type=flags.mm_projector_type,
        dtype=_start_dtype(arguments),
        generator=torch.Generator().manual_seed(arguments.training.seed),
        feature_layer=flags.mm_vision_select_layer,
        feature_strategy=FEATURES[flags.mm_vision_select_feature],
    )
    loaded = wrap(model, Kind.HF_LLAVA, [folder], [tower])
    loaded.vision_tower = flags.vision_tower
    return loaded


def _start_dtype(arguments: Arguments) -> torch.dtype:
    flags = arguments.training
    frozen = arguments.model.tune_mm_mlp_adapter or flags.lora_enable
    return flags.compute_dtype if frozen or zero.enabled(flags) else torch.float32


def _replace_projector(loaded: Loaded, path: Path) -> None:
    if loaded.image_processor is None:
        raise UsageError("--pretrain_mm_mlp_adapter needs --vision_tower")
    projector = loaded.model.model.multi_modal_projector
    state = {name.removeprefix(PROJECTOR): t for name, t in read_projector(path).items()}
    expected = {name: zero.whole_shape(p) for name, p in projector.named_parameters()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        raise UsageError(
            f"--pretrain_mm_mlp_adapter {path}: a projector of another size or type than the "
            "model's; leave the flag out, or start from the projector's language model"
        )
    with zero.gathered(projector.parameters(), rewrite=True):
        projector.load_state_dict(state)


def prepare(arguments: Arguments, loaded: Loaded) -> PreTrainedModel | PeftModel:
    """`loaded.model` with the stage's weights trainable in float32 and all others frozen.

    Frozen weights are kept in the type they are computed in, and with DeepSpeed all are: it keeps
    its own float32 copy of those it trains. With LoRA the result wraps the model. Raises UsageError
    if the flags freeze everything.
    """
    model = loaded.model
    flags = arguments.training

    # Which weights train: adapters, the projector alone, or all that `_freeze` leaves.
    if flags.lora_enable:
        torch.manual_seed(flags.seed)  # adapters start alike however the model was built
        trained = lora.attach(
            model,
            rank=flags.lora_r,
            alpha=flags.lora_alpha,
            dropout=flags.lora_dropout,
            bias=flags.lora_bias,
        )
    else:
        trained = model
        model.requires_grad_(not arguments.model.tune_mm_mlp_adapter)
    _freeze(arguments, model)
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise UsageError("the flags freeze every weight; drop one of --freeze_...")

    # In which type each is held.
    for parameter in trained.parameters():
        if not zero.is_shard(parameter) and parameter.is_floating_point():  # not quantised
            full = parameter.requires_grad and not zero.enabled(flags)
            parameter.data = parameter.data.to(torch.float32 if full else flags.compute_dtype)
    quantize.widen_norms(model, flags)
    return trained


def _freeze(arguments: Arguments, model: PreTrainedModel) -> None:
    """What the stages' table says of tower and projector, and LLaVA's own --freeze_ flags."""
    if arguments.model.freeze_backbone and not arguments.training.lora_enable:
        model.get_decoder().requires_grad_(False)  # as in LLaVA, the output layer still trains
    if isinstance(model.config, LlavaConfig):
        tower = model.model.vision_tower
        tower.requires_grad_(False)
        # Gradient checkpointing asks the output of every embedding for a gradient, this one's too:
        # the tower would be run a second time and backwards, for nothing.
        tower.forward = torch.no_grad()(tower.forward)
        projector = not arguments.training.freeze_mm_mlp_adapter
        model.model.multi_modal_projector.requires_grad_(projector)


class Exporter:
    """Writes the model of a run, and puts a checkpoint's weights back into it.

    Every method is to be called by all processes: weights that are sharded are gathered, and the
    main process writes. `folder` can be opened by `llava.model.checkpoint` whatever the stage.
    Trainable weights stay float32 in a `checkpoint-N`, so that resuming loses nothing; DeepSpeed
    resumes from the state that it puts into the same folder by itself.
    """

    def __init__(self, arguments: Arguments, loaded: Loaded, model: PreTrainedModel) -> None:
        self.arguments, self.loaded, self.model = arguments, loaded, model

    def final(self) -> None:
        """Write to the output directory, in the type of the computation."""
        self._write(Path(self.arguments.training.output_dir), self.arguments.training.compute_dtype)

    def checkpoint(self, folder: Path) -> None:
        """Write an intermediate model from which training can go on."""
        self._write(folder, None)
        flags = self.arguments.training
        if self._is_partial() and not zero.enabled(flags) and flags.should_save:
            with writing(folder / TRAINABLE) as temp:
                save_file(self._collect(self._trainable()), temp)

    def restore(self, folder: Path) -> None:
        """Put back the trainable weights of a folder that `checkpoint` wrote, without DeepSpeed."""
        if self._is_partial():
            state = read_tensors(folder / TRAINABLE)
        elif isinstance(self.model.config, LlavaConfig):
            state = canonical(read_weights(folder))
        else:
            state = read_weights(folder)
        missing = set(self._trainable()) - state.keys()
        if missing:
            raise UsageError(f"{folder}: of another kind of training; lacks {min(missing)}")
        self.model.load_state_dict(state, strict=False)

    def _is_partial(self) -> bool:
        return isinstance(self.model, PeftModel) or self.arguments.model.tune_mm_mlp_adapter

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _collect(
        self, named: dict[str, torch.nn.Parameter], dtype: torch.dtype | None = None
    ) -> State:
        """Whole tensors for the main process, nothing for the others."""
        return zero.collect(named.items(), dtype, keep=self.arguments.training.should_save)

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        # All, or what the base model does not have.
        named = dict(self.model.named_parameters(remove_duplicate=False))
        if self._is_partial():
            named = {k: p for k, p in named.items() if p.requires_grad or PROJECTOR in k}
        state = self._collect(named, dtype)
        if not self.arguments.training.should_save:
            return
        if not self._is_partial():
            save(self.loaded, folder, state=state)
            return
        if isinstance(self.model, PeftModel):
            lora.save(self.model, folder, self.arguments.model.model_name_or_path, state)
        else:
            lora.save_projector(state, folder / PROJECTOR_FILE)
        write_settings(self.loaded, folder)
        adapter_only = self.arguments.model.tune_mm_mlp_adapter
        values = {**original_config(self.loaded, folder), "tune_mm_mlp_adapter": adapter_only}
        write_json(folder / "config.json", values)
