"""The launchers in bash: they set up, and hand everything on to one Python command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llava.eval.tasks import task_names
from llava.recipe import Recipe
from tests.slurm import install

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("*.sh"), *(ROOT / "scripts").rglob("*.s*h")])
EVAL = "scripts/v1_5/eval"
# launcher -> recipe, and the SIZE it names where the caller does not
TRAINED = {
    "finetune_lora.sh": ("finetune_lora", "7b"),
    "finetune_7b.sh": ("finetune", "7b"),
    "finetune.sh": ("finetune", "13b"),
    "scripts/v1_5/pretrain.sh": ("pretrain", ""),
    "scripts/v1_5/finetune.sh": ("finetune", ""),
    "scripts/v1_5/finetune_lora.sh": ("finetune_lora", ""),
    "scripts/v1_5/finetune_task.sh": ("finetune_task", ""),
    "scripts/v1_5/finetune_task_lora.sh": ("finetune_task_lora", ""),
}
VARIABLES = "DATA IMAGES MODEL OUTPUT SIZE TOKENIZERS_PARALLELISM".split()


@dataclass
class Handed:
    """How a launcher ended, and the Python commands that it gave: their words and variables."""

    code: int
    stderr: str
    commands: list[list[str]] = field(default_factory=list)
    environments: list[dict[str, str]] = field(default_factory=list)
    installed: list[str] = field(default_factory=list)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The shell part of a clone in which nothing has run yet."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("constraints.txt", "pyproject.toml", *(p.name for p in ROOT.glob("*.sh"))):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def launch(clone: Path, tmp_path: Path) -> Callable[..., Handed]:
    """Run a launcher with a PYTHON that notes what it is told to run instead of running it.

    The environment is given by keywords. What a selection would write is there afterwards.
    """
    python, record = tmp_path / "python", tmp_path / "record"
    noted = "\t".join(f"${{{name}:-}}" for name in VARIABLES)
    python.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  "-c import sys; print(sys.prefix)") echo "{tmp_path}" ;;
  "-m pip install"*) echo "pip $*" >>"{record}" ;;
  "-m pip"*) ;;
  *)
    printf '%s\\t' "{noted}" "$@" >>"{record}"
    echo >>"{record}"
    if [ "$3" = select ]; then mkdir -p "${{@: -1}}" && touch "${{@: -1}}/subset.json"; fi
    exit "${{CODE:-0}}" ;;
esac
"""
    )
    python.chmod(0o755)

    def launch(launcher: str, *flags: str, **environment: str) -> Handed:
        record.write_text("")
        inherited = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "NPROC")}
        done = subprocess.run(
            ["bash", clone / launcher, *flags],
            env={**inherited, "PYTHON": str(python), **environment},
            capture_output=True,
            text=True,
        )
        handed = Handed(done.returncode, done.stderr)
        for line in record.read_text().splitlines():
            if line.startswith("pip "):
                handed.installed.append(line)
                continue
            values = line.split("\t")[:-1]
            handed.commands.append(values[len(VARIABLES) :])
            handed.environments.append(dict(zip(VARIABLES, values, strict=False)))
        return handed

    return launch


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_is_clean(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_is_short_and_reads_no_file_format(path):
    """What a command means is Python's to know; setup.sh has no Python yet."""
    if path.name != "setup.sh":
        text = path.read_text()
        assert len(text.splitlines()) <= 40
        code = [line for line in text.splitlines() if not line.startswith("#")]
        assert not [line for line in code if "sed " in line or "grep " in line or "awk " in line]


@pytest.mark.parametrize("launcher", TRAINED)
def test_a_training_is_handed_on(launcher, launch):
    recipe, size = TRAINED[launcher]
    flags = ["--learning_rate", "1e-6", "--run_name", "two words"]
    done = launch(launcher, *flags, DATA="d", MODEL="m")
    assert done.code == 0, done.stderr
    assert done.commands == [["-m", "mini.launch", "train", recipe, *flags]]
    (environment,) = done.environments
    assert (environment["DATA"], environment["MODEL"], environment["SIZE"]) == ("d", "m", size)
    assert launch(launcher, CODE="75").code == 75


def test_a_size_is_the_callers_where_the_launcher_has_none(launch):
    for launcher, (_, size) in TRAINED.items():
        fixed = launcher in ("finetune_7b.sh", "finetune.sh")
        (environment,) = launch(launcher, SIZE="70b").environments
        assert environment["SIZE"] == (size if fixed else "70b")


def test_a_recipe_of_ones_own_is_handed_on(launch):
    done = launch("scripts/v1_5/train.sh", "mine.yaml", "--packing", "True")
    assert done.commands == [["-m", "mini.launch", "train", "mine.yaml", "--packing", "True"]]


OF_LLAVA = {*"sqa seed mmbench mmbench_cn gqa pope textvqa mme".split()}
OF_ARDS = {*"aokvqa mmmu arc_e boolq gqa_ood".split()}


def test_the_papers_benchmarks_have_launchers_of_their_names():
    assert OF_LLAVA | OF_ARDS == {path.stem for path in (ROOT / EVAL).glob("*.sh")}
    assert OF_LLAVA | OF_ARDS <= {*task_names()}


@pytest.mark.parametrize("benchmark", task_names())
def test_an_evaluation_is_handed_on(benchmark, launch):
    """A benchmark that is only a task file is asked by its name."""
    words = [f"{EVAL}/{benchmark}.sh"]
    if not (ROOT / words[0]).exists():
        words = ["scripts/v1_5/evaluate.sh", benchmark]
    done = launch(*words, "--symbols", "snvf", MODEL="m")
    assert done.code == 0, done.stderr
    assert done.commands == [["-m", "mini.launch", "evaluate", benchmark, "--symbols", "snvf"]]
    assert done.environments[0]["MODEL"] == "m"


@pytest.mark.parametrize("flags", [[], ["random", "--out", "a b"], ["--config", "c.yaml"]])
def test_a_selection_is_handed_on(flags, launch):
    done = launch("selection.sh", *flags)
    assert done.code == 0, done.stderr
    assert done.commands == [["-m", "mini.launch", "select", *flags]]
    assert launch("selection.sh", CODE="65").code == 65


@pytest.mark.parametrize(
    ("task", "method", "seed"), [(0, "ards", 5), (1, "random", 5), (3, "random", 6)]
)
def test_array_of_methods_and_seeds(launch, clone, tmp_path, task, method, seed):
    """Each task selects with its method and seed, then trains on that subset, and on no other."""
    (tmp_path / "bin").mkdir()
    (clone / "outputs").mkdir()
    job = install(tmp_path / "bin", 1) | {"SLURM_SUBMIT_DIR": str(clone), "SEEDS": "5 6"}
    job |= {"NPROC": "1", "POOL": "pool.json", "IMAGES": "images", "PROXY": "proxy", "MODEL": "m"}
    done = launch("scripts/slurm/methods.sbatch", SLURM_ARRAY_TASK_ID=str(task), **job)
    assert done.code == 0, done.stderr
    selected, trained = done.commands
    run = f"outputs/{method}-0.3-{seed}"
    flags = f"--pool pool.json --images images --model proxy --seed {seed} --budget 0.3 --out {run}"
    assert selected == ["-m", "mini.launch", "select", method, *flags.split()]
    assert trained[:4] == ["-m", "mini.launch", "train", "finetune_lora"]
    recipe = Recipe.read("finetune_lora", done.environments[1])
    assert recipe.data == f"{run}/subset.json" and trained[4:6] == ["--seed", str(seed)]
    assert recipe.output == f"checkpoints/{method}-0.3-{seed}-lora" and recipe.model == "m"


def test_array_larger_than_its_table(launch, clone, tmp_path):
    (tmp_path / "bin").mkdir()
    job = install(tmp_path / "bin", 1) | {"SLURM_SUBMIT_DIR": str(clone)}
    done = launch("scripts/slurm/methods.sbatch", SLURM_ARRAY_TASK_ID="6", **job)
    assert done.code == 2 and "2 methods x 3 seeds; lower --array" in done.stderr


# ---- setup.sh ------------------------------------------------------------------------------------


def test_the_core_is_installed_once(launch):
    torch, project = launch("selection.sh").installed
    assert torch.endswith("torch==2.13.0") and project.endswith("/clone")
    assert launch("selection.sh", "--budget", "0.1").installed == []


def test_extras_are_added_to_what_is_there(launch):
    launch("selection.sh")
    (project,) = launch("scripts/setup.sh", "train", "judge").installed
    assert project.endswith("/clone[train,judge]")
    (project,) = launch("scripts/setup.sh", "mini", "train").installed
    assert project.endswith("/clone[mini]")
    assert launch("test.sh").installed[-1].endswith("/clone[dev]")
    assert launch("scripts/setup.sh", "mini", "judge", "train").installed == []


def test_other_pins_are_installed_again(launch, clone):
    launch("scripts/setup.sh", "mini")
    with (clone / "constraints.txt").open("a") as file:
        file.write("new==1\n")
    assert len(launch("scripts/setup.sh", "mini").installed) == 2


def test_another_torch_stays(launch):
    """A later call that knows nothing of TORCH adds packages and leaves it alone."""
    words = "torch==2.12.0 --index-url https://example.org/cu126"
    torch, _ = launch("selection.sh", TORCH=words).installed
    assert torch.endswith(words)
    (project,) = launch("scripts/setup.sh", "train").installed
    assert "torch==" not in project


def test_a_python_that_is_none(launch):
    done = launch("selection.sh", PYTHON="/nowhere/python")
    assert done.code == 2 and done.commands == []
    assert done.stderr == "setup: PYTHON=/nowhere/python is not an interpreter\n"
