"""DeepSpeed's ZeRO: settings that leave every flag in effect, starting, gathering what is sharded.

The settings file decides what is sharded: optimizer and gradients (stages 1, 2), weights too (3).
Everything else is the flags': what a file would quietly replace is refused, what it leaves out is
filled in. LLaVA's own files name no `gradient_clipping`, so its runs never clipped gradients; here
`--max_grad_norm` holds, and 0 turns it off.

Nothing is compiled: PyTorch's AdamW steps, on the CPU too where a file offloads the optimizer
(`--optim adamw_torch_fused` is its one-pass version). Who wants DeepSpeed's CPU Adam, built on
the spot by g++, writes `"zero_force_ds_cpu_optimizer": true`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers

from llava.errors import UsageError
from llava.model.weights import State

_REFUSED = {
    "optimizer": "builds an optimizer of its own, without --mm_projector_lr and --optim",
    "scheduler": "replaces --lr_scheduler_type and --warmup_steps",
}
_GUARDS = {  # without them a gradient that is not finite would reach the weights (P18)
    "bf16.check_grad_overflow": "would let NaN gradients change the weights",
    "zero_optimization.compute_grad_norm": "hides the gradient's norm, which is watched for NaN",
}


def enabled(flags: transformers.TrainingArguments) -> bool:
    """Whether this run uses DeepSpeed."""
    return bool(flags.deepspeed)


def stage(flags: transformers.TrainingArguments) -> int:
    """ZeRO's stage, 0 without DeepSpeed. At 3 a process holds only its share of the weights."""
    return flags.hf_deepspeed_config.get_value("zero_optimization.stage") if enabled(flags) else 0


def configure(flags: transformers.TrainingArguments) -> None:
    """Put checked and completed settings in the place of the file that `--deepspeed` names.

    To be called before transformers reads `flags.deepspeed`. A process that no launcher started
    becomes a world of one. Raises UsageError, with file, key and remedy, on a file that cannot be
    read, contradicts a flag or would replace one.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # instead of a warning from each process
    if not enabled(flags) or isinstance(flags.deepspeed, dict):
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("--deepspeed: DeepSpeed is not installed; pip install deepspeed")
    flags.deepspeed = check(Path(flags.deepspeed), flags)
    if "RANK" not in os.environ:
        _world_of_one()


def check(
    path: Path, flags: transformers.TrainingArguments, world_size: int | None = None
) -> dict[str, Any]:
    """The settings in `path`, with what it leaves out taken from the flags; see `configure`.

    `world_size` is that of the launcher unless given.
    """
    settings = _read(path)
    for key, effect in _REFUSED.items():
        if key in settings:
            raise UsageError(f'{path}: "{key}" {effect}; remove the block, the flags decide')
    for key, effect in _GUARDS.items():
        if _get(settings, key) is False:
            raise UsageError(f'{path}: "{key}" false {effect}; remove it')
    sharding = settings.get("zero_optimization")
    number = sharding.get("stage") if isinstance(sharding, dict) else None
    if number not in (1, 2, 3):
        raise UsageError(
            f'{path}: "zero_optimization.stage" is {number}; write 1, 2 or 3, or train without '
            "--deepspeed"
        )
    if number < 3:  # sizes that "auto" takes from the model are filled in for stage 3 only
        settings["zero_optimization"] = {k: v for k, v in sharding.items() if "stage3_" not in k}
    world_size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    _settle_numbers(path, settings, flags, world_size)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--deepspeed {path}: cannot be read ({error.strerror}); scripts/zero3.json is one"
        ) from error
    except ValueError as error:
        hint = "compare it with scripts/zero3.json"
        raise UsageError(f"{path}: not JSON ({error}); {hint}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: holds no object; compare it with scripts/zero3.json")
    return settings


def _settle_numbers(
    path: Path,
    settings: dict[str, Any],
    flags: transformers.TrainingArguments,
    world_size: int,
) -> None:
    """Fill in what the flags decide; UsageError where the file decided otherwise."""
    batch, steps = flags.per_device_train_batch_size, flags.gradient_accumulation_steps
    for key, value, flag in (
        ("train_micro_batch_size_per_gpu", batch, "per_device_train_batch_size"),
        ("gradient_accumulation_steps", steps, "gradient_accumulation_steps"),
        ("gradient_clipping", flags.max_grad_norm, "max_grad_norm"),
        ("bf16.enabled", bool(flags.bf16), "bf16"),
        ("fp16.enabled", bool(flags.fp16), "fp16"),
    ):
        in_file = _get(settings, key)
        if in_file is None:
            _set(settings, key, "auto")
        elif in_file not in ("auto", value):
            raise UsageError(
                f'{path}: "{key}" is {in_file} but --{flag} is {value}; write "auto" in the file '
                f"or pass --{flag} {in_file}"
            )
    _check_total(path, settings.setdefault("train_batch_size", "auto"), batch, steps, world_size)


def _check_total(path: Path, total: Any, batch: int, steps: int, world_size: int) -> None:
    if total in ("auto", batch * steps * world_size):
        return
    share = batch * world_size
    divides = isinstance(total, int) and total % share == 0
    remedy = f"--gradient_accumulation_steps {total // share}" if divides else "other batch flags"
    raise UsageError(
        f'{path}: "train_batch_size" is {total}, but {world_size} processes x {batch} samples x '
        f'{steps} accumulated steps make {share * steps}; write "auto" in the file or pass {remedy}'
    )


def _get(settings: dict[str, Any], dotted: str) -> Any:
    value: Any = settings
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _set(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *outer, last = dotted.split(".")
    for key in outer:
        settings = settings.setdefault(key, {})
    settings[last] = value


def _world_of_one() -> None:
    """The environment that a launcher would make for one process; DeepSpeed asks MPI without it."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any: nobody else has to find it


def start(flags: transformers.TrainingArguments) -> None:
    """Let DeepSpeed join the processes of this run; nothing without `--deepspeed`.

    To be called before a model is built: ZeRO-3 shards a model while it is made.
    """
    if not enabled(flags):
        return
    import deepspeed
    from deepspeed import ops

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(flags.get_process_log_level())
    # CPU processes would compile an all-reduce in shared memory first; gloo's does.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        auto_mpi_discovery=False, timeout=timedelta(seconds=flags.ddp_timeout)
    )


def is_shard(parameter: torch.nn.Parameter) -> bool:
    """Whether the process holds only its share of `parameter` (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of `parameter`, of which the process may hold a share only."""
    return parameter.ds_shape if is_shard(parameter) else parameter.shape


@contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter], rewrite: bool = False) -> Iterator[None]:
    """Inside, `parameters` are whole on every process. To be entered by all, in one order.

    With `rewrite`, what the first process has put into them is kept.
    """
    shards = [parameter for parameter in parameters if is_shard(parameter)]
    if not shards:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shards, modifier_rank=0 if rewrite else None):
        yield


def collect(
    named: Iterable[tuple[str, torch.nn.Parameter]], dtype: torch.dtype | None, keep: bool
) -> State:
    """Whole tensors on the CPU by name, as `dtype` unless that is None.

    Gathered one at a time, so that one alone is ever whole. To be called by all processes; those
    without `keep` help gathering and get nothing.
    """
    state: State = {}
    for name, parameter in named:
        with gathered([parameter]):
            if keep:  # a copy: DeepSpeed's parameters are views of one large buffer
                state[name] = parameter.detach().to("cpu", dtype, copy=True).contiguous()
    return state
