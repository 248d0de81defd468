"""Flags of `python -m llava.train`: LLaVA's names, on top of all flags of Hugging Face's Trainer.

LLaVA's own flags default to LLaVA-1.5 (its classes still default to an older model; its scripts
pass every value, so they run the same). Names that newer transformers dropped are understood.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from transformers import HfArgumentParser

from llava.conversation import get_template
from llava.errors import UsageError

USAGE = (
    "python -m llava.train --model_name_or_path DIR --data_path FILE --output_dir DIR [flags]\n"
    "       (--help_all lists every flag of transformers.TrainingArguments as well)"
)
RENAMED = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}
if "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__:
    RENAMED["gradient_checkpointing"] = "activation_checkpointing"
# What older scripts pass, and the one value that LLaVA-1.5 training has; None: any, no effect.
FIXED = {
    "lazy_preprocess": None,  # images are always read when they are needed
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": "False",
    "mm_use_im_patch_token": "False",
    "mm_patch_merge_type": "flat",
    "bits": "16",
}
# Flags of transformers.TrainingArguments that --help explains.
COMMON = (
    "output_dir num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps learning_rate weight_decay warmup_steps lr_scheduler_type "
    "max_grad_norm optim bf16 fp16 activation_checkpointing seed logging_steps save_strategy "
    "save_steps save_total_limit dataloader_num_workers report_to disable_tqdm"
).split()


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str = _flag(
        None, "language model, or a LLaVA to train on: a directory or a hub name"
    )
    version: str = _flag("v1", "conversation template: v1, plain (alignment pre-training), ...")
    vision_tower: str | None = _flag(
        None, "CLIP vision tower to put on a language model; without it text alone is trained"
    )
    pretrain_mm_mlp_adapter: str | None = _flag(
        None, "mm_projector.bin to start from; without it the projector starts fresh"
    )
    tune_mm_mlp_adapter: bool = _flag(False, "train the projector only (alignment pre-training)")
    mm_vision_select_layer: int = _flag(-2, "hidden state of the vision tower that is read")
    mm_vision_select_feature: Literal["patch", "cls_patch"] = _flag(
        "patch", "cls_patch keeps the class token"
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = _flag(None, "LLaVA JSON list, or one record a line")
    image_folder: str | None = _flag(None, "folder that the records' image paths are relative to")
    image_roots: list[str] = field(
        default_factory=list,
        metadata={"help": "folders outside it that links in the image folder may lead to"},
    )
    image_aspect_ratio: Literal["square", "pad"] = _flag(
        "square", "pad shows the whole image (LLaVA-1.5 fine-tuning), square crops its centre"
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained."""

    output_dir: str | None = _flag(None, "where the model and its checkpoints are written")
    model_max_length: int = _flag(2048, "positions after the image is expanded; the rest is cut")
    mm_projector_lr: float | None = _flag(None, "learning rate of the projector, if another")
    group_by_modality_length: bool = _flag(
        False, "batches of one modality and similar lengths, as LLaVA fine-tunes"
    )
    lora_enable: bool = _flag(False, "train low-rank adapters of the language model + projector")
    lora_r: int = _flag(64, "rank of the adapters")
    lora_alpha: int = _flag(16, "the adapters are scaled by lora_alpha / lora_r")
    lora_dropout: float = _flag(0.05, "dropout in front of the adapters")

    # Other defaults than transformers'.
    logging_steps: float = _flag(10, "steps between two lines of progress")
    save_strategy: str = _flag("no", "no, steps or epoch; the final model is always saved")
    report_to: str = _flag("none", "none, wandb, tensorboard, ...")
    disable_tqdm: bool | None = _flag(None, "lines instead of a bar; default: if not a terminal")
    remove_unused_columns: bool = _flag(False, "must stay False")
    logging_nan_inf_filter: bool = _flag(False, "must stay False: NaN stops the run")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise UsageError("--output_dir is required")
        if not torch.cuda.is_available():
            self.use_cpu = True
            self.tf32 = None  # a GPU's matrix format, which LLaVA's scripts ask for
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every step uses all: see the dummy image
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        super().__post_init__()
        _check_training(self)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products are computed in, and the final model is stored in."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


def _check_training(arguments: TrainingArguments) -> None:
    if arguments.remove_unused_columns or arguments.logging_nan_inf_filter:
        raise UsageError("--remove_unused_columns and --logging_nan_inf_filter must stay False")
    if arguments.eval_strategy != "no":
        raise UsageError("--eval_strategy: there is no validation set while training; leave it")
    if arguments.label_smoothing_factor:
        raise UsageError("--label_smoothing_factor is not supported")
    if arguments.lora_enable and arguments.lora_r < 1:
        raise UsageError(f"--lora_r {arguments.lora_r}: must be at least 1")
    if arguments.n_gpu > 1:
        raise UsageError(
            f"{arguments.n_gpu} GPUs but one process; use `torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m llava.train ...`, or choose one with CUDA_VISIBLE_DEVICES"
        )


@dataclass
class Arguments:
    """Everything a training run is told."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments

    def __post_init__(self) -> None:
        for flag, value in (
            ("model_name_or_path", self.model.model_name_or_path),
            ("data_path", self.data.data_path),
        ):
            if not value:
                raise UsageError(f"--{flag} is required")
        get_template(self.model.version)
        if self.model.tune_mm_mlp_adapter and self.training.lora_enable:
            raise UsageError("--tune_mm_mlp_adapter trains the projector only; drop --lora_enable")


class _Formatter(ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, no list of choices that repeats the help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action: Any) -> str:
        name = action.option_strings[0]
        value = "True" if action.nargs == "?" else action.dest.split("_")[-1].upper()
        return name if action.nargs == 0 else f"{name} {value}"


def parse(argv: list[str]) -> Arguments:
    """Arguments from flags; UsageError, or argparse's exit with code 2, if they are wrong."""
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, TrainingArguments],
        usage=USAGE,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    if "--help_all" in argv:
        argv = ["--help"]
    else:
        _shorten_help(parser)
    try:
        *parts, unknown = parser.parse_args_into_dataclasses(
            _modernised(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if unknown:
        raise UsageError(_unknown_flag(unknown[0], parser))
    return Arguments(*parts)


def _shorten_help(parser: HfArgumentParser) -> None:
    own = {f.name for cls in (ModelArguments, DataArguments) for f in dataclasses.fields(cls)}
    inherited = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    for action in parser._actions:
        hidden = action.dest in inherited and action.dest not in (*COMMON, *own)
        if hidden or action.option_strings[0].startswith("--no_"):
            action.help = SUPPRESS
        elif action.dest in COMMON and action.help is not None:  # transformers' run to paragraphs
            action.help = action.help.split(". ")[0].rstrip(".").replace("\n", " ")


def _modernised(argv: list[str]) -> list[str]:
    """`argv` with old names replaced and flags with one possible value checked and taken out."""
    result: list[str] = []
    rest = [part for word in argv for part in _split_equals(word)]
    while rest:
        word = rest.pop(0)
        name = word.removeprefix("--").replace("-", "_") if word.startswith("--") else None
        if name in FIXED:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
            if FIXED[name] not in (None, value):
                raise UsageError(f"--{name} {value}: only {FIXED[name]} is supported")
        else:
            result.append(f"--{RENAMED[name]}" if name in RENAMED else word)
    return result


def _split_equals(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--") else [word]


def _unknown_flag(flag: str, parser: HfArgumentParser) -> str:
    known = list(parser._option_string_actions)
    close = difflib.get_close_matches(flag, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see --help_all"
    return f"unknown flag {flag}{hint}"
