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
from llava.files import digest_of
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
        return cls.of(*parse_select(words))

    @classmethod
    def of(cls, job: Job, dry_run: bool = False) -> Asked:
        """What one `select` asks for."""
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


def only_told(argv: Sequence[str]) -> bool:
    """Whether help or a configuration is all that is asked for."""
    names = flag_values(argv)
    return "-h" in argv or any(name.startswith(("help", "print_config")) for name in names)


def main(argv: Sequence[str], recipe: Recipe) -> int:
    """Train what is missing by `recipe`, then run `python -m selection argv`; the exit code.

    `recipe` says how a LoRA is trained: its model, sizes and flags. Mistakes in `argv` are told
    before anything is trained. Raises UsageError where a dry run would have to train first.
    """
    if only_told(argv):
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
                result = warm_up(training, asked, recipe).do()
                filled |= {training.fills: str(result), training.base_fills: recipe.model}
            else:
                result = co_train(training, asked, recipe, argv[1:]).do()
                filled[training.fills] = str(result / training.result)
    except Failed as failed:
        return failed.code
    return launch("selection", [*argv, *(f"--{name}={value}" for name, value in filled.items())])


@dataclass(frozen=True)
class Step:
    """One training: the `folder` that is named by all that shapes its result, the run that makes
    its `samples` (flags of `select`, and where it writes), the recipe and its further flags."""

    folder: Path
    samples: Path
    select: tuple[str, ...]
    recipe: Recipe
    flags: tuple[str, ...]
    moments: bool = False

    @property
    def result(self) -> Path | None:
        """The finished model, or its newest whole checkpoint with moments; None if there is none.

        Every byte is compared with what the training wrote.
        """
        from llava.train import checkpoints

        model = self.folder / "model"
        if not (model / checkpoints.MARKER).is_file() or checkpoints.flaw(model) is not None:
            return None
        return checkpoints.newest_complete(model) if self.moments else model

    def do(self) -> Path:
        """Train unless it is done; the result. Raises Failed with the exit code of what failed."""
        if self.result is None:
            for code in (self._run_samples, self._train):
                if failed := code():
                    raise Failed(failed)
        result = self.result
        if result is None:
            raise UsageError(f"{self.folder}: is not whole; remove it and run the command again")
        return result

    def _run_samples(self) -> int:
        return launch("selection", ["select", *self.select, f"--out={self.samples}"])

    def _train(self) -> int:
        data, model = self.samples / "subset.json", self.folder / "model"
        return replace(self.recipe, data=str(data), output=str(model)).run(self.flags)


def warm_up(training: WarmUp, asked: Asked, recipe: Recipe) -> Step:
    """A LoRA on a random part of the pool."""
    from selection.run import Execution

    select = SelectSettings(training.share, seed=training.seed)
    samples = _of_pool(Execution(Job(Random(), asked.pool, select=select)).identity())
    recipe, flags = replace(recipe, images=asked.pool.images or "."), []
    if training.moments:  # DeepSpeed keeps them in files of its own
        recipe, flags = replace(recipe, zero="none"), ["--save_strategy", "epoch"]
    shaping = {"samples": samples, "moments": training.moments, **shape(recipe, flags)}
    folder = _folder("warmup", asked.pool, shaping)
    words = {**asdict(asked.pool), "budget": training.share, "seed": training.seed}
    drawing = ("random", *_words(words))
    flags += _roots(asked.pool)
    return Step(folder, folder / "samples", drawing, recipe, tuple(flags), training.moments)


def co_train(training: CoTrain, asked: Asked, recipe: Recipe, argv: Sequence[str]) -> Step:
    """The method's own training on samples that a run of the method prepares; `argv` are the
    words of `select` for that run."""
    from selection.run import Execution

    # The run that draws and prepares the samples is told apart by every setting, as all runs are.
    settings = {k: v for k, v in training.preparing.items() if k != "budget"}
    budget = str(training.preparing["budget"])
    method = type(asked.job.method)(replace(asked.job.method.settings, **settings))
    select = replace(asked.job.select, budget=budget)
    identity = Execution(replace(asked.job, method=method, select=select)).identity()
    dtype = asked.job.proxy.dtype
    samples = _folder("prepared", asked.pool, {**identity, "dtype": dtype})

    # The training has the paper's sizes where the recipe has LLaVA's.
    flags = {**training.flags, **({} if recipe.scaled else training.paper_flags)}
    recipe = replace(recipe, module=training.module, images=asked.pool.images or ".")
    if training.paper_batch and not recipe.scaled and not os.environ.get("GLOBAL_BATCH"):
        recipe = replace(recipe, global_batch=training.paper_batch)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    shaping = {
        **_of_pool(identity),
        "settings": {k: v for k, v in identity["settings"].items() if k not in training.apart},
        "dtype": dtype,
    }
    folder = _folder("cotrain", asked.pool, {"samples": shaping, **shape(recipe, words)})
    return Step(
        folder,
        samples,
        (*argv, *_words({**settings, "budget": budget})),
        recipe,
        (f"--{training.prepared_flag}", str(samples), *words, *_roots(asked.pool)),
    )


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
    """The folder of `shaping`; one that a pool of another name has led to is the same."""
    from selection.run import pool_label

    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:12]
    there = sorted(OUTPUTS.glob(f"{kind}-*-{digest}"))
    return there[0] if there else OUTPUTS / f"{kind}-{pool_label(pool.pool)}-{digest}"


def _words(values: Mapping[str, Any]) -> list[str]:
    """Settings as flags; those that are None or empty are left to their defaults."""
    lists = {k: f"[{','.join(v)}]" for k, v in values.items() if isinstance(v, tuple) and v}
    return [f"--{k}={v}" for k, v in {**values, **lists}.items() if v is not None and v != ()]


def _sha256(path: str) -> str:
    try:
        return digest_of(path)
    except OSError as error:
        raise UsageError(f"PROJECTOR={path}: {error.strerror}") from None
