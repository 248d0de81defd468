"""What the launchers do where nothing is named: the small world is entered, and only then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import UsageError
from llava.eval.tasks import find_task, task_names
from llava.recipe import FOLDER
from mini import launch

ROOT = Path(__file__).parents[2]
WORLD = "playground/mini"
TARGETS = ["--targets", f"{WORLD}/targets/targets.yaml"]
POOL = ["--pool", f"{WORLD}/pool.json", "--images", f"{WORLD}/images"]
SMALL = [*POOL, "--model", f"{WORLD}/proxy", "--budget", "0.3"]
RECIPES = sorted({path.stem for path in FOLDER.glob("*.yaml")} - {"common"})
# benchmark -> its folder in LLaVA's playground/data/eval
EVALUATED = {
    name: name for name in "mmbench mmbench_cn aokvqa mmmu arc_e boolq gqa pope textvqa".split()
} | {"sqa": "scienceqa", "seed": "seed_bench", "gqa_ood": "gqa", "mme": "MME"}


@pytest.fixture(autouse=True)
def clone(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of the clone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pairs(words: list[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=True))


def verbs(preparation: launch.Preparation) -> list[str]:
    return [part.command[0] for part in preparation.parts]


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_training_with_nothing_set_is_of_the_small_world(name):
    recipe, preparation = launch.training(name, {})
    flags = pairs(recipe.argv(2))
    task, pretrain = "task" in name, "pretrain" in name
    assert verbs(preparation) == ["build"] + ["warmup"] * task + ["captions"] * pretrain
    assert preparation.extras == ("mini", "train")
    model = f"{WORLD}/proxy" if task else "mini/base/llama"
    assert flags["--model_name_or_path"] == model
    assert flags["--data_path"] == f"{WORLD}/{'captions' if pretrain else 'pool'}.json"
    assert flags["--image_folder"] == f"{WORLD}/images"
    assert flags["--model_max_length"] == "512" and flags["--deepspeed"] == "scripts/zero2.json"
    assert flags["--bf16"] == "False" and flags.get("--lora_r") == (
        "16" if "lora" in name else None
    )
    assert ("--pretrain_mm_mlp_adapter" in flags) == (not task and not pretrain)
    assert ("--vision_tower" in flags) == (not task)
    assert recipe.batch(2) == (8, 1) and recipe.output == f"outputs/{name}-mini"
    assert f"{name}: the small world, flags of mini/" in preparation.note


def test_the_caller_decides_in_the_small_world_too():
    given = {"OUTPUT": "o", "ZERO": "none", "GLOBAL_BATCH": "32", "PROJECTOR": "", "IMAGES": "i"}
    recipe, preparation = launch.training("finetune_lora", given)
    flags = pairs(recipe.argv(2))
    assert "--pretrain_mm_mlp_adapter" not in flags and "--deepspeed" not in flags
    assert flags["--output_dir"] == "o" and flags["--image_folder"] == "i"
    assert recipe.batch(2) == (8, 2) and preparation.extras == ("mini",)


def test_what_is_named_is_trained_and_nothing_prepared():
    for given in ({"MODEL": "m"}, {"DATA": "/data/665k.json"}):
        recipe, preparation = launch.training("finetune_lora", given)
        assert recipe == launch.Recipe.read("finetune_lora", given)
        assert preparation == launch.Preparation(extras=("train",))


def write_run(run: Path, pool: str) -> None:
    run.mkdir(parents=True)
    (run / "subset.json").write_text("[]")
    (run / "manifest.json").write_text(json.dumps({"pool": {"path": pool}}, indent=1))


def test_the_newest_subset_of_the_small_world(clone):
    """Subsets of other pools are passed over; one that is named is taken, and nothing else."""
    pools = {"old": f"{clone}/{WORLD}/pool.json", "other": "/data/pool.json"}
    for age, (name, pool) in enumerate({**pools, "new": f"{WORLD}/pool.json"}.items()):
        write_run(clone / "outputs" / name, pool)
        os.utime(clone / "outputs" / name / "manifest.json", (age, age))
    recipe, _ = launch.training("finetune_lora", {})
    assert recipe.data == "outputs/new/subset.json"
    assert recipe.output == "outputs/finetune_lora-new"
    recipe, _ = launch.training("finetune_lora", {"DATA": "outputs/old/subset.json"})
    assert recipe.data == "outputs/old/subset.json"
    assert recipe.model == "mini/base/llama"
    given = {"DATA": "outputs/other/subset.json", "SIZE": "7b"}
    recipe, _ = launch.training("finetune_lora", given)
    assert recipe.model == "lmsys/vicuna-7b-v1.5"


def test_a_broken_manifest_is_passed_over(clone):
    for name, text in {"a": "{", "b": "[]", "c": '{"pool": null}'}.items():
        (clone / "outputs" / name).mkdir(parents=True)
        (clone / "outputs" / name / "manifest.json").write_text(text)
    assert launch.newest_subset() is None


# ---- evaluation ----------------------------------------------------------------------------------


def test_every_benchmark_has_its_folder():
    assert EVALUATED == {name: find_task(name).folder for name in task_names()}


@pytest.mark.parametrize("benchmark", EVALUATED)
def test_a_model_is_asked_llavas_questions(benchmark):
    words, preparation = launch.evaluation(benchmark, {"MODEL": "hub/llava-7b"})
    assert pairs(words) == {
        "--benchmark": benchmark,
        "--model": "hub/llava-7b",
        "--out": f"outputs/eval/llava-7b/{benchmark}",
    }
    assert preparation == launch.Preparation()


def test_the_caller_decides_what_is_asked():
    named = {"MODEL": "m", "MODEL_BASE": "b", "DATA": "d", "IMAGES": "with space", "OUTPUT": "o"}
    words, _ = launch.evaluation("sqa", named)
    expected = ["--data", "d", "--images", "with space", "--model", "m", "--model-base", "b"]
    assert words == ["--benchmark", "sqa", *expected, "--out", "o"]


def test_nothing_set_asks_the_proxy_and_says_so():
    words, preparation = launch.evaluation("seed", {})
    assert verbs(preparation) == ["build", "warmup"] and preparation.extras == ("mini",)
    assert pairs(words) == {
        "--benchmark": "seed",
        "--data": f"{WORLD}/eval/seed_bench",
        "--model": f"{WORLD}/proxy",
        "--out": "outputs/eval/proxy/seed",
    }
    assert preparation.note.startswith(f"seed: the small world; MODEL={WORLD}/proxy, ")


def test_the_newest_model_that_is_finished(clone):
    """A LoRA brings the base that it names; a model that is named is asked, and no other."""
    for age, name in enumerate(["finetune_lora-old", "finetune_lora-new", "ards30"]):
        (clone / "outputs" / name).mkdir(parents=True)
        (clone / "outputs" / name / "COMPLETE").touch()
        os.utime(clone / "outputs" / name / "COMPLETE", (age, age))
    (clone / "outputs" / "finetune-cut").mkdir()
    adapter = {"base_model_name_or_path": "mini/base/llama", "r": 16}
    (clone / "outputs/finetune_lora-new/adapter_config.json").write_text(json.dumps(adapter))
    words, preparation = launch.evaluation("sqa", {})
    assert verbs(preparation) == ["build"]
    assert pairs(words)["--model"] == "outputs/finetune_lora-new"
    assert pairs(words)["--model-base"] == "mini/base/llama"
    words, preparation = launch.evaluation("sqa", {"MODEL": "outputs/finetune_lora-old"})
    assert pairs(words)["--data"] == f"{WORLD}/eval/scienceqa" and "--model-base" not in words
    assert verbs(preparation) == ["build"] and preparation.note == ""


def test_the_small_world_behind_a_link(clone, monkeypatch):
    """On clusters playground/ often is a link to a larger disk."""
    (clone / "disk/mini/eval").mkdir(parents=True)
    (clone / "playground").symlink_to("disk")
    words, _ = launch.evaluation("sqa", {"DATA": f"{WORLD}/eval/other"})
    assert pairs(words)["--data"] == f"{WORLD}/eval/other"


def test_data_without_a_model_is_one_line():
    with pytest.raises(UsageError, match="DATA=/data/scienceqa, but no MODEL; say whose answers"):
        launch.evaluation("sqa", {"DATA": "/data/scienceqa"})
    words, _ = launch.evaluation("sqa", {"DATA": f"{WORLD}/eval/other"})
    assert pairs(words)["--data"] == f"{WORLD}/eval/other"


def test_help_of_an_evaluation_asks_nothing(capsys):
    assert launch.evaluate(["gqa_ood", "--help"]) == 0
    out = capsys.readouterr().out
    assert "head 1,733" in out and "MODEL_BASE=" in out
    assert "shellcheck" not in out and "set -euo" not in out


def test_help_of_a_training_trains_nothing(capsys):
    assert launch.train(["finetune_lora", "--help"]) == 0
    out = capsys.readouterr().out
    assert "GLOBAL_BATCH=128" in out and "small world" in out
    assert "shellcheck" not in out and "set -euo" not in out


# ---- selection -----------------------------------------------------------------------------------


def test_nothing_set_is_ards_on_the_small_world_and_its_report():
    asked = launch.selecting([], {})
    assert verbs(asked.preparation) == ["build", "warmup"]
    assert asked.argv == ["select", "ards", "--config", "mini/ards.yaml", *SMALL]
    assert asked.reports and asked.preparation.extras == ("mini",)


@pytest.mark.parametrize(
    ("flags", "selects", "reports"),
    [
        (["random"], ["random", *SMALL], True),
        (["--out", "o"], ["ards", "--config", "mini/ards.yaml", *SMALL, "--out", "o"], True),
        (["random", "--out=o"], ["random", *SMALL, "--out=o"], True),
        (["random", "--dry-run"], ["random", *SMALL, "--dry-run"], False),
        (["random", "--dry_run"], ["random", *SMALL, "--dry_run"], False),
    ],
)
def test_flags_come_last_and_a_dry_run_has_no_report(flags, selects, reports):
    asked = launch.selecting(flags, {})
    assert verbs(asked.preparation) == ["build", "warmup"]
    assert asked.argv == ["select", *selects] and asked.reports == reports


@pytest.mark.parametrize(
    ("flags", "selects"),
    [
        (["--pool", "p.json", "--model", "m"], "ards --pool p.json --model m"),
        (["random", "--pool=p.json"], "random --pool=p.json"),
        (["--config", "run/config.yaml"], "--config run/config.yaml"),
        (["random", "--config=c.yaml"], "random --config=c.yaml"),
        (["--help"], "ards --help"),
        (["random", "-h"], "random -h"),
        (["--print_config"], "ards --print_config"),
        (["--print-config=skip_default"], "ards --print-config=skip_default"),
    ],
)
def test_a_pool_a_file_or_help_builds_no_small_world(flags, selects):
    asked = launch.selecting(flags, {})
    assert asked.argv == ["select", *selects.split()]
    assert asked.preparation == launch.Preparation() and not asked.reports


@pytest.mark.parametrize("method", ["mllm_selector", "icons", "less", "tive", "rds", "coido"])
def test_a_method_that_trains_its_own_proxy_is_given_none(method):
    asked = launch.selecting([method], {})
    config = {"mllm_selector": "mllm_selector", "coido": "coido"}.get(method)
    targets = TARGETS if method in ("icons", "less", "rds") else []
    words = [*(["--config", f"mini/{config}.yaml"] if config else []), *POOL, *targets]
    assert asked.argv == ["select", method, *words, "--budget", "0.2"]
    assert verbs(asked.preparation) == ["build"] + ["clip"] * (method == "coido")
    assert asked.preparation.extras == ("mini", "train") and asked.reports


def test_all_has_the_settings_of_the_small_world():
    asked = launch.selecting(["all", "--budget", "0.1", "--out", "o"], {})
    assert verbs(asked.preparation) == ["build", "clip"]
    words = [*POOL, *TARGETS, "--budget", "0.2", "--settings", "mini"]
    assert asked.argv == ["all", *words, "--budget", "0.1", "--out", "o"]
    asked = launch.selecting(["all", "--pool", "p", "--model", "m"], {})
    assert asked.argv == ["all", "--pool", "p", "--model", "m"] and not asked.reports


def test_rho_loss_reads_the_small_worlds_proxy_beside_its_own_model():
    asked = launch.selecting(["rho_loss"], {})
    assert asked.argv == ["select", "rho_loss", *SMALL]
    assert verbs(asked.preparation) == ["build", "warmup"]
    assert asked.preparation.extras == ("mini", "train")


def test_own_models_are_trained_by_the_lora_recipe_of_the_pool():
    """The small world's base on its pool; another pool, or MODEL, has the paper's recipe."""
    small = launch.selecting(["icons"], {}).recipe
    assert (small.model, small.global_batch) == ("mini/base/llama", 16)
    assert small.flags["lora_r"] == "16" and small.scaled
    for flags, environment, model in (
        (["icons", "--pool", "p"], {}, "lmsys/vicuna-7b-v1.5"),
        (["icons", "--pool", "p"], {"SIZE": "13b"}, "lmsys/vicuna-13b-v1.5"),
        (["icons"], {"MODEL": "m"}, "m"),
    ):
        recipe = launch.selecting(flags, environment).recipe
        assert (recipe.model, recipe.global_batch) == (model, 128)
        assert recipe.flags["lora_r"] == "128" and not recipe.scaled


@pytest.mark.parametrize(
    ("flags", "extras"),
    [
        (["random", "--pool", "p"], ()),
        (["icons", "--pool", "p"], ("train",)),
        (["icons", "--pool", "p", "--model=m"], ()),
        (["all", "--pool", "p"], ("train",)),
        (["icons", "--help"], ()),
        (["coido", "--pool", "p", "--model", "m", "--judge-url", "u"], ("judge",)),
        (["--config", "judged.yaml"], ("judge",)),
        (["--config", "plain.yaml"], ()),
    ],
)
def test_packages_are_those_that_the_command_needs(clone, flags, extras):
    (clone / "judged.yaml").write_text("method: coido\njudge_url: http://localhost\n")
    (clone / "plain.yaml").write_text("method: coido\njudge_url: null\n")
    assert launch.selecting(flags, {}).preparation.extras == extras
    if extras == ("train",):
        assert launch.selecting(flags, {"ZERO": "none"}).preparation.extras == ()


def test_an_unknown_method_prepares_nothing():
    with pytest.raises(UsageError, match="'ardz' is unknown; did you mean 'ards'"):
        launch.selecting(["ardz", "--budget", "0.1"], {})


# ---- preparing -----------------------------------------------------------------------------------


def run_python(code: str, clone: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    return subprocess.run(
        [sys.executable, "-c", f"from mini.launch import *\n{code}"],
        cwd=clone,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_a_part_that_fails_is_the_last_and_its_code_the_launchers(clone):
    done = run_python("Preparation((CAPTIONS, BUILT), note='n').do()", clone)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {WORLD}/pool.json: not there; run `python -m mini build` first\n"


def test_what_is_made_is_told_once_and_not_among_the_results(clone):
    (clone / WORLD).mkdir(parents=True)
    (clone / WORLD / "pool.json").write_text('[\n{"id": 1, "meta": {"task": "caption"}}\n]\n')
    code = "Preparation((CAPTIONS,), note='the note').do()"
    done = run_python(code, clone)
    assert done.stdout == "" and done.stderr == f"{WORLD}/captions.json: 1 captions\nthe note\n"
    assert run_python(code, clone).stderr == "the note\n"


def test_only_a_launcher_has_packages_installed(clone):
    """Which says so by PYTHON, the environment that it has made."""
    code = "Preparation(extras=('judge',)).do()"
    python = clone / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  "-c import sys; print(sys.prefix)") echo "{clone}" ;;
  *) echo "$*" >>"{clone}/record" ;;
esac
"""
    )
    python.chmod(0o755)
    assert run_python(code, clone).returncode == 0 and not (clone / "record").exists()
    assert run_python(code, clone, PYTHON=str(python)).returncode == 0
    assert "[judge]" in (clone / "record").read_text()
