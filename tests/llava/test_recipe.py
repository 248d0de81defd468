"""Training recipes: LLaVA-1.5's flags, the batch they keep, what shapes a model, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.errors import UsageError
from llava.recipe import FOLDER, Recipe, main
from llava.train.arguments import parse

ROOT = Path(__file__).parents[2]
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
    ("finetune_lora", "7b"): f"{LORA}{ON_VICUNA}-lora",
    ("finetune", "7b"): f"{FULL}{ON_VICUNA}",
    ("finetune", "13b"): f"{FULL}{ON_VICUNA}",
    ("pretrain", None): f"{PRETRAIN}{FRESH}-pretrain",
    ("finetune", None): f"{FULL}{ON_VICUNA}",
    ("finetune_lora", None): f"{LORA}{ON_VICUNA}-lora",
    ("finetune_task", None): f"{FULL}{ON_LLAVA}-task",
    ("finetune_task_lora", None): f"{LORA}{ON_LLAVA}-task-lora",
}
DATA = {"DATA": "data.json", "IMAGES": "images"}


def pairs(words: list[str]) -> dict[str, str]:
    """Flags and values; of a flag that comes twice the last one, as the parser has it."""
    assert all(word.startswith("--") for word in words[::2]), words
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(("name", "size"), RECIPES)
def test_flags_are_those_of_llava(name, size):
    """On eight GPUs: every flag of LLaVA's script with its value, and no other; 13B by default."""
    flags = pairs(Recipe.read(name, DATA | ({"SIZE": size} if size else {})).argv(8))
    expected = pairs(COMMON.split()) | pairs(RECIPES[name, size].format(size or "13b").split())
    assert flags == expected | {"--data_path": "data.json", "--image_folder": "images"}


def test_every_recipe_is_compared():
    names = {path.stem for path in FOLDER.glob("*.yaml")} - {"common"}
    assert names == {name for name, _ in RECIPES}


def test_flags_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    # Without DeepSpeed, which would have the tests' own process join a group.
    recipe = Recipe.read("finetune_lora", DATA | {"ZERO": "none", "OUTPUT": str(tmp_path)})
    arguments = parse(recipe.argv(2))
    assert arguments.training.lora_r == 128 and arguments.training.warmup_steps == 0.03
    assert arguments.training.mm_projector_lr == 2e-5


def test_the_caller_has_the_last_word():
    environment = {"MODEL": "m", "PROJECTOR": "p", "OUTPUT": "o", "ZERO": "mine.json"}
    recipe = Recipe.read("finetune", DATA | environment | {"REPORT_TO": "wandb", "TRAINING": "t"})
    flags = pairs(recipe.argv(2, ["--learning_rate", "1e-6", "--packing", "True"]))
    assert flags["--learning_rate"] == "1e-6" and flags["--packing"] == "True"
    assert flags["--model_name_or_path"] == "m" and flags["--pretrain_mm_mlp_adapter"] == "p"
    assert flags["--output_dir"] == "o" and flags["--deepspeed"] == "mine.json"
    assert flags["--report_to"] == "wandb" and recipe.module == "t"
    bare = {"ZERO": "none", "VISION_TOWER": "", "PROJECTOR": "", "MODEL": ""}
    flags = pairs(Recipe.read("finetune", DATA | bare).argv(2))
    assert flags.keys().isdisjoint({"--deepspeed", "--vision_tower", "--pretrain_mm_mlp_adapter"})
    assert flags["--model_name_or_path"] == "lmsys/vicuna-13b-v1.5"


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
        (4, ["--per-device-train-batch-size", "2"], 2, 16),
        (4, ["--gradient_accumulation_steps", "3"], 16, 3),
    ],
)
def test_global_batch_does_not_depend_on_processes(processes, flags, each, accumulated):
    recipe = Recipe.read("finetune", {})
    assert recipe.batch(processes, flags) == (each, accumulated)
    line = " ".join(recipe.argv(processes, flags))
    assert f"--per_device_train_batch_size {each} " in line
    assert f"--gradient_accumulation_steps {accumulated} " in line


def test_a_batch_that_does_not_divide_is_told():
    with pytest.raises(UsageError, match="GLOBAL_BATCH=128 does not divide among 6 processes of 1"):
        Recipe.read("finetune", {}).batch(6)
    with pytest.raises(UsageError, match="--per_device_train_batch_size=0: give a number"):
        Recipe.read("finetune", {}).batch(2, ["--per_device_train_batch_size", "0"])


def shape(argv: tuple[str, ...] = (), **environment: str) -> str:
    return json.dumps(Recipe.read("finetune_lora", environment).shape(argv))


@pytest.mark.parametrize(
    "changed",
    [
        {"MODEL": "m"},
        {"VISION_TOWER": ""},
        {"PROJECTOR": "p"},
        {"SIZE": "7b"},
        {"ZERO": "none"},
        {"GLOBAL_BATCH": "64"},
        {"TRAINING": "t"},
        {"argv": ("--learning_rate", "1e-6")},
        {"argv": ("--lora-r=8",)},
        {"argv": ("--a_flag_of_tomorrow", "1")},
    ],
)
def test_what_decides_the_model_is_in_its_shape(changed):
    assert shape(**changed) != shape()


@pytest.mark.parametrize(
    "same",
    [
        {"DATA": "d", "IMAGES": "i", "OUTPUT": "o", "NPROC": "3", "REPORT_TO": "wandb"},
        {"argv": ("--save_steps", "5", "--logging-steps=2", "--dataloader_num_workers", "0")},
        {"argv": ("--lora_r", "128", "--learning-rate=2e-4")},
    ],
)
def test_what_does_not_is_not(same):
    assert shape(**same) == shape()


def test_a_recipe_of_ones_own(tmp_path):
    """A YAML file says what differs; its values stay as they are typed."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: m-{size}\noutput: o\nglobal_batch: 32\nflags: {weight_decay: 0.10, x: no}"
    )
    recipe = Recipe.read(str(path), {"SIZE": "7b"})
    flags = pairs(recipe.argv(2))
    assert recipe.name == "mine" and recipe.model == "m-7b" and recipe.global_batch == 32
    assert flags["--weight_decay"] == "0.10" and flags["--x"] == "no" and flags["--bf16"] == "True"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\noutput: o\nglobal_bach: 3", "global_bach: no setting .* did you mean global_b"),
        ("model: m\noutput: o\nlora_r: 3", "lora_r: no setting of a recipe; flags of the training"),
        ("model: m", "a recipe says its output"),
        ("- model", "not a YAML mapping"),
        ("model: [", "cannot be read"),
        ("model: m\noutput: o\nglobal_batch: many", "GLOBAL_BATCH=many: give a number"),
    ],
)
def test_what_is_no_recipe_is_told(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        Recipe.read(str(tmp_path / "mine.yaml"), {})


def test_an_unknown_recipe_is_told():
    with pytest.raises(UsageError, match="no such recipe; there are finetune, finetune_lora, "):
        Recipe.read("finetune_lara", {})


def test_help_explains_the_recipe_and_the_environment(capsys):
    assert main(["finetune_lora", "--help"]) == 0
    out = capsys.readouterr().out
    assert "LoRA fine-tuning" in out and "GLOBAL_BATCH=128" in out and "--help_all" in out


def test_reading_recipes_loads_no_torch():
    code = "import sys, llava.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


RECORDER = """
import json, os, sys
path = os.environ["RECORD"] + os.environ.get("RANK", "")
with open(path, "w") as file:
    names = ("WORLD_SIZE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    json.dump([sys.argv[1:], {name: os.environ.get(name) for name in names}], file)
sys.exit(int(os.environ.get("CODE", 0)))
"""


@pytest.fixture
def run(tmp_path):
    """Run `python -m llava.recipe` with a training program that notes what it is told."""
    (tmp_path / "recorder.py").write_text(RECORDER)
    (tmp_path / "data.json").write_text("[]")

    def run(*argv: str, **environment: str) -> subprocess.CompletedProcess:
        inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "NPROC")}
        given = {
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "RECORD": str(tmp_path / "told"),
            "TRAINING": "recorder",
            "DATA": str(tmp_path / "data.json"),
        }
        return subprocess.run(
            [sys.executable, "-m", "llava.recipe", *argv],
            env=inherited | given | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    return run


def test_processes_are_started_with_the_flags(run, tmp_path):
    done = run("finetune", "--learning_rate", "1e-6", NPROC="2")
    assert done.returncode == 0, done.stderr
    for rank in "01":
        words, environment = json.loads((tmp_path / f"told{rank}").read_text())
        expected = Recipe.read("finetune", {"DATA": str(tmp_path / "data.json")})
        assert words == expected.argv(2, ["--learning_rate", "1e-6"])
        assert environment == {
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    assert "finetune: 2 processes x 16 samples x 4 accumulated = 128 samples a step" in done.stderr
    assert "finetune: trains lmsys/vicuna-13b-v1.5 on " in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is one process a GPU")
def test_two_processes_where_there_is_no_gpu(run, tmp_path):
    assert run("finetune").returncode == 0
    assert {path.name for path in tmp_path.glob("told*")} == {"told0", "told1"}


def test_torchrun_is_told_what_the_caller_says(run, tmp_path):
    """Also with one process here, which then is a rank; without TORCHRUN_ARGS it is none."""
    for flags, name in (("--nnodes 1 --standalone", "told0"), ("", "told")):
        assert run("finetune", NPROC="1", TORCHRUN_ARGS=flags).returncode == 0
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_exit_code_is_that_of_the_training(run, processes):
    assert run("finetune", NPROC=processes, CODE="65").returncode == 65


def test_nodes_share_the_global_batch(run):
    """Told before anything is started: here the other node never comes."""
    done = run(
        "finetune", "--per_device_train_batch_size", "24", NPROC="8", TORCHRUN_ARGS="--nnodes=2"
    )
    assert done.returncode == 2
    assert "GLOBAL_BATCH=128 does not divide among 16 processes of 24" in done.stderr


def test_wrong_settings_are_one_line(run, tmp_path):
    done = run("finetune", NPROC="6")
    assert done.returncode == 2 and "GLOBAL_BATCH=128 does not divide among 6" in done.stderr
    done = run("finetune", DATA="nowhere.json")
    assert done.returncode == 2 and done.stderr == "error: DATA=nowhere.json: no such file\n"
    assert not list(tmp_path.glob("told*"))
