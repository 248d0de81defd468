"""The launchers: LLaVA-1.5's flags, the batch they keep, the small world they enter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.eval.tasks import task_names
from llava.train.arguments import parse
from tests.slurm import install

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("*.sh"), *(ROOT / "scripts").rglob("*.s*h")])

# LLaVA-1.5's own scripts. Ours differ in report_to (wandb there) and save_total_limit (1 there).
COMMON = """
--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
--mm_use_im_patch_token False --vision_tower openai/clip-vit-large-patch14-336 --bf16 True
--tf32 True --num_train_epochs 1 --per_device_eval_batch_size 4 --weight_decay 0.
--warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --evaluation_strategy no
--save_strategy steps --save_total_limit 2 --model_max_length 2048 --gradient_checkpointing True
--dataloader_num_workers 4 --lazy_preprocess True --report_to none --gradient_accumulation_steps 1
"""
PRETRAIN = """
--version plain --tune_mm_mlp_adapter True --learning_rate 1e-3 --save_steps 24000
--per_device_train_batch_size 32 --deepspeed scripts/zero2.json
"""
FULL = """
--version v1 --image_aspect_ratio pad --group_by_modality_length True --save_steps 50000
--learning_rate 2e-5 --per_device_train_batch_size 16 --deepspeed scripts/zero3.json
"""
LORA = f"""{FULL}
--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4
"""
ON_VICUNA = """
--model_name_or_path lmsys/vicuna-{0}-v1.5
--pretrain_mm_mlp_adapter checkpoints/llava-v1.5-{0}-pretrain/mm_projector.bin
--output_dir checkpoints/llava-v1.5-{0}"""
ON_LLAVA = """
--model_name_or_path liuhaotian/llava-v1.5-{0} --output_dir checkpoints/llava-v1.5-{0}"""
FRESH = """
--model_name_or_path lmsys/vicuna-{0}-v1.5 --output_dir checkpoints/llava-v1.5-{0}"""
RECIPES = {
    "finetune_lora.sh": f"{LORA}{ON_VICUNA}-lora".format("7b"),
    "finetune_7b.sh": f"{FULL}{ON_VICUNA}".format("7b"),
    "finetune.sh": f"{FULL}{ON_VICUNA}".format("13b"),
    "scripts/v1_5/pretrain.sh": f"{PRETRAIN}{FRESH}-pretrain".format("13b"),
    "scripts/v1_5/finetune.sh": f"{FULL}{ON_VICUNA}".format("13b"),
    "scripts/v1_5/finetune_lora.sh": f"{LORA}{ON_VICUNA}-lora".format("13b"),
    "scripts/v1_5/finetune_task.sh": f"{FULL}{ON_LLAVA}-task".format("13b"),
    "scripts/v1_5/finetune_task_lora.sh": f"{LORA}{ON_LLAVA}-task-lora".format("13b"),
}
EVAL_FOLDER = "scripts/v1_5/eval"
EVAL = ROOT / EVAL_FOLDER
# benchmark -> its folder in LLaVA's playground/data/eval
EVALUATED = {
    name: name for name in "mmbench mmbench_cn aokvqa mmmu arc_e boolq gqa pope textvqa".split()
} | {"sqa": "scienceqa", "seed": "seed_bench", "gqa_ood": "gqa", "mme": "MME"}
TORCHRUN = "-m llava.launch --standalone --nproc_per_node {} -m llava.train.train_mem"


def pairs(words: list[str]) -> dict[str, str]:
    """Flags and values; of a flag that comes twice the last one, as the parser has it."""
    assert all(word.startswith("--") for word in words[::2]), words
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The shell part of a clone in which nothing has run yet."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copytree(ROOT / "selection/methods", folder / "selection/methods")
    (folder / "mini").mkdir()
    files = ["constraints.txt", "pyproject.toml", *(p.name for p in ROOT.glob("*.sh"))]
    for name in [*files, *(f"mini/{p.name}" for p in (ROOT / "mini").glob("*.yaml"))]:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def launch(clone: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a launcher with a PYTHON that notes the stages it is told to run instead of running them.

    The environment is given by keywords, `lines` of the result are the stages.
    """
    python, record = tmp_path / "python", tmp_path / "record"
    python.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  "-c import sys; print(sys.prefix)") echo "{tmp_path}" ;;
  "-m pip "*) ;;
  "-m mini "* | "-m llava"* | "-m selection"*)
    echo "$*" >>"{record}"
    if [ "$2" = selection ]; then mkdir -p "${{@: -1}}" && touch "${{@: -1}}/subset.json"; fi
    mkdir -p playground/mini && touch playground/mini/pool.json playground/mini/captions.json ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""
    )
    python.chmod(0o755)

    def launch(launcher: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
        record.write_text("")
        done = subprocess.run(
            ["bash", clone / launcher, *flags],
            env={**os.environ, "PYTHON": str(python), "NPROC": "2", **environment},
            capture_output=True,
            text=True,
        )
        done.lines = [line.split() for line in record.read_text().splitlines()]
        return done

    return launch


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "data.json").write_text("[]")
    return str(tmp_path / "data.json")


def trained(done: subprocess.CompletedProcess, processes: int = 2) -> dict[str, str]:
    """The flags of the training that was started."""
    assert done.returncode == 0, done.stderr
    start = TORCHRUN.format(processes).split()
    assert done.lines[-1][: len(start)] == start
    return pairs(done.lines[-1][len(start) :])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_is_clean(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("launcher", RECIPES)
def test_flags_are_those_of_llava(launcher, launch, data):
    """On eight GPUs: every flag of LLaVA's script with its value, and no other."""
    found = trained(launch(launcher, DATA=data, IMAGES="images", NPROC="8"), 8)
    expected = pairs(COMMON.split()) | pairs(RECIPES[launcher].split())
    assert found == expected | {"--data_path": data, "--image_folder": "images"}


def test_flags_are_accepted(launch, data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    # Without DeepSpeed, which would have the tests' own process join a group.
    place = {"DATA": data, "IMAGES": "images", "ZERO": "none"}
    done = launch("finetune_lora.sh", "--output_dir", str(tmp_path), **place)
    arguments = parse([word for pair in trained(done).items() for word in pair])
    assert arguments.training.lora_r == 128 and arguments.training.warmup_steps == 0.03
    assert arguments.training.mm_projector_lr == 2e-5


def test_the_caller_has_the_last_word(launch, data):
    environment = {"DATA": data, "MODEL": "m", "PROJECTOR": "p", "OUTPUT": "o", "ZERO": "mine.json"}
    done = launch("finetune_7b.sh", "--learning_rate", "1e-6", "--packing", "True", **environment)
    found = trained(done)
    assert found["--learning_rate"] == "1e-6" and found["--packing"] == "True"
    assert found["--model_name_or_path"] == "m" and found["--pretrain_mm_mlp_adapter"] == "p"
    assert found["--output_dir"] == "o" and found["--deepspeed"] == "mine.json"
    found = trained(launch("finetune_7b.sh", DATA=data, ZERO="none", VISION_TOWER="", PROJECTOR=""))
    assert found.keys().isdisjoint({"--deepspeed", "--vision_tower", "--pretrain_mm_mlp_adapter"})


@pytest.mark.parametrize(
    ("processes", "flags", "each", "accumulated"),
    [
        (8, [], 16, 1),
        (4, [], 16, 2),
        (1, [], 16, 8),
        (16, [], 8, 1),
        (128, [], 1, 1),
        (4, ["--per_device_train_batch_size", "4"], 4, 8),
        (4, ["--per_device_train_batch_size=2"], 2, 16),
        (4, ["--gradient_accumulation_steps", "3"], 16, 3),
    ],
)
def test_global_batch_does_not_depend_on_processes(
    launch, data, processes, flags, each, accumulated
):
    done = launch("finetune.sh", *flags, DATA=data, NPROC=str(processes))
    assert f"= {processes * each * accumulated} samples a step" in done.stderr
    line = " ".join(done.lines[-1])
    assert f"--per_device_train_batch_size {each} " in line
    assert f"--gradient_accumulation_steps {accumulated} " in line


def test_nodes_share_the_global_batch(launch, data):
    done = launch("finetune.sh", DATA=data, NPROC="8", TORCHRUN_ARGS="--nnodes 2 --node_rank 0")
    assert "16 processes x 8 samples x 1 accumulated = 128 samples a step" in done.stderr
    assert done.lines[-1][2:8] == "--nnodes 2 --node_rank 0 --nproc_per_node 8".split()


def test_wrong_settings_are_one_line(launch, data):
    done = launch("finetune.sh", DATA=data, NPROC="6")
    assert done.returncode == 2 and "GLOBAL_BATCH=128 does not divide among 6" in done.stderr
    done = launch("finetune.sh", DATA="nowhere.json")
    assert done.returncode == 2 and "DATA=nowhere.json: no such file" in done.stderr
    assert done.lines == []


def test_help_runs_nothing(launch):
    done = launch("finetune_lora.sh", "--help")
    assert done.returncode == 0 and "GLOBAL_BATCH=128" in done.stdout and done.lines == []
    assert "shellcheck" not in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize("launcher", RECIPES)
def test_nothing_set_is_the_small_world(launcher, launch):
    done = launch(launcher)
    found, stages = trained(done), [line[:3] for line in done.lines[:-1]]
    task, pretrain = "task" in launcher, "pretrain" in launcher
    assert stages[0] == ["-m", "mini", "build"]
    assert (["-m", "mini", "warmup"] in stages) == task
    assert (["-m", "mini", "captions"] in stages) == pretrain
    assert found["--model_name_or_path"] == ("playground/mini/proxy" if task else "mini/base/llama")
    name = "captions" if pretrain else "pool"
    assert found["--data_path"] == f"playground/mini/{name}.json"
    assert found["--image_folder"] == "playground/mini/images"
    assert found["--model_max_length"] == "512" and found["--deepspeed"] == "scripts/zero2.json"
    assert ("--pretrain_mm_mlp_adapter" in found) == (not task and not pretrain)
    assert ("--vision_tower" in found) == (not task)
    assert "= 16 samples a step" in done.stderr


def test_the_newest_subset_of_the_small_world(launch, clone):
    """Subsets of other pools are passed over; one that is named is taken, and nothing else."""
    pools = {"old": clone / "playground/mini/pool.json", "other": "/data/665k.json"}
    for age, (name, pool) in enumerate({**pools, "new": pools["old"]}.items()):
        run = clone / "outputs" / name
        run.mkdir(parents=True)
        (run / "subset.json").write_text("[]")
        (run / "manifest.json").write_text(json.dumps({"pool": {"path": str(pool)}}, indent=1))
        os.utime(run / "manifest.json", (age, age))
    found = trained(launch("finetune_lora.sh"))
    assert found["--data_path"] == "outputs/new/subset.json"
    assert found["--output_dir"] == "outputs/finetune_lora-new"
    found = trained(launch("finetune_lora.sh", DATA="outputs/old/subset.json"))
    assert found["--data_path"] == "outputs/old/subset.json"
    assert found["--model_name_or_path"] == "mini/base/llama"
    found = trained(launch("finetune_lora.sh", DATA="outputs/other/subset.json"))
    assert found["--model_name_or_path"] == "lmsys/vicuna-7b-v1.5"


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
    found = trained(done, 1)
    run = f"outputs/{method}-0.3-{seed}"
    (selected,) = [line for line in done.lines if line[1] == "selection"]
    flags = f"--pool pool.json --images images --model proxy --seed {seed} --budget 0.3 --out {run}"
    assert selected == ["-m", "selection", "select", method, *flags.split()]
    assert found["--data_path"] == f"{run}/subset.json" and found["--seed"] == str(seed)
    assert found["--output_dir"] == f"checkpoints/{method}-0.3-{seed}-lora"
    assert found["--model_name_or_path"] == "m"


def test_array_larger_than_its_table(launch, clone, tmp_path):
    (tmp_path / "bin").mkdir()
    job = install(tmp_path / "bin", 1) | {"SLURM_SUBMIT_DIR": str(clone)}
    done = launch("scripts/slurm/methods.sbatch", SLURM_ARRAY_TASK_ID="6", **job)
    assert done.returncode == 2 and "2 methods x 3 seeds; lower --array" in done.stderr


def test_every_benchmark_has_its_launcher():
    assert {*EVALUATED} == {*task_names()}
    assert {*EVALUATED} == {path.stem for path in EVAL.glob("*.sh")} - {"common"}


@pytest.mark.parametrize(("benchmark", "folder"), EVALUATED.items())
def test_a_model_is_asked_on_every_gpu(benchmark, folder, launch):
    done = launch(f"{EVAL_FOLDER}/{benchmark}.sh", MODEL="hub/llava-7b", NPROC="8")
    start = "-m llava.launch --standalone --nproc_per_node 8 -m llava.eval run".split()
    assert done.returncode == 0, done.stderr
    (line,) = done.lines
    assert line[: len(start)] == start
    assert pairs(line[len(start) :]) == {
        "--benchmark": benchmark,
        "--data": f"playground/data/eval/{folder}",
        "--model": "hub/llava-7b",
        "--out": f"outputs/eval/llava-7b/{benchmark}",
    }


def asked(done: subprocess.CompletedProcess) -> dict[str, str]:
    """The flags of the one process that asks."""
    assert done.returncode == 0, done.stderr
    assert done.lines[-1][:3] == ["-m", "llava.eval", "run"]
    return pairs(done.lines[-1][3:])


def test_the_caller_decides_what_is_asked(launch):
    named = {"MODEL": "m", "MODEL_BASE": "b", "DATA": "d", "IMAGES": "with space", "OUTPUT": "o"}
    done = launch(f"{EVAL_FOLDER}/sqa.sh", "--symbols", "snvf", "--out", "p", NPROC="1", **named)
    words = "--data d --images with space --model m --model-base b --out o --symbols snvf --out p"
    assert done.lines[-1] == ["-m", "llava.eval", "run", "--benchmark", "sqa", *words.split()]
    flags = "--nnodes 2 --node_rank 1"
    (line,) = launch(f"{EVAL_FOLDER}/sqa.sh", NPROC="1", TORCHRUN_ARGS=flags, **named).lines
    assert line[1:8] == ["llava.launch", *flags.split(), "--nproc_per_node", "1"]


def test_nothing_set_asks_the_proxy_and_says_so(launch):
    done = launch(f"{EVAL_FOLDER}/seed.sh", NPROC="1")
    assert [line[:3] for line in done.lines[:-1]] == [
        ["-m", "mini", "build"],
        ["-m", "mini", "warmup"],
    ]
    found = asked(done)
    assert found["--model"] == "playground/mini/proxy" and "--model-base" not in found
    assert found["--data"] == "playground/mini/eval/seed_bench"
    assert found["--out"] == "outputs/eval/proxy/seed"
    (line,) = done.stderr.splitlines()[1:]  # the first is the setup's
    assert line.startswith("seed: the small world; MODEL=playground/mini/proxy, ")


def test_the_newest_model_that_is_finished(launch, clone):
    """A LoRA brings the base that it names; a model that is named is asked, and no other."""
    for age, name in enumerate(["finetune_lora-old", "finetune_lora-new", "ards30"]):
        (clone / "outputs" / name).mkdir(parents=True)
        (clone / "outputs" / name / "COMPLETE").touch()
        os.utime(clone / "outputs" / name / "COMPLETE", (age, age))
    (clone / "outputs" / "finetune-cut").mkdir()
    adapter = {"base_model_name_or_path": "mini/base/llama", "r": 16}
    (clone / "outputs/finetune_lora-new/adapter_config.json").write_text(json.dumps(adapter))
    done = launch(f"{EVAL_FOLDER}/sqa.sh", NPROC="1")
    assert [line[:3] for line in done.lines[:-1]] == [["-m", "mini", "build"]]
    found = asked(done)
    assert found["--model"] == "outputs/finetune_lora-new"
    assert found["--model-base"] == "mini/base/llama"
    found = asked(launch(f"{EVAL_FOLDER}/sqa.sh", NPROC="1", MODEL="outputs/finetune_lora-old"))
    assert found["--data"] == "playground/mini/eval/scienceqa" and "--model-base" not in found


def test_data_without_a_model_is_one_line(launch):
    done = launch(f"{EVAL_FOLDER}/sqa.sh", DATA="/data/scienceqa")
    assert done.returncode == 2 and "DATA=/data/scienceqa, but no MODEL" in done.stderr
    assert done.lines == [] and len(done.stderr.splitlines()[1:]) == 1
    found = asked(launch(f"{EVAL_FOLDER}/sqa.sh", DATA="playground/mini/eval/other", NPROC="1"))
    assert found["--data"] == "playground/mini/eval/other"


def test_help_of_an_evaluation_runs_nothing(launch):
    done = launch(f"{EVAL_FOLDER}/gqa_ood.sh", "--help")
    assert done.returncode == 0 and done.lines == []
    assert "head 1,733" in done.stdout and "MODEL_BASE=" in done.stdout
    assert "shellcheck" not in done.stdout and "set -euo" not in done.stdout
