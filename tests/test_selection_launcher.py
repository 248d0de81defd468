"""selection.sh: what it prepares, what it asks selection for, and what it leaves to the caller."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORLD = "playground/mini"
POOL = f"--pool {WORLD}/pool.json --images {WORLD}/images"
SMALL = f"{POOL} --model {WORLD}/proxy --budget 0.3"


@pytest.fixture
def select(tmp_path):
    """Run the launcher in the shell part of a clone; the commands it hands to PYTHON, in order."""
    clone, python, record = tmp_path / "clone", tmp_path / "python", tmp_path / "record"
    (clone / "mini").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    told = "${MODEL:-no MODEL} $IMAGES $DATA $OUTPUT $* $ZERO $TRAINING $GLOBAL_BATCH"
    (clone / "finetune_lora.sh").write_text(f'echo finetune_lora.sh {told} >>"{record}"\n')
    settings = [f"mini/{method}.yaml" for method in ("ards", "coido", "mllm_selector")]
    for name in ("selection.sh", "constraints.txt", "pyproject.toml", *settings):
        shutil.copy(ROOT / name, clone / name)
    shutil.copytree(ROOT / "selection/methods", clone / "selection/methods")
    python.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  "-c import sys; print(sys.prefix)") echo "{tmp_path}" ;;
  "-c import torch; print"*) echo "${{GPUS:-1}}" ;;
  "-m pip "*) ;;
  *--print_config=*) [[ "$*" != *"$FAILS"* ]] || exit 65 ;;
  "-m "*) echo "${{*:2}}" >>"{record}"; [[ "$*" != *"$FAILS"* ]] || exit 65 ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""
    )
    python.chmod(0o755)

    def select(*flags: str, code: int = 0, **environment: str) -> list[str]:
        record.write_text("")
        names = {"NPROC", "TORCHRUN_ARGS"}
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        own = {"PYTHON": str(python), "FAILS": "never", **environment}
        done = subprocess.run(
            ["bash", clone / "selection.sh", *flags], env=inherited | own, capture_output=True
        )
        assert done.returncode == code, done.stderr
        return record.read_text().splitlines()

    return select


def test_nothing_set_is_ards_on_the_small_world_and_its_report(select):
    assert select() == [
        "mini build --out playground/mini",
        "mini warmup --data playground/mini --out playground/mini/proxy",
        f"selection select ards --config mini/ards.yaml {SMALL}",
        "mini report",
    ]


@pytest.mark.parametrize(
    ("flags", "selects", "reports"),
    [
        (["random"], f"random {SMALL}", ["mini report"]),
        (
            ["--out", "o", "--seed", "1"],
            f"ards --config mini/ards.yaml {SMALL} --out o --seed 1",
            ["mini report --run o"],
        ),
        (["random", "--out=o"], f"random {SMALL} --out=o", ["mini report --run o"]),
        (["random", "--dry-run"], f"random {SMALL} --dry-run", []),
    ],
)
def test_flags_come_last_and_the_report_is_of_that_run(select, flags, selects, reports):
    lines = select(*flags)
    assert [line.split()[1] for line in lines[:2]] == ["build", "warmup"]
    assert lines[2:] == [f"selection select {selects}", *reports]


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
    ],
)
def test_a_pool_a_file_or_help_builds_no_small_world(select, flags, selects):
    assert select(*flags) == [f"selection select {selects}"]


@pytest.mark.parametrize(
    ("flags", "draw", "name"),
    [
        ([], "--budget 0.03 --seed 0", "d-0.03-0"),
        (["--n_seed=100", "--seed_draw", "4"], "--budget 100 --seed 4", "d-100-4"),
        (["--limit", "50"], "--limit 50 --budget 0.03 --seed 0", "d-50-0.03-0"),
    ],
)
def test_mllm_selector_fine_tunes_its_seed_model_first(select, flags, draw, name):
    named = ["--pool", "d/pool.json", "--images", "i", *flags]
    out = f"outputs/warmup-{name}"
    before, _, after = draw.partition("--budget")
    model = f"--model {out}/model --model-base m"
    assert select("mllm_selector", *named, MODEL="m") == [
        f"selection select random --pool d/pool.json --images i {before}--budget{after} "
        f"--out {out}/samples",
        f"finetune_lora.sh m i {out}/samples/subset.json {out}/model",
        f"selection select mllm_selector {model} {' '.join(named)}",
    ]


def test_mllm_selectors_seed_model_on_the_small_world(select):
    lines = select("mllm_selector", MODEL="mini/base/llama")
    model = "outputs/warmup-mini-0.03-0/model"
    assert lines[2:] == [
        f"finetune_lora.sh mini/base/llama {WORLD}/images "
        f"outputs/warmup-mini-0.03-0/samples/subset.json {model}",
        f"selection select mllm_selector --config mini/mllm_selector.yaml {POOL} --budget 0.2 "
        f"--model {model} --model-base mini/base/llama",
        "mini report",
    ]


@pytest.mark.parametrize("flags", [["--model", "m"], ["--model=m"], ["--config", "c"], ["-h"]])
@pytest.mark.parametrize("method", ["mllm_selector", "icons", "less", "tive", "rds"])
def test_a_given_model_or_a_file_trains_nothing(select, method, flags):
    (line,) = select(method, "--pool", "p", *flags)
    assert line == f"selection select {method} --pool p {' '.join(flags)}"


@pytest.mark.parametrize("method", ["icons", "tive", "rds"])
def test_a_lora_on_five_percent_comes_before_gradients(select, method):
    named = ["--pool", "d/pool.json", "--images", "i"]
    out = "outputs/warmup-d-0.05-0"
    assert select(method, *named, MODEL="m") == [
        "selection select random --pool d/pool.json --images i --budget 0.05 --seed 0 "
        f"--out {out}/samples",
        f"finetune_lora.sh m i {out}/samples/subset.json {out}/model",
        f"selection select {method} --model {out}/model --model-base m {' '.join(named)}",
    ]


def test_less_takes_a_checkpoint_that_kept_its_moments(select, tmp_path):
    out = "outputs/warmup-d-0.05-0"
    (tmp_path / "clone" / out / "moments/checkpoint-61").mkdir(parents=True)
    lines = select("less", "--pool", "d/pool.json", MODEL="m")
    assert lines[1:] == [
        f"finetune_lora.sh m . {out}/samples/subset.json {out}/moments --save_strategy epoch none",
        f"selection select less --model {out}/moments/checkpoint-61 --model-base m "
        "--pool d/pool.json",
    ]


@pytest.mark.parametrize("method", ["icons", "less", "tive", "rds"])
def test_gradient_methods_on_the_small_world(select, method):
    lines = select(method, MODEL="mini/base/llama")
    targets = "" if method == "tive" else f"--targets {WORLD}/targets/targets.yaml "
    assert lines[0] == f"mini build --out {WORLD}" and "warmup" not in lines[1].split()
    assert lines[-2].startswith(
        f"selection select {method} --pool {WORLD}/pool.json --images {WORLD}/images {targets}"
        "--budget 0.2 --model outputs/warmup-mini-0.05-0/"
    )
    assert lines[-1] == "mini report"


def test_all_is_a_verb_with_the_settings_of_the_small_world(select, tmp_path):
    warmed, held = (f"outputs/warmup-mini-0.05-{seed}" for seed in (0, 1))
    (tmp_path / "clone" / warmed / "moments/checkpoint-61").mkdir(parents=True)
    lines = select("all", "--budget", "0.1", "--out", "o")
    assert lines[:2] == [
        f"mini build --out {WORLD}",
        f"mini clip --data {WORLD} --out {WORLD}/clip",
    ]
    assert [line.split()[0] for line in lines[2:6]] == ["selection", "finetune_lora.sh"] * 2
    assert lines[6:] == [
        f"selection all {POOL} --targets {WORLD}/targets/targets.yaml --budget 0.2 "
        f"--settings mini --model {warmed}/moments/checkpoint-61 --model-base mini/base/llama "
        f"--holdout_model {held}/model --holdout_base mini/base/llama --budget 0.1 --out o",
        "mini report --run o",
    ]
    assert select("all", "--pool", "p", "--model", "m") == ["selection all --pool p --model m"]


def test_rho_loss_on_the_small_world_has_a_holdout_model(select):
    out = "outputs/warmup-mini-0.05-1"
    assert select("rho_loss")[2:] == [
        f"selection select random {POOL} --budget 0.05 --seed 1 --out {out}/samples",
        f"finetune_lora.sh no MODEL {WORLD}/images {out}/samples/subset.json {out}/model",
        f"selection select rho_loss {SMALL} --holdout_model {out}/model "
        "--holdout_base mini/base/llama",
        "mini report",
    ]
    given = select("rho_loss", "--holdout_model", "h")
    assert given[2] == f"selection select rho_loss {SMALL} --holdout_model h"


@pytest.mark.parametrize(
    ("named", "name", "training"),
    [
        ([], "mini-0.2-0", ""),
        (["--objective", "sum", "--draw=3"], "mini-0.2-3-objective-sum", ""),
        (["--pool", "d/pool.json", "--images", "i"], "d-0.2-0", " --learning_rate 2e-5"),
    ],
)
def test_coidos_scorer_is_trained_beside_a_lora(select, named, name, training):
    out = f"outputs/cotrain-{name}"
    given = [f"{POOL} --budget 0.2" if "--pool" not in named else "", *named]
    config = "--config mini/coido.yaml" if "--pool" not in named else ""
    flags = " ".join(filter(None, [config, *given]))
    images = f"{WORLD}/images" if "--pool" not in named else "i"
    batch = " 64" if "--pool" in named else ""
    prepared, trained, selected = (
        line for line in select("coido", *named) if not line.startswith("mini ")
    )
    assert prepared == (
        f"selection select coido {flags} --prepare True --budget 0.2 --out {out}/samples"
    )
    assert trained == (
        f"finetune_lora.sh no MODEL {images} {out}/samples/subset.json {out}/model "
        f"--coido_run {out}/samples --num_train_epochs 2{training} selection.coido.cotrain{batch}"
    )
    words = flags.split()
    assert sorted(selected.split()[3:]) == sorted(
        [*words, "--scorer", f"{out}/model/scorer.safetensors"]
    )


@pytest.mark.parametrize("flag", ["--scorer", "--trajectory", "--model", "--prepare"])
def test_coido_trains_nothing_where_the_answer_is_given(select, flag):
    lines = select("coido", "--pool", "p", flag, "x")
    assert lines == [f"selection select coido --pool p {flag} x"]


@pytest.mark.parametrize("method", ["mllm_selector", "icons", "less", "tive", "coido", "all"])
def test_a_dry_run_trains_nothing(select, method):
    assert select(method, "--pool", "p", "--dry_run", code=2) == []
    (line,) = select(method, "--pool", "p", "--model", "m", "--dry_run")
    assert line.endswith("--pool p --model m --dry_run")


@pytest.mark.parametrize("method", ["mllm_selector", "icons", "less", "tive", "coido", "all"])
def test_flags_are_read_before_a_model_is_trained(select, method):
    flags = ["--pool", "p", "--budgt", "1"]
    assert select(method, *flags, FAILS="--budgt 1 --print_config", code=65) == []


def test_an_unknown_method_prepares_nothing(select):
    assert select("nonsense", "--budget", "0.1") == ["selection select nonsense"]


def test_one_process_a_gpu_and_what_torchrun_is_told(select):
    def start(**environment: str) -> str:
        (line,) = select("random", "--pool", "p", **environment)
        return line

    run, chosen = "torch.distributed.run", "-m selection select random --pool p"
    assert start(GPUS="4") == f"{run} --standalone --nproc_per_node 4 {chosen}"
    assert start(GPUS="4", NPROC="2") == f"{run} --standalone --nproc_per_node 2 {chosen}"
    assert start(GPUS="4", NPROC="1") == chosen.removeprefix("-m ")
    nodes = "--nnodes 2 --node_rank 1"
    assert start(TORCHRUN_ARGS=nodes) == f"{run} {nodes} --nproc_per_node 1 {chosen}"


def test_a_stage_that_fails_is_the_last_and_its_code_is_the_launchers(select):
    assert select(FAILS="mini warmup", code=65)[-1].startswith("mini warmup")
    assert select(FAILS="select", code=65)[-1].startswith("selection select")
