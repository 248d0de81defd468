"""Flags of `python -m llava.train`: LLaVA's names, on top of all flags of Hugging Face's Trainer.

LLaVA's own flags have LLaVA's own defaults, which are those of an older model: what LLaVA-1.5
needs, its scripts pass, and they run unchanged. Names that newer transformers dropped are
understood.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
import transformers
from huggingface_hub import constants
from transformers import HfArgumentParser

from llava.conversation import get_template
from llava.errors import UsageError
from llava.model.projector import layer_prefixes
from llava.train import legacy, zero

USAGE = """\
python -m llava.train --model_name_or_path DIR --data_path FILE --output_dir DIR [flags]

LLaVA's flags and those of transformers.TrainingArguments, the rest of which --help_all lists.
Names that transformers has dropped since LLaVA are understood. --plan beside the flags of a run
prints steps, memory and hours, and trains nothing; --plan --json for programs."""
# Flags of transformers.TrainingArguments that --help explains, in fewer words than it has.
COMMON = {
    "per_device_train_batch_size": "samples of a process at a time",
    "per_device_eval_batch_size": "the same in evaluation",
    "gradient_accumulation_steps": "batches of a process in a step",
    "num_train_epochs": "passes over the data",
    "max_steps": "steps, whatever the epochs; -1: as many as the epochs have",
    "learning_rate": "at its highest",
    "lr_scheduler_type": "linear, cosine, constant, constant_with_warmup, ...",
    "warmup_steps": "steps of rising learning rate; below 1, a share of all steps",
    "weight_decay": "of AdamW, biases and norms excepted",
    "max_grad_norm": "gradients are clipped to it; 0: never",
    "bf16": "compute in bfloat16; weights that train stay float32",
    "fp16": "compute in float16 with loss scaling, for GPUs without bfloat16",
    "tf32": "TensorFloat-32 products on a GPU; of no effect on the CPU",
    "activation_checkpointing": "less memory, a third more time",
    "deepspeed": "settings of ZeRO: scripts/zero2.json, zero3.json or zero3_offload.json",
    "seed": "of fresh weights, dropout and the order of samples",
    "eval_strategy": "when held-out loss is measured: no (at the end), steps or epoch",
    "eval_steps": "steps between two evaluations",
    "save_steps": "steps between two checkpoints",
    "dataloader_num_workers": "processes that read images, for each training process",
}


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str = _flag(
        None, "language model, or a LLaVA to train on: a directory or a hub name"
    )
    version: str = _flag(
        "v0", "conversation template: v1 (LLaVA-1.5), plain (alignment pre-training), ..."
    )
    vision_tower: str | None = _flag(
        None, "CLIP vision tower to put on a language model; without it text alone is trained"
    )
    pretrain_mm_mlp_adapter: str | None = _flag(
        None, "mm_projector.bin to start from; without it the projector starts fresh"
    )
    tune_mm_mlp_adapter: bool = _flag(False, "train the projector only (alignment pre-training)")
    freeze_backbone: bool = _flag(False, "keep the language model as it is")
    mm_projector_type: str = _flag("linear", "linear, or mlp2x_gelu (LLaVA-1.5), mlp3x_gelu, ...")
    mm_vision_select_layer: int = _flag(
        -1, "hidden state of the vision tower that is read (LLaVA-1.5: -2)"
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] = _flag(
        "patch", "cls_patch keeps the class token"
    )
    mm_patch_merge_type: str = _flag("flat", "flat is the one there is: one image, one grid")
    mm_use_im_start_end: bool = _flag(False, "must stay False: LLaVA-1.5 has no such tokens")
    mm_use_im_patch_token: bool = _flag(True, "no effect: that token occurs in no sample")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = _flag(
        None, "attention of the model: eager, sdpa (PyTorch's) or flash_attention_2"
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = _flag(None, "LLaVA JSON list, or one record a line")
    eval_data_path: str | None = _flag(
        None, "held-out records; their loss is logged at the end, or as --eval_strategy says"
    )
    image_folder: str | None = _flag(None, "folder that the records' image paths are relative to")
    image_roots: list[str] = field(
        default_factory=list,
        metadata={"help": "folders outside it that links in the image folder may lead to"},
    )
    image_aspect_ratio: Literal["square", "pad"] = _flag(
        "square", "pad shows the whole image (LLaVA-1.5 fine-tuning), square crops its centre"
    )
    lazy_preprocess: bool = _flag(False, "no effect: images are always read when they are needed")
    is_multimodal: bool = _flag(False, "no effect: whether a model sees, its files say")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained."""

    output_dir: str | None = _flag(None, "where the model and its checkpoints are written")
    cache_dir: str | None = _flag(None, "where models from the hub are kept")
    optim: str = _flag("adamw_torch", "adamw_torch, adamw_torch_fused, adafactor, ...")
    model_max_length: int = _flag(
        512, "positions after the image is expanded; the rest is cut (LLaVA-1.5: 2048)"
    )
    freeze_mm_mlp_adapter: bool = _flag(False, "keep the projector as it is")
    mm_projector_lr: float | None = _flag(None, "learning rate of the projector, if another")
    group_by_modality_length: bool = _flag(
        False, "batches of one modality and similar lengths, as LLaVA fine-tunes"
    )
    packing: bool = _flag(False, "several samples of a batch in one row, each as if alone")
    lora_enable: bool = _flag(False, "train low-rank adapters of the language model + projector")
    lora_r: int = _flag(64, "rank of the adapters")
    lora_alpha: int = _flag(16, "the adapters are scaled by lora_alpha / lora_r")
    lora_dropout: float = _flag(0.05, "dropout in front of the adapters")
    lora_bias: Literal["none", "all", "lora_only"] = _flag(
        "none", "biases trained beside the adapters; Llama has none"
    )
    lora_weight_path: str = _flag("", "no effect, as in LLaVA")
    bits: Literal[4, 8, 16] = _flag(
        16, "4 or 8: quantise the frozen language model (with --lora_enable; needs bitsandbytes)"
    )
    double_quant: bool = _flag(True, "with 4 bits: quantise the scales as well")
    quant_type: Literal["fp4", "nf4"] = _flag("nf4", "with 4 bits: the data type")
    mpt_attn_impl: str = _flag("triton", "no effect: for MPT, which is not supported")

    # Other defaults than transformers'.
    logging_steps: float = _flag(10, "steps between two lines of progress")
    save_strategy: str = _flag("no", "no, steps or epoch; the final model is always saved")
    save_total_limit: int | None = _flag(
        None, "checkpoints kept, the oldest are deleted; 1 keeps 2, so that one is always complete"
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "none, wandb, tensorboard, ..."}
    )
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
        zero.configure(self)
        super().__post_init__()
        _check_training(self)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products are computed in, and the final model is stored in."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


def _check_training(flags: TrainingArguments) -> None:
    """Raise UsageError on what this training cannot do, or would do other than asked."""
    for wrong, message in (
        (flags.remove_unused_columns, "--remove_unused_columns must stay False"),
        (
            flags.logging_nan_inf_filter,
            "--logging_nan_inf_filter must stay False: a loss that is not finite stops the run",
        ),
        (
            flags.save_only_model,
            "--save_only_model: a run could not go on from such a checkpoint; leave it out, "
            "--save_total_limit bounds the disk",
        ),
        (flags.label_smoothing_factor, "--label_smoothing_factor is not supported; leave it 0"),
        (
            flags.load_best_model_at_end,
            "--load_best_model_at_end is not supported; every checkpoint is a model, and "
            "trainer_state.json has their eval_loss",
        ),
        (flags.fsdp, "--fsdp is not supported; use --deepspeed scripts/zero3.json"),
        (
            flags.train_sampling_strategy not in ("random", "sequential"),
            f"--train_sampling_strategy {flags.train_sampling_strategy}: batches of similar "
            "lengths are made by --group_by_modality_length True",
        ),
        (
            flags.group_by_modality_length and flags.train_sampling_strategy == "sequential",
            "--group_by_modality_length and --train_sampling_strategy sequential contradict each "
            "other; drop one",
        ),
        (
            flags.packing and flags.per_device_train_batch_size == 1,
            "--packing joins the samples of a batch; give --per_device_train_batch_size 2 or more",
        ),
        (flags.lora_r < 1, f"--lora_r {flags.lora_r}: must be at least 1"),
        (
            not 0 <= flags.lora_dropout < 1,
            f"--lora_dropout {flags.lora_dropout}: is a share, from 0 to below 1",
        ),
        (
            flags.bits != 16 and not flags.lora_enable,
            f"--bits {flags.bits}: quantised weights cannot be trained; add --lora_enable True",
        ),
    ):
        if wrong:
            raise UsageError(message)


def check_machine(flags: TrainingArguments) -> None:
    """Raise UsageError on what another machine could do; planning does without."""
    if flags.fp16 and flags.use_cpu:
        raise UsageError("--fp16 True needs a GPU; on the CPU use --bf16 True, or neither")
    if flags.n_gpu > 1:
        raise UsageError(
            f"{flags.n_gpu} GPUs but one process; use `torchrun --nproc_per_node {flags.n_gpu} "
            "-m llava.train ...`, or choose one with CUDA_VISIBLE_DEVICES"
        )


@dataclass
class Arguments:
    """Everything a training run is told."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments

    def __post_init__(self) -> None:
        model, data, training = self.model, self.data, self.training
        get_template(model.version)
        layer_prefixes(model.mm_projector_type)
        evaluates = training.eval_strategy != "no" or training.eval_on_start
        for wrong, message in (
            (not model.model_name_or_path, "--model_name_or_path is required"),
            (not data.data_path, "--data_path is required"),
            (
                model.mm_use_im_start_end,
                "--mm_use_im_start_end True is not supported: LLaVA-1.5 puts no tokens around an "
                "image; leave it False",
            ),
            (
                model.mm_patch_merge_type != "flat",
                f"--mm_patch_merge_type {model.mm_patch_merge_type}: only flat is supported, the "
                "others belong to LLaVA-1.6",
            ),
            (
                model.tune_mm_mlp_adapter and training.lora_enable,
                "--tune_mm_mlp_adapter trains the projector only; drop --lora_enable",
            ),
            (
                model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter,
                "--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter contradict each other; drop one",
            ),
            (
                model.freeze_backbone
                and training.freeze_mm_mlp_adapter
                and not training.lora_enable,
                "--freeze_backbone and --freeze_mm_mlp_adapter leave nothing to train; drop one",
            ),
            (
                evaluates and not data.eval_data_path,
                f"--eval_strategy {training.eval_strategy.value}: evaluates nothing; give "
                "--eval_data_path FILE, held-out records like those of --data_path",
            ),
        ):
            if wrong:
                raise UsageError(message)


class _Formatter(ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, no list of choices that repeats the help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: Any) -> str:
        name = action.option_strings[0]
        value = "True" if action.nargs == "?" else action.dest.split("_")[-1].upper()
        return name if action.nargs == 0 else f"{name} {value}"

    def _get_help_string(self, action: Any) -> str | None:
        given = action.default not in (None, "", False, []) and action.nargs != 0
        return super()._get_help_string(action) if given else action.help


class _Parser(HfArgumentParser):
    """Tells what is wrong like everything else here: as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: list[str]) -> Arguments:
    """Arguments from flags; UsageError if they are wrong.

    Flags without effect are told on stderr, by the first process.
    """
    parser = _Parser(
        [ModelArguments, DataArguments, TrainingArguments],
        usage=USAGE,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    if "--help_all" in argv:
        argv = ["--help"]
    else:
        _shorten_help(parser)
    words, notes = legacy.modernise(argv)
    _, unknown = parser.parse_known_args(words)
    if unknown:  # before a missing --output_dir is told: it may be the misspelt one
        close = legacy.nearest(unknown[0], parser._option_string_actions)
        hint = f"did you mean {close}?" if close else "see --help_all"
        raise UsageError(f"unknown flag {unknown[0]}; {hint}")
    try:
        parts = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(note, file=sys.stderr)
    arguments = Arguments(*parts)
    if arguments.training.cache_dir:
        constants.HF_HUB_CACHE = arguments.training.cache_dir  # where every look-up begins
    return arguments


def _shorten_help(parser: HfArgumentParser) -> None:
    """Leave out what only transformers explains, and second spellings."""
    inherited = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    explained = {name for cls in (ModelArguments, DataArguments) for name in cls.__annotations__}
    explained |= TrainingArguments.__annotations__.keys()
    for action in parser._actions:
        action.help = COMMON.get(action.dest, action.help)
        hidden = action.dest in inherited - explained - COMMON.keys()
        if hidden or action.option_strings[0].startswith("--no_"):
            action.help = SUPPRESS
