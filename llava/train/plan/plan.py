"""`python -m llava.train --plan ...`: what a run would take, before any GPU is used.

Any flags of a training, plus the plan's own:

    --world_size N      GPUs of the run (default: the launcher's WORLD_SIZE, else 1)
    --gpu NAME          only this GPU, may be repeated (default: all of `devices.DEVICES`)
    --utilisation 0.4   share of the peak speed that is reached
    --plan_samples N    records that are tokenised (default 2000)
    --json              for programs

Nothing is loaded but configurations, the tokenizer and the records, nothing is downloaded, and no
image is opened. Formulas: `flops.py`, `footprint.py`; model: `outline.py`; batches: `lengths.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llava.errors import UsageError
from llava.model.checkpoint import Loaded
from llava.records import Record, load_records
from llava.train import zero
from llava.train.arguments import Arguments, TrainingArguments
from llava.train.checkpoints import KEPT_AT_LEAST
from llava.train.plan.devices import DEVICES, Device, find_device
from llava.train.plan.flops import Flops, add, count, hours
from llava.train.plan.footprint import Disk, Memory, Setup, disk, memory
from llava.train.plan.lengths import Batch, Lengths, draw, simulate, summarise
from llava.train.plan.outline import Outline, load_outline, outline
from llava.train.plan.remedy import Fit, fit

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class PlanFlags:
    """The plan's own flags."""

    world_size: int
    devices: tuple[Device, ...]
    utilisation: float
    n_samples: int
    deepspeed: str | None
    as_json: bool


@dataclass(frozen=True)
class Steps:
    """How many optimizer steps."""

    n_samples: int
    n_with_image: int
    global_batch: int
    per_epoch: int
    total: int

    @property
    def epochs(self) -> float:
        return self.total / self.per_epoch


@dataclass(frozen=True)
class Plan:
    """What a run would take. Bytes, FLOPs and hours; all are estimates but `steps`, the parameters
    in `model` and, when all records were tokenised, `lengths`."""

    stage: str
    model: Outline
    setup: Setup
    steps: Steps
    lengths: Lengths
    tokens: float
    """Of the whole run, image positions included, padding not."""
    largest: Batch
    """The simulated micro-batch that needs most memory."""
    memory: Memory
    flops: Flops
    """Of the whole run."""
    fits: list[Fit]
    hours: dict[str, float]
    disk: Disk
    notes: dict[str, str]
    """The assumption behind each section, in one line."""


# ---- flags ---------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def take(argv: list[str]) -> tuple[list[str], PlanFlags | None]:
    """`argv` without the plan's flags, and those; None, and `argv` as it is, without `--plan`.

    With `--plan` the process leaves its launcher, so that no group of processes is joined, and
    only the first of several goes on. `--deepspeed` is read by the plan alone, and the rest is
    told to stay on the CPU.
    """
    if "--plan" not in argv:
        return argv, None
    parser = _Parser(prog="python -m llava.train --plan", allow_abbrev=False, add_help=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--world_size", type=int)
    parser.add_argument("--gpu", action="append")
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument("--plan_samples", type=int, default=2000)
    parser.add_argument("--deepspeed")
    parser.add_argument("--json", action="store_true")
    given, rest = parser.parse_known_args(argv)
    # Out of the environment, or the training's arguments would wait for the other processes.
    launcher = {name: os.environ.pop(name, None) for name in _LAUNCHER}
    if launcher["RANK"] not in (None, "0"):
        sys.exit(0)
    world_size = given.world_size
    if world_size is None:
        world_size = int(launcher["WORLD_SIZE"] or 1)
    if world_size < 1:
        raise UsageError(f"--world_size {world_size}: must be at least 1")
    if not 0 < given.utilisation <= 1:
        raise UsageError(f"--utilisation {given.utilisation}: is a share, above 0 and at most 1")
    if given.plan_samples < 2:
        raise UsageError(f"--plan_samples {given.plan_samples}: must be at least 2")
    devices = tuple(find_device(name) for name in given.gpu or ()) or DEVICES
    options = PlanFlags(
        world_size, devices, given.utilisation, given.plan_samples, given.deepspeed, given.json
    )
    return [*rest, "--use_cpu", "True"], options


def make_setup(arguments: Arguments, options: PlanFlags, hidden_size: int) -> Setup:
    """What decides the memory; UsageError on a DeepSpeed file that training would refuse."""
    flags = arguments.training
    settings: dict[str, Any] = {}
    if options.deepspeed:
        checked = zero.check(Path(options.deepspeed), flags, options.world_size)
        settings = checked["zero_optimization"]
        if flags.bits != 16 and settings["stage"] == 3:
            raise UsageError(
                f"--bits {flags.bits}: ZeRO-3 cannot split quantised weights; use --deepspeed "
                "scripts/zero2.json"
            )
    return Setup(
        world_size=options.world_size,
        batch_size=flags.per_device_train_batch_size,
        accumulation=flags.gradient_accumulation_steps,
        compute_bytes=flags.compute_dtype.itemsize,
        bf16=bool(flags.bf16),
        attention=arguments.model.attn_implementation or "sdpa",
        checkpointing=_checkpointing(flags),
        moments_bytes=_moments_bytes(flags.optim),
        lora_dropout=flags.lora_dropout > 0,
        bits=flags.bits,
        zero_stage=settings.get("stage", 0),
        offload_optimizer=_is_offloaded(settings, "offload_optimizer"),
        offload_parameters=_is_offloaded(settings, "offload_param"),
        bucket=_number(settings, "reduce_bucket_size", 5 * 10**8, hidden_size**2),
        max_live=_number(settings, "stage3_max_live_parameters", 10**9, 10**9),
    )


def _checkpointing(flags: TrainingArguments) -> bool:
    """transformers renames the flag."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return any(bool(getattr(flags, name, False)) for name in names)


def _moments_bytes(optim: str) -> int:
    """Bytes of optimizer state a parameter: two float32 moments for Adam, one for Lion."""
    name = str(getattr(optim, "value", optim))
    moments = 1 if "lion" in name or "rmsprop" in name else 2
    if "adafactor" in name or name == "sgd":  # a row and a column of each matrix, or nothing
        return 0
    return moments * (1 if "8bit" in name else 4)


def _is_offloaded(settings: dict[str, Any], key: str) -> bool:
    return (settings.get(key) or {}).get("device", "none") != "none"


def _number(settings: dict[str, Any], key: str, missing: int, auto: int) -> int:
    """A size in a DeepSpeed file: DeepSpeed's default where it is missing, transformers' value for
    "auto"; the latter too without a file, for the files a plan may recommend."""
    value = settings.get(key, missing if settings else "auto")
    return auto if value == "auto" else int(value)


# ---- numbers -------------------------------------------------------------------------------------


def steps_per_epoch(n_samples: int, batch_size: int, accumulation: int, world_size: int) -> int:
    """Samples become batches, batches are dealt to the devices, and a step takes `accumulation` of
    each device's; every division is rounded up, as the last, smaller ones count too."""
    batches = math.ceil(math.ceil(n_samples / batch_size) / world_size)
    return math.ceil(batches / accumulation)


def count_steps(records: list[Record], setup: Setup, flags: TrainingArguments) -> Steps:
    """`max_steps` if it is positive, else epochs times steps an epoch, rounded up."""
    shape = setup.batch_size, setup.accumulation, setup.world_size
    per_epoch = steps_per_epoch(len(records), *shape)
    total = flags.max_steps
    if total <= 0:
        total = math.ceil(flags.num_train_epochs * per_epoch)
    n_with_image = sum(record.has_image for record in records)
    return Steps(len(records), n_with_image, math.prod(shape), per_epoch, total)


def count_checkpoints(steps: Steps, flags: TrainingArguments) -> int:
    """How many `checkpoint-N` are kept: one every `save_steps` (below 1: a share of all steps) and
    after the last, or one an epoch; at most `save_total_limit`, which keeps two at least."""
    strategy = str(getattr(flags.save_strategy, "value", flags.save_strategy))
    if strategy == "no":
        return 0
    every = flags.save_steps
    if strategy == "epoch":
        n_written = math.ceil(steps.epochs)
    else:
        every = math.ceil(every * steps.total) if every < 1 else every
        n_written = math.ceil(steps.total / every)
    limit = flags.save_total_limit
    return min(n_written, max(limit, KEPT_AT_LEAST)) if limit else n_written


def stage_of(arguments: Arguments, sees: bool) -> str:
    """The stage in words; see `stages.py`."""
    flags = arguments.training
    if flags.lora_enable:
        bits = f", {flags.bits}-bit base" if flags.bits != 16 else ""
        return f"LoRA of rank {flags.lora_r}{bits}" + " and projector" * sees
    if not sees:
        return "full, language model alone"
    return "projector only" if arguments.model.tune_mm_mlp_adapter else "full fine-tuning"


def make_plan(arguments: Arguments, options: PlanFlags) -> Plan:
    """Everything that `print_plan` prints.

    Raises UsageError or DataError with what training would refuse at its start.
    """
    flags = arguments.training
    loaded = load_outline(arguments)
    model = outline(arguments, loaded)
    setup = make_setup(arguments, options, model.hidden)
    records = _records(arguments, loaded)
    # The batches of a part of the data stand for all: costs are scaled to the run's samples.
    steps = count_steps(records, setup, flags)
    batches, lengths = _batches(records, loaded, arguments, options)
    largest = max(batches, key=lambda batch: memory(model, setup, batch).peak)
    scale = steps.n_samples * steps.epochs / sum(batch.n_samples for batch in batches)
    flops = add([count(model, batch, setup.checkpointing) for batch in batches], scale)
    # What must fit is the largest batch that there can be, not only that of the part.
    worst = _longest(loaded, setup)
    whole = not (flags.lora_enable or arguments.model.tune_mm_mlp_adapter)
    return Plan(
        stage=stage_of(arguments, model.tower is not None),
        model=model,
        setup=setup,
        steps=steps,
        lengths=lengths,
        tokens=lengths.mean * steps.n_samples * steps.epochs,
        largest=largest,
        memory=memory(model, setup, largest),
        flops=flops,
        fits=[fit(model, setup, largest, worst, device) for device in options.devices],
        hours={
            device.name: hours(
                flops.total, device, options.world_size, setup.compute_bytes, options.utilisation
            )
            for device in options.devices
        },
        disk=disk(model, setup, whole, flags.lora_enable, count_checkpoints(steps, flags)),
        notes=_notes(arguments, options, steps, lengths, len(batches), loaded.model_max_length),
    )


def _records(arguments: Arguments, loaded: Loaded) -> list[Record]:
    path = arguments.data.data_path
    records = load_records(path)
    if not loaded.n_image_tokens and any(record.has_image for record in records):
        raise UsageError(f"{path}: has images; give --vision_tower and --image_folder")
    return records


def _batches(
    records: list[Record], loaded: Loaded, arguments: Arguments, options: PlanFlags
) -> tuple[list[Batch], Lengths]:
    flags = arguments.training
    sampled = draw(records, loaded, options.n_samples, flags.seed)
    flash = arguments.model.attn_implementation == "flash_attention_2"
    batches, grouped, shuffled = simulate(sampled, loaded, flags, options.world_size, flash)
    return batches, summarise(sampled, len(records), batches, grouped, shuffled)


def _longest(loaded: Loaded, setup: Setup) -> Batch:
    """The micro-batch that no other exceeds: all rows of maximum length, all of it supervised."""
    n, length = setup.batch_size, loaded.model_max_length
    return Batch(
        n_rows=n,
        length=length,
        n_samples=n,
        n_tokens=n * length,
        n_supervised=n * (length - 1),
        n_logits=length - 1,
        n_images=n,
    )


def _notes(
    arguments: Arguments,
    options: PlanFlags,
    steps: Steps,
    lengths: Lengths,
    n_batches: int,
    max_length: int,
) -> dict[str, str]:
    seed = arguments.training.seed
    if lengths.n_sampled == steps.n_samples:
        drawn = "all records"
    else:
        drawn = (
            f"{lengths.n_sampled:,} of {steps.n_samples:,} records, drawn with seed {seed} (mean "
            f"known to ±{lengths.standard_error:.1%})"
        )
    return {
        "steps": "exact; the last batch of an epoch may be smaller",
        "tokens": f"{drawn}; tokenised, cut at {max_length} and batched by the training's own code",
        "memory": (
            f"largest of {n_batches:,} simulated micro-batches; the peak is the larger of backward "
            "(layers after logits) and optimizer step"
        ),
        "gpus": (
            "usable leaves 6 % and 1 GiB to the allocator, CUDA and NCCL; hours at "
            f"{options.utilisation:.0%} of the data sheet's dense peak (--utilisation)"
        ),
        "flops": "matrix products, forward and backward, padding included; a multiply-add is two",
        "disk": "weights and optimizer only; one checkpoint more while the oldest is replaced",
    }


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for `--json`: fields by name, with the sums that they do not hold themselves."""
    values = dataclasses.asdict(plan)
    values["model"].update(n_parameters=plan.model.n_parameters, n_trained=plan.model.n_trained)
    values["steps"]["epochs"] = plan.steps.epochs
    values["memory"]["peak"] = plan.memory.peak
    values["flops"]["total"] = plan.flops.total
    values["disk"].update(checkpoint=plan.disk.checkpoint, total=plan.disk.total)
    for entry, fit_of_device in zip(values["fits"], plan.fits, strict=True):
        entry["fits"] = fit_of_device.fits
    return values
