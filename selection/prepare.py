"""What a method wants trained before it can select, and the start of the selection after that.

`selection.sh` comes here. A method declares its trainings (`Method.training`); what the caller
names himself is left out, the rest is trained through the launcher, into a folder whose name is a
hash of everything that shapes the result: no other model is ever taken for it, and one that fits
is not trained twice. Then the selection starts, with the results among its flags.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import UsageError
from llava.flags import flag_values
from llava.launch import launch
from selection.cli import parse_plain, parse_select
from selection.methods.base import CoTrain, Training, WarmUp
from selection.methods.random import Random
from selection.settings import AllSettings, Job, PoolSettings, ProxySettings, SelectSettings

if TYPE_CHECKING:
    from llava.recipe import Recipe

OUTPUTS = Path("outputs")


class Failed(Exception):
    """A step that ended with an exit code, and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Asked:
    """What the command line asks for: the pool, every setting by name, and what is wanted trained.

    `job` is None for `all`.
    """

    pool: PoolSettings
    settings: Mapping[str, Any]
    trainings: Sequence[Training]
    dry_run: bool
    job: Job | None

    @classmethod
    def read(cls, argv: Sequence[str]) -> Asked:
        """From the words after `python -m selection`; UsageError for any that is wrong."""
        verb, *words = argv
        if verb == "all":
            from selection.all import training

            groups = (PoolSettings, ProxySettings, SelectSettings, AllSettings)
            pool, proxy, _, settings = parse_plain("all", "", words, *groups)
            values = {**asdict(proxy), **asdict(settings)}
            return cls(pool, values, training(proxy, settings), dry_run=False, job=None)
        job, dry_run = parse_select(words)
        settings = {**asdict(job.proxy), **asdict(job.method.settings)}
        return cls(job.pool, settings, job.method.training(), dry_run, job)

    @property
    def missing(self) -> list[Training]:
        """What is to be trained: nothing that the caller has named."""
        return [
            training
            for training in self.trainings
            if self.settings[training.fills] is None
            and not (training.instead_of_model and self.settings["model"])
        ]


def main(argv: Sequence[str], recipe: Recipe) -> int:
    """Train what is missing by `recipe`, then run `python -m selection argv`; the exit code.

    `recipe` says how a LoRA is trained: its model, sizes and flags. Mistakes in `argv` are told
    before anything is trained. Raises UsageError where a dry run would have to train first.
    """
    given = flag_values(argv)
    if "-h" in argv or any(name.startswith(("help", "print_config")) for name in given):
        return launch("selection", argv, 1)
    asked = Asked.read(argv)
    if asked.dry_run and asked.missing:
        first = asked.missing[0]
        raise UsageError(
            f"--dry_run: {asked.job.method.name} would first train a model; name one with "
            f"--{'model' if first.instead_of_model else first.fills}"
        )
    filled: dict[str, str] = {}
    try:
        for training in asked.missing:
            if isinstance(training, WarmUp):
                filled |= warm_up(training, asked, recipe)
            else:
                filled |= co_train(training, asked, recipe, argv)
    except Failed as failed:
        return failed.code
    return launch("selection", [*argv, *(f"--{name}={value}" for name, value in filled.items())])


def warm_up(training: WarmUp, asked: Asked, recipe: Recipe) -> dict[str, str]:
    """Train a LoRA on a random part of the pool; the settings that name it and its base."""
    from selection.run import Execution

    job = Job(Random(), asked.pool, select=SelectSettings(training.share, seed=training.seed))
    execution, recipe = Execution(job), replace(recipe, images=asked.pool.images or ".")
    flags = _roots(asked.pool)
    if training.moments:  # DeepSpeed keeps them in files of its own
        recipe = replace(recipe, zero="none")
        flags += ["--save_strategy", "epoch"]
    samples = _of_pool(execution.identity())
    folder = _folder("warmup", asked.pool, {"samples": samples, **shape(recipe, flags)})
    model = folder / ("moments" if training.moments else "model")
    if _result(model, training.moments) is None:
        out = SelectSettings(training.share, seed=training.seed, out=str(folder / "samples"))
        subset = Execution(replace(job, select=out), execution.pool).execute().subset
        _train(replace(recipe, data=str(subset), output=str(model)), flags)
    result = _finished(model, training.moments)
    return {training.fills: str(result), training.base_fills: recipe.model}


def co_train(
    training: CoTrain, asked: Asked, recipe: Recipe, argv: Sequence[str]
) -> dict[str, str]:
    """Run the method's own training on samples that it prepares; the setting that names the
    result."""
    from selection.run import Execution

    # The method's own run that draws and prepares the samples.
    job = asked.job
    budget = training.preparing["budget"]
    settings = {k: v for k, v in training.preparing.items() if k != "budget"}
    method = type(job.method)(replace(job.method.settings, **settings))
    preparing = replace(job, method=method, select=replace(job.select, budget=str(budget)))
    identity = Execution(preparing).identity()
    samples = _folder("prepared", asked.pool, {**identity, "dtype": job.proxy.dtype}) / "samples"

    # The training, with the paper's sizes where the recipe has LLaVA's.
    flags = {**training.flags, **({} if recipe.scaled else training.paper_flags)}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += _roots(asked.pool)
    recipe = replace(recipe, module=training.module, images=asked.pool.images or ".")
    if training.paper_batch and not recipe.scaled and not os.environ.get("GLOBAL_BATCH"):
        recipe = replace(recipe, global_batch=training.paper_batch)
    shaping = {
        **_of_pool(identity),
        "settings": {k: v for k, v in identity["settings"].items() if k not in training.apart},
        "dtype": job.proxy.dtype,
    }
    folder = _folder("cotrain", asked.pool, {"samples": shaping, **shape(recipe, words)})
    if _result(folder / "model") is None:
        own = [*(f"--{name}={value}" for name, value in settings.items()), f"--budget={budget}"]
        if code := launch("selection", [*argv, *own, f"--out={samples}"]):
            raise Failed(code)
        recipe = replace(recipe, data=str(samples / "subset.json"), output=str(folder / "model"))
        _train(recipe, [f"--{training.prepared_flag}", str(samples), *words])
    return {training.fills: str(_finished(folder / "model") / training.result)}


def shape(recipe: Recipe, flags: Sequence[str]) -> dict[str, Any]:
    """What shapes a model trained by `recipe` but for the samples: models by their contents."""
    from llava.model.checkpoint import Checkpoint

    contents = {
        "model": Checkpoint.open(recipe.model).fingerprint(),
        "vision_tower": Checkpoint.open(recipe.vision_tower).fingerprint()
        if recipe.vision_tower
        else None,
        "projector": _sha256(recipe.projector) if recipe.projector else None,
    }
    return {**recipe.shape(flags), **contents, "images": str(Path(recipe.images).resolve())}


def _roots(pool: PoolSettings) -> list[str]:
    """Where links inside the image folder may lead to, as flags of the training."""
    return ["--image_roots", *pool.image_roots] if pool.image_roots else []


def _of_pool(identity: Mapping[str, Any]) -> dict[str, Any]:
    """A run's identity without what only says how its pool was named."""
    pool = {"sha256": identity["pool"]["sha256"], "n": identity["pool"]["n"]}
    return {**identity, "pool": pool}


def _folder(kind: str, pool: PoolSettings, shaping: Mapping[str, Any]) -> Path:
    from selection.run import pool_label

    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
    return OUTPUTS / f"{kind}-{pool_label(pool.pool)}-{digest[:12]}"


def _train(recipe: Recipe, flags: Sequence[str]) -> None:
    if code := recipe.run(flags):
        raise Failed(code)


def _result(folder: Path, moments: bool = False) -> Path | None:
    """The finished model in `folder`, or its newest whole checkpoint; None where there is none."""
    from llava.train import checkpoints

    if not (folder / checkpoints.MARKER).is_file() or checkpoints.flaw(folder) is not None:
        return None
    return checkpoints.newest_complete(folder) if moments else folder


def _finished(folder: Path, moments: bool = False) -> Path:
    """`_result` of a training that ended well."""
    result = _result(folder, moments)
    if result is None:
        raise UsageError(f"{folder}: is not whole any more; remove it and run the command again")
    return result


def _sha256(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"PROJECTOR={path}: {error.strerror}") from None
