"""Flags as LLaVA's time had them: transformers 4.31 and 4.37 said some things otherwise.

Every flag of those versions that today's lacks has one decision here: another name, no effect any
more (which is printed), or an error where leaving it out would train something else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import transformers

from llava.errors import UsageError

_CURRENT = transformers.TrainingArguments.__dataclass_fields__
_OFF = frozenset({"false", "no", "0", "none", ""})
_HALF = frozenset({"auto", "cuda_amp", "cpu_amp"})


@dataclass(frozen=True)
class Renamed:
    """The same flag has another name."""

    to: str


@dataclass(frozen=True)
class NoEffect:
    """Taken and left aside; said, unless the value asks for what happens anyway."""

    why: str
    usual: frozenset[str] = _OFF


@dataclass(frozen=True)
class Refused:
    """An error, unless the value asks for what happens anyway."""

    remedy: str
    usual: frozenset[str] = _OFF


Decision = Renamed | NoEffect | Refused

_METRICS = NoEffect("evaluation measures the loss alone")
_MACHINE = NoEffect("not the hardware this runs on")
_SEARCH = NoEffect("this is no hyper-parameter search")
_FSDP = Refused("FSDP is not supported; use --deepspeed scripts/zero3.json")
_APEX = Refused("only PyTorch's mixed precision is there; use --bf16 True or --fp16 True", _HALF)
_BESIDE = NoEffect("steps, unless 0, beat a ratio; give one of them", frozenset())

DECISIONS: dict[str, Decision] = {
    "evaluation_strategy": Renamed("eval_strategy"),
    "no_cuda": Renamed("use_cpu"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "push_to_hub_model_id": Renamed("hub_model_id"),
    "push_to_hub_token": Renamed("hub_token"),
    "torchdynamo": Renamed("torch_compile_backend"),
    "warmup_ratio": Renamed("warmup_steps"),  # there, a number below 1 is a share of all steps
    "xpu_backend": Renamed("ddp_backend"),
    "dispatch_batches": NoEffect("every process reads its own samples", _OFF),
    "fp16_opt_level": NoEffect("it was Apex's", frozenset({"o1"})),
    "include_inputs_for_metrics": _METRICS,
    "include_tokens_per_second": NoEffect("use --include_num_input_tokens_seen True"),
    "jit_mode_eval": NoEffect("evaluation runs as training does"),
    "logging_dir": NoEffect("set TENSORBOARD_LOGGING_DIR in the environment"),
    "lora_weight_path": NoEffect("LLaVA never read it; a merged model can be trained on"),
    "mp_parameters": NoEffect("it was SageMaker's"),
    "mpt_attn_impl": NoEffect("it was for MPT; see --attn_implementation", frozenset({"triton"})),
    "overwrite_output_dir": NoEffect("a run goes on from its checkpoints; remove them to restart"),
    "past_index": NoEffect("it was for models with a memory", frozenset({"-1"})),
    "ray_scope": _SEARCH,
    "save_safetensors": NoEffect("weights are always safetensors", frozenset({"true", "1"})),
    "tpu_metrics_debug": _MACHINE,
    "use_ipex": _MACHINE,
    "use_legacy_prediction_loop": _METRICS,
    "use_mps_device": _MACHINE,
    "adafactor": Refused("use --optim adafactor"),
    "fp16_backend": _APEX,
    "fsdp_min_num_params": _FSDP,
    "fsdp_transformer_layer_cls_to_wrap": _FSDP,
    "group_by_length": Refused("use --group_by_modality_length True"),
    "half_precision_backend": _APEX,
    "push_to_hub_organization": Refused("use --hub_model_id ORGANISATION/NAME"),
    "sharded_ddp": Refused("use --deepspeed scripts/zero2.json"),
    "split_batches": Refused(
        "batch sizes are those of one process; divide --per_device_train_batch_size by their number"
    ),
    "tpu_num_cores": Refused("TPUs are not supported"),
}
for _name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
    _new = _name.replace("gradient", "activation")
    if _new in _CURRENT:
        DECISIONS[_name] = Renamed(_new)


def modernise(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """`argv` in today's words, and a line for each flag without effect.

    `--flag=value` and `--old-name` are understood like `--flag value` and `--old_name`. Raises
    UsageError, with the remedy, on a flag that cannot be followed.
    """
    words: list[str] = []
    notes: list[str] = []
    groups = list(_grouped(argv))
    loser = _warmup_loser(groups)
    for flag, values in groups:
        name = _name_of(flag)
        decision = _BESIDE if name == loser else DECISIONS.get(name)
        asked = " ".join([flag, *values])
        value = values[0].lower() if values else "true"
        if decision is None:
            words += [flag, *values]
        elif isinstance(decision, Renamed):
            words += [f"--{decision.to}", *values]
        elif value not in decision.usual:
            if isinstance(decision, Refused):
                raise UsageError(f"{asked}: {decision.remedy}")
            notes.append(f"{asked}: no effect; {decision.why}")
    return words, notes


def nearest(flag: str, known: Iterable[str]) -> str | None:
    """The flag, of `known` and of those decided on here, that a misspelt one is most like."""
    names = {*known, *(f"--{name}" for name in DECISIONS)}
    return next(iter(difflib.get_close_matches(f"--{_name_of(flag)}", sorted(names), n=1)), None)


def _name_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _grouped(argv: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values; words before the first flag come as flags of their own."""
    flag, values = "", list[str]()
    for word in argv:
        if word.startswith("--") or not flag:
            if flag:
                yield flag, values
            flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
            values = [value] if equals else []
        else:
            values.append(word)
    if flag:
        yield flag, values


def _warmup_loser(groups: list[tuple[str, list[str]]]) -> str | None:
    """Which of steps and ratio gives way, if both are there: as once, a ratio to a number of steps.

    Raises UsageError on a ratio that today, under the name of steps, would be read as steps.
    """
    given = {_name_of(flag): values[0] for flag, values in groups if values}
    ratio, steps = given.get("warmup_ratio"), given.get("warmup_steps")
    try:
        if ratio is not None and not 0 <= float(ratio) < 1:
            raise UsageError(f"--warmup_ratio {ratio}: is a share of all steps, 0 to below 1")
        if ratio is None or steps is None:
            return None
        return "warmup_ratio" if float(steps) else "warmup_steps"
    except ValueError as error:
        raise UsageError(f"--warmup_ratio, --warmup_steps: not a number ({error})") from error
