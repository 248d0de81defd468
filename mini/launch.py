"""`python -m mini.launch`: what the launchers do where their caller names nothing.

train RECIPE [flags]          finetune*.sh and scripts/v1_5/*.sh
evaluate BENCHMARK [flags]    scripts/v1_5/eval/*.sh
select [METHOD|all] [flags]   selection.sh

Where the caller's environment and flags leave data and model to the launcher, the small world is
built, with what the command needs of it, and its parts are named. Then, and otherwise at once, the
flags are handed on: to a recipe (llava/recipe.py), to `python -m llava.eval`, or to the selection.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava import children
from llava import recipe as recipes
from llava.errors import UsageError
from llava.eval.tasks import find_task
from llava.flags import flag_values, run_verb
from llava.launch import launch, n_processes, process
from llava.recipe import Recipe, read_settings
from selection import prepare
from selection.methods import Method, get_method

HOME = Path(__file__).parent
WORLD = Path("playground/mini")
OUTPUTS = Path("outputs")
HELP = """\
From the environment, for every evaluation launcher:
  MODEL=              what is asked: a directory or a hub name; a LLaVA of any kind, or another
                      vision-language model
  MODEL_BASE=         what a LoRA was trained on (default: what its adapter_config.json names)
  DATA=               the benchmark's folder (default: LLaVA's, below playground/data/eval)
  IMAGES=             its pictures, where they are not in that folder
  OUTPUT=             run folder (default: outputs/eval/<model>/<benchmark>); the same command goes
                      on in it
  NPROC=8             processes on this machine (default: one a GPU, else one)
  TORCHRUN_ARGS=...   torchrun's flags for several machines
  PYTHON=...          this interpreter instead of .venv
With no MODEL, what finetune*.sh trained last on the small world is asked the small world's
questions, else its proxy.
Flags of 'python -m llava.eval run --help' can follow; the last of a kind counts."""


@dataclass(frozen=True)
class Part:
    """A part of the small world: the file that is there once it is made, and what makes it."""

    file: Path
    command: tuple[str, ...]
    """words after `python -m mini`"""


BUILT = Part(WORLD / "build.json", ("build", "--out", f"{WORLD}"))
PROXY = Part(
    WORLD / "proxy/warmup.json", ("warmup", "--data", f"{WORLD}", "--out", f"{WORLD}/proxy")
)
CAPTIONS = Part(WORLD / "captions.json", ("captions", "--data", f"{WORLD}"))
CLIP = Part(WORLD / "clip/clip.json", ("clip", "--data", f"{WORLD}", "--out", f"{WORLD}/clip"))


@dataclass(frozen=True)
class Preparation:
    """What is done before a command: packages of these `extras` of the project are installed, the
    `parts` of the small world made, and `note` is said."""

    parts: tuple[Part, ...] = ()
    extras: tuple[str, ...] = ()
    note: str = ""

    def do(self) -> None:
        """Do it; the program ends with the exit code of the first step that fails."""
        # scripts/setup.sh exports PYTHON, the environment that it has made. Where no launcher has
        # started this program, its user looks after the packages.
        if self.extras and "PYTHON" in os.environ:
            _step(["bash", str(HOME.parent / "scripts/setup.sh"), *self.extras], sys.stderr)
        for part in self.parts:
            # A maker that only finds its part made has nothing to tell.
            output = subprocess.DEVNULL if part.file.exists() else sys.stderr
            _step([sys.executable, "-m", "mini", *part.command], output)
        if self.note:
            print(self.note, file=sys.stderr, flush=True)


def _step(command: Sequence[str], output: object = None) -> None:
    code = subprocess.run(children.bound(command), stdout=output).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)


def training(name: str, environ: Mapping[str, str]) -> tuple[Recipe, Preparation]:
    """The recipe `name` as the environment has it, and what is to be done before.

    With no MODEL, and DATA of the small world or none, it trains the small world's model: by
    default on the subset that was selected last, else on the pool.
    """
    recipe, data = Recipe.read(name, environ), environ.get("DATA", "")
    if environ.get("MODEL") or (data and not of_small_world(data)):
        return recipe, Preparation(extras=_to_train(recipe))

    # What the recipe trains says what it starts from; MODEL and the others may have blurred that.
    plain = Recipe.read(name, {})
    flags = "finetune_lora" if plain.flags.get("lora_enable") == "True" else "finetune"
    start = {"MODEL": "mini/base/llama", "VISION_TOWER": "mini/base/clip", "PROJECTOR": ""}
    if plain.flags.get("tune_mm_mlp_adapter") == "True":
        flags, parts, default = "pretrain", (BUILT, CAPTIONS), f"{CAPTIONS.file}"
    else:
        parts, default = (BUILT,), newest_subset() or f"{WORLD}/pool.json"
        if plain.projector:
            start["PROJECTOR"] = "mini/base/projector.safetensors"
        else:  # a whole LLaVA, which brings its own tower and projector
            parts = (BUILT, PROXY)
            start = {"MODEL": f"{PROXY.file.parent}", "VISION_TOWER": "", "PROJECTOR": ""}
    data = data or default
    defaults = start | {
        "DATA": data,
        "IMAGES": f"{WORLD}/images",
        "OUTPUT": f"{OUTPUTS}/{recipe.name}-{Path(data).parent.name}",
        "ZERO": "zero2",
        "GLOBAL_BATCH": "16",
    }

    # An empty variable is one that is not set, but for the parts that a model may lack.
    given = {key: v for key, v in environ.items() if v or key in ("VISION_TOWER", "PROJECTOR")}
    recipe = Recipe.read(name, {**defaults, **given, "PER_DEVICE": "8"})
    small = {**recipe.flags, **read_settings(HOME / f"{flags}.yaml")}
    note = f"{recipe.name}: the small world, flags of mini/{flags}.yaml"
    extras = ("mini", *_to_train(recipe))
    return dataclasses.replace(recipe, flags=small, scaled=True), Preparation(parts, extras, note)


def _to_train(recipe: Recipe) -> tuple[str, ...]:
    return ("train",) if recipe.deepspeed else ()


def of_small_world(data: str | Path) -> bool:
    """Whether file `data` lies in the small world, or was selected from its pool."""
    folder = Path(data).parent
    if folder.resolve() == WORLD.resolve():
        return True
    try:
        pool = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["pool"]["path"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return f"/{pool}".endswith(f"/{WORLD}/pool.json")


def newest_subset() -> str | None:
    """The subset that was selected last from the small world."""
    manifests = sorted(OUTPUTS.glob("*/manifest.json"))
    ages = {path: path.stat().st_mtime_ns for path in manifests if of_small_world(path)}
    return f"{max(ages, key=ages.get).parent}/subset.json" if ages else None


def train(argv: list[str]) -> int:
    """Train by the recipe that `argv` begins with; the exit code."""
    if not argv or {"-h", "--help"}.intersection(argv):
        code = recipes.main(argv)
        print(
            "With neither MODEL nor DATA, or with DATA from the small world, the small world's "
            "model is trained."
        )
        return code
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    recipe, preparation = training(argv[0], os.environ)
    preparation.do()
    return recipe.run(argv[1:])


def evaluation(benchmark: str, environ: Mapping[str, str]) -> tuple[list[str], Preparation]:
    """Flags of `llava.eval run` for what the environment leaves open, and what is to be done
    before; UsageError where data of one's own comes without a model."""
    data, model = environ.get("DATA", ""), environ.get("MODEL", "")
    folder = find_task(benchmark).folder
    if data and not model and not _is_small(data):
        raise UsageError(
            f"DATA={data}, but no MODEL; say whose answers are wanted: "
            "MODEL=liuhaotian/llava-v1.5-7b"
        )

    # The small world's questions are for its own models, and for those that nobody names.
    parts: list[Part] = []
    if _is_small(data or model or WORLD):
        parts.append(BUILT)
        data = data or f"{WORLD}/eval/{folder}"
    note = ""
    if not model:
        model, why = newest_model(), "what was trained last"
        if model is None:
            parts.append(PROXY)
            model, why = f"{PROXY.file.parent}", "no finetune*.sh has finished yet"
        note = f"{benchmark}: the small world; MODEL={model}, {why}"

    # Data that is not said is LLaVA's, which the benchmark itself finds.
    flags = {
        "benchmark": benchmark,
        "data": data,
        "images": environ.get("IMAGES"),
        "model": model,
        "model-base": environ.get("MODEL_BASE") or _trained_on(Path(model)),
        "out": environ.get("OUTPUT") or f"{OUTPUTS}/eval/{Path(model).name}/{benchmark}",
    }
    words = [word for name, value in flags.items() if value for word in (f"--{name}", value)]
    return words, Preparation(tuple(parts), ("mini",) if parts else (), note)


def _is_small(path: str | Path) -> bool:
    """Whether `path` lies in the small world, or is named as a model trained on it by default."""
    path, outputs = Path(path).resolve(), OUTPUTS.resolve()
    if path.is_relative_to(WORLD.resolve()):
        return True
    inside = path.is_relative_to(outputs) and path != outputs
    return inside and path.relative_to(outputs).parts[0].startswith("finetune")


def newest_model() -> str | None:
    """The small world's model that was finished last."""
    ages = {path: path.stat().st_mtime_ns for path in sorted(OUTPUTS.glob("finetune*/COMPLETE"))}
    return f"{max(ages, key=ages.get).parent}" if ages else None


def _trained_on(model: Path) -> str | None:
    """What a LoRA names as its base; None for another model."""
    try:
        adapter = json.loads((model / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return adapter.get("base_model_name_or_path")


def evaluate(argv: list[str]) -> int:
    """Ask a model the questions of the benchmark that `argv` begins with; the exit code."""
    if not argv or argv[0].startswith("-"):
        print(f"usage: python -m mini.launch evaluate BENCHMARK [flags]\n\n{HELP}")
        return 0
    benchmark, *flags = argv
    if {"-h", "--help"}.intersection(flags):
        task = find_task(benchmark)
        print(f"{inspect.getmodule(task).__doc__}\n{inspect.getdoc(task)}\n\n{HELP}")
        return 0
    words, preparation = evaluation(benchmark, os.environ)
    preparation.do()
    if n_processes() > 1 or os.environ.get("TORCHRUN_ARGS"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return launch("llava.eval", ["run", *words, *flags])


@dataclass(frozen=True)
class Selecting:
    """What `selection.sh` asks for.

    `argv` are the words after `python -m selection`; `recipe` is how models of a method's own are
    trained; `reports` says whether the oracle labels of the subset are told at the end.
    """

    argv: list[str]
    preparation: Preparation
    recipe: Recipe
    reports: bool


def selecting(argv: Sequence[str], environ: Mapping[str, str]) -> Selecting:
    """What `argv`, `[METHOD|all] [flags]`, stands for in this environment.

    Without METHOD it is ards, or what the `--config` file says. Without `--pool` it is the small
    world's, and a method that trains no proxy of its own gets the small world's. The caller's flags
    come after these defaults. Raises UsageError for an unknown method.
    """
    named = bool(argv) and not argv[0].startswith("-")
    name, flags = (argv[0], argv[1:]) if named else ("ards", argv)
    given = flag_values(flags)
    only_told = prepare.only_told(flags)
    method = None if name == "all" else get_method(name)
    if method is None:
        verb = ["all"]
    else:
        verb = ["select", name] if named or "config" not in given else ["select"]

    # A pool of the caller's, a file of settings and a question for help leave no default open.
    small = not (only_told or given.keys() & {"pool", "config"})
    defaults, parts = _small_defaults(name, method) if small else ([], ())
    extras = ["mini"] if small else []
    pool = given.get("pool", f"{WORLD}/pool.json")
    size = environ.get("SIZE") or "7b"
    recipe, _ = training("finetune_lora", {**environ, "SIZE": size, "DATA": pool, "OUTPUT": ""})
    trains = method is None or any(
        not (one.instead_of_model and "model" in given) for one in method().training()
    )
    if trains and not (only_told or given.keys() & {"config", "dry_run"}):
        extras += _to_train(recipe)
    if given.get("judge_url") or _settings(Path(given.get("config", ""))).get("judge_url"):
        extras.append("judge")
    return Selecting(
        [*verb, *defaults, *flags],
        Preparation(parts, tuple(extras)),
        recipe,
        reports=small and "dry_run" not in given,
    )


def _small_defaults(name: str, method: type[Method] | None) -> tuple[list[str], tuple[Part, ...]]:
    """Flags of method `name`, or of all (None), on the small world, and the parts they name."""
    file, parts = HOME / f"{name}.yaml", [BUILT]
    words = ["--config", f"mini/{file.name}"] if file.is_file() else []
    words += ["--pool", f"{WORLD}/pool.json", "--images", f"{WORLD}/images"]
    if method is None or method.target_signals is not Method.target_signals:
        words += ["--targets", f"{WORLD}/targets/targets.yaml"]
    if method is None or any(one.instead_of_model for one in method().training()):
        words += ["--budget", "0.2"]
    else:
        parts.append(PROXY)
        words += ["--model", f"{PROXY.file.parent}", "--budget", "0.3"]
    if method is None:
        words += ["--settings", "mini"]
    if method is None or _settings(file).get("clip") == f"{CLIP.file.parent}":
        parts.append(CLIP)
    return words, tuple(parts)


def _settings(file: Path) -> dict[str, Any]:
    """What a YAML file sets; what is wrong with it, the selection itself will say."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def select(argv: list[str]) -> int:
    """Choose a subset as `selecting` has it; the exit code."""
    asked = selecting(argv, os.environ)
    if not prepare.only_told(asked.argv):
        prepare.Asked.read(asked.argv)  # mistakes are told before anything is built or installed
    asked.preparation.do()
    code = prepare.main(asked.argv, asked.recipe)
    if code == 0 and asked.reports:
        out = flag_values(argv).get("out")
        _step([sys.executable, "-m", "mini", "report", *(["--run", out] if out else [])])
    return code


def main() -> None:
    """Run one verb; it decides the exit code."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    verbs = {"train": train, "evaluate": evaluate, "select": select}
    sys.exit(run_verb(None, __doc__, verbs))


if __name__ == "__main__":
    process(main)
