"""What decides a training run, kept with everything it writes, so that no other goes on from it.

`run.json` lies in each checkpoint and beside the final model (promise P10): the content of data
and models, the flags that decide the result, and how many samples make a step.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import transformers

from llava import ranks
from llava.errors import UsageError
from llava.files import digest_of
from llava.model.checkpoint import Checkpoint
from llava.model.sources import read_json
from llava.train import zero
from llava.train.arguments import Arguments, DataArguments, ModelArguments, TrainingArguments

FILE = "run.json"
# Of transformers' flags, those that decide the weights; batch sizes enter as their product.
_DECIDING = (
    "num_train_epochs max_steps learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args seed "
    "data_seed bf16 fp16 train_sampling_strategy dataloader_drop_last neftune_noise_alpha "
    "average_tokens_across_devices"
).split()
# Of ours, those that do not, or name something whose content is compared instead.
_NOT_DECIDING = (
    "model_name_or_path vision_tower pretrain_mm_mlp_adapter attn_implementation data_path "
    "eval_data_path image_folder image_roots lazy_preprocess cache_dir"
).split()
_PACKAGES = ("torch", "transformers", "peft")


def identity(arguments: Arguments) -> dict[str, Any]:
    """What decides the run, as JSON. Reads data and models in full; UsageError if it cannot."""
    flags, model = arguments.training, arguments.model
    run: dict[str, Any] = {
        "data": _sha256(Path(arguments.data.data_path)),
        "model": Checkpoint.open(model.model_name_or_path).fingerprint(),
        "samples a step": flags.per_device_train_batch_size
        * flags.gradient_accumulation_steps
        * flags.world_size,
        "ZeRO stage": zero.stage(flags),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "flags": _flags(arguments),
    }
    if model.vision_tower:
        run["vision tower"] = Checkpoint.open(model.vision_tower).fingerprint()
    if model.pretrain_mm_mlp_adapter:
        run["projector"] = _sha256(Path(model.pretrain_mm_mlp_adapter))
    if zero.enabled(flags):
        run["processes"] = ranks.world_size()  # each keeps its share of the state
    return run


def _sha256(path: Path) -> str:
    try:
        return digest_of(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _flags(arguments: Arguments) -> dict[str, Any]:
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    values: dict[str, Any] = {}
    for part, cls in (
        (arguments.model, ModelArguments),
        (arguments.data, DataArguments),
        (arguments.training, TrainingArguments),
    ):
        for field in dataclasses.fields(cls):
            ours = field.name not in theirs and field.name not in _NOT_DECIDING
            if ours or field.name in _DECIDING:
                values[field.name] = _plain(getattr(part, field.name))
    return values


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)


def check_same(folder: Path, current: dict[str, Any]) -> None:
    """UsageError, with the difference, unless `folder` was written by a run like `current`."""
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder}: has no {FILE}, so what it was trained on is not known; {_WAY}")
    former = read_json(path)
    differences = list(_differences(former, current))
    if differences:
        raise UsageError(f"{folder} is of another run ({'; '.join(differences)}); {_WAY}")
    _warn_of_versions(former.get("versions", {}), current["versions"])


_WAY = "give another --output_dir, or remove this one"


def _differences(former: dict[str, Any], current: dict[str, Any]) -> list[str]:
    differences = []
    for key in sorted({*former, *current} - {"flags", "versions"}):
        was, now = former.get(key), current.get(key)
        if was != now:
            hashed = isinstance(was, str) or isinstance(now, str)
            differences.append(f"the {key} changed" if hashed else f"{key} {was}, now {now}")
    was, now = former.get("flags", {}), current["flags"]
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            differences.append(f"--{name} {was.get(name)}, now {now.get(name)}")
    return differences


def _warn_of_versions(was: dict[str, str], now: dict[str, str]) -> None:
    for name in sorted(now):
        if was.get(name) != now[name]:
            print(f"note: begun with {name} {was.get(name)}, now {now[name]}", file=sys.stderr)
