"""`python -m llava.recipe NAME [flags]`: a training recipe, one YAML file, started on every GPU.

NAME is a file of `scripts/v1_5/` without its ending, or the path of one of your own; common.yaml
there holds what a recipe has unless it says otherwise. `--help` explains the environment.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava.errors import UsageError
from llava.flags import flag_values
from llava.launch import launch, n_processes, process

FOLDER = Path(__file__).parents[1] / "scripts" / "v1_5"
ENVIRONMENT = """\
From the environment, for every training launcher:
  DATA= IMAGES=       LLaVA JSON, and the folder of its images
  MODEL=              what training starts from: a directory or a hub name
  VISION_TOWER=       CLIP, and PROJECTOR= an mm_projector.bin, for a MODEL that is a language model
  OUTPUT=             where the result goes
  SIZE=7b             which LLaVA-1.5 the defaults name: 7b or 13b
  ZERO=zero2          zero2, zero3, zero3_offload, a DeepSpeed file of your own, or none (plain data
                      parallelism)
  GLOBAL_BATCH=128    samples an optimizer step; kept whatever the number of processes, by
                      accumulation
  NPROC=8             processes on this machine (default: one a GPU, else two)
  TORCHRUN_ARGS=...   torchrun's flags for several machines: see scripts/slurm/
  REPORT_TO=wandb     tracker (default: none)
  TRAINING=...        another training program (default: llava.train.train_mem)
  PYTHON=...          this interpreter instead of .venv"""
_VARIABLES = {
    "model": "MODEL",
    "data": "DATA",
    "images": "IMAGES",
    "vision_tower": "VISION_TOWER",
    "projector": "PROJECTOR",
    "output": "OUTPUT",
    "zero": "ZERO",
    "global_batch": "GLOBAL_BATCH",
    "per_device": "PER_DEVICE",
    "report_to": "REPORT_TO",
    "module": "TRAINING",
}
_MAY_BE_EMPTY = ("vision_tower", "projector")
# Flags that leave the trained model as it is.
_WITHOUT_EFFECT = frozenset(
    "output_dir run_name logging_dir logging_steps logging_strategy logging_first_step log_level "
    "report_to disable_tqdm save_steps save_strategy save_total_limit save_safetensors eval_steps "
    "eval_strategy evaluation_strategy eval_on_start eval_data_path per_device_eval_batch_size "
    "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
    "dataloader_persistent_workers lazy_preprocess ddp_timeout cache_dir plan json".split()
)


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how. Paths are as they are typed, from the working directory.

    `flags` are flags of the training by name, with their values as text; those that the caller
    adds beat them. What is empty of `vision_tower` and `projector` is not passed on.
    """

    name: str
    model: str
    data: str
    images: str
    output: str
    vision_tower: str
    projector: str
    zero: str
    """zero2, zero3, zero3_offload, a DeepSpeed file, or none"""
    global_batch: int
    """samples an optimizer step, of all processes together"""
    per_device: int
    """samples of a process at a time, where they divide the global batch"""
    flags: Mapping[str, str]
    module: str
    """the training program, started as `python -m`"""
    report_to: str
    about: str = ""
    scaled: bool = False
    """whether its sizes are another world's than LLaVA's, so that no paper's rates fit it"""

    @classmethod
    def read(cls, name: str, environ: Mapping[str, str] = os.environ) -> Recipe:
        """The recipe `name`, or of the YAML file `name`, with the caller's environment over it.

        Raises UsageError for a file that is not there or is no recipe, and for a number that is
        none.
        """
        path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
        common, its_own = read_settings(FOLDER / "common.yaml"), read_settings(path)
        settings = common | its_own | {"flags": common["flags"] | its_own.get("flags", {})}
        size = environ.get("SIZE") or settings.pop("size")
        settings.pop("size", None)
        for key, variable in _VARIABLES.items():
            value = environ.get(variable)
            if value or (value is not None and key in _MAY_BE_EMPTY):
                settings[key] = value
            elif key in settings:
                settings[key] = settings[key].replace("{size}", size)
        unknown = settings.keys() - {*_VARIABLES, "flags", "about"}
        missing = {"model", "output"} - settings.keys()
        if unknown or missing:
            raise UsageError(f"{path}: {_wrong_key(unknown, missing)}")
        for key in ("global_batch", "per_device"):
            settings[key] = _number(_VARIABLES[key], settings[key])
        return cls(name=path.stem, **settings)

    def batch(self, processes: int, argv: Sequence[str] = ()) -> tuple[int, int]:
        """Samples of a process at a time, and how many such batches make a step.

        The caller's flags decide, where they say. Else a process takes `per_device`, or the next
        smaller number with which `processes` share the global batch; UsageError if none does.
        """
        given = {**self.flags, **flag_values(argv)}
        each = given.get("per_device_train_batch_size")
        accumulated = given.get("gradient_accumulation_steps")
        if each is None:
            n_each = self.per_device
            while n_each > 1 and self.global_batch % (n_each * processes):
                n_each -= 1
        else:
            n_each = _number("--per_device_train_batch_size", each)
        if accumulated is not None:
            return n_each, _number("--gradient_accumulation_steps", accumulated)
        if self.global_batch % (n_each * processes):
            raise UsageError(
                f"GLOBAL_BATCH={self.global_batch} does not divide among {processes} processes of "
                f"{n_each}; set another, or --per_device_train_batch_size and "
                "--gradient_accumulation_steps"
            )
        return n_each, self.global_batch // (n_each * processes)

    def argv(self, processes: int, argv: Sequence[str] = ()) -> list[str]:
        """Flags of the training by `processes` processes, on all machines together.

        The caller's `argv` is last: it has the last word. UsageError as `batch`.
        """
        each, accumulated = self.batch(processes, argv)
        flags = {
            "deepspeed": self.deepspeed,
            "model_name_or_path": self.model,
            "data_path": self.data,
            "image_folder": self.images,
            "output_dir": self.output,
            "vision_tower": self.vision_tower,
            "pretrain_mm_mlp_adapter": self.projector,
            "report_to": self.report_to,
            "per_device_train_batch_size": str(each),
            "gradient_accumulation_steps": str(accumulated),
            **self.flags,
        }
        words = [word for name, value in flags.items() if value for word in (f"--{name}", value)]
        return [*words, *argv]

    @property
    def deepspeed(self) -> str:
        """The DeepSpeed file; empty for plain data parallelism."""
        if self.zero == "none":
            return ""
        return self.zero if self.zero.endswith(".json") else f"scripts/{self.zero}.json"

    def shape(self, argv: Sequence[str] = ()) -> dict[str, Any]:
        """All that decides the trained model but the data, for JSON: models are told by name.

        Neither the number of processes nor where, how often and how loud results are written.
        """
        flags = {**self.flags, **flag_values(argv)}
        return {
            "module": self.module,
            "model": self.model,
            "vision_tower": self.vision_tower,
            "projector": self.projector,
            "zero": self.zero,
            "global_batch": self.global_batch,
            "flags": {name: flags[name] for name in sorted(flags.keys() - _WITHOUT_EFFECT)},
        }

    def run(self, argv: Sequence[str] = ()) -> int:
        """Train with the caller's flags `argv`; the exit code. With `--plan` only plan.

        The environment's NPROC and TORCHRUN_ARGS say on how many processes. Raises UsageError for
        data that is not there, and as `batch`.
        """
        if not Path(self.data).is_file():
            raise UsageError(f"DATA={self.data}: no such file")
        torchrun = flag_values(os.environ.get("TORCHRUN_ARGS", "").split())
        on_this_machine = n_processes(without_gpu=2)
        processes = on_this_machine * _number("--nnodes", torchrun.get("nnodes", "1"))
        each, accumulated = self.batch(processes, argv)
        print(
            f"{self.name}: {processes} processes x {each} samples x {accumulated} accumulated = "
            f"{processes * each * accumulated} samples a step",
            file=sys.stderr,
        )
        words = self.argv(processes, argv)
        environ = {"OMP_NUM_THREADS": "1", **os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if "--plan" in argv:  # needs no processes but this one, which plans for all
            environ |= {"WORLD_SIZE": str(processes), "TORCHRUN_ARGS": ""}
            return launch("llava.train", words, 1, environ)
        told = f"{self.name}: trains {self.model} on {self.data}, into {self.output}"
        print(told, file=sys.stderr, flush=True)
        return launch(self.module, words, on_this_machine, environ)


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML mapping whose values stay as they are typed: `no` is no, and 2e-5 is 2e-5.

    Raises UsageError for a file that is not there or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.BaseLoader(text).get_single_data()
    except FileNotFoundError:
        recipes = sorted({file.stem for file in FOLDER.glob("*.yaml")} - {"common"})
        raise UsageError(
            f"{path}: no such recipe; there are {', '.join(recipes)}, or the path of a YAML file"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("flags", {}), dict):
        raise UsageError(f"{path}: not a YAML mapping of settings, with flags: another")
    return settings


def _wrong_key(unknown: set[str], missing: set[str]) -> str:
    if not unknown:
        return f"a recipe says its {' and '.join(sorted(missing))}"
    word = min(unknown)
    near = difflib.get_close_matches(word, ["size", "flags", "about", *_VARIABLES], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; flags of the training go below flags:"
    return f"{word}: no setting of a recipe{hint}"


def _number(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f"{name}={value}: give a number of at least 1")
    return int(value)


def main(argv: Sequence[str]) -> int:
    """Print the help of the recipe that `argv` begins with, or train by it; the exit code."""
    if not argv or argv[0].startswith("-"):
        print(__doc__.strip())
        return 0
    recipe = Recipe.read(argv[0])
    if {"-h", "--help"}.intersection(argv):
        print(f"{recipe.about}\n{ENVIRONMENT}")
        print("Flags of 'python -m llava.train --help_all' can follow; the last of a kind counts.")
        return 0
    return recipe.run(argv[1:])


if __name__ == "__main__":
    process(lambda: sys.exit(main(sys.argv[1:])))
