"""Whole launches: an old script under DeepSpeed's launcher, a SLURM job that is interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.model.checkpoint import load
from llava.train.checkpoints import newest_complete, step_of
from tests.slurm import install

ROOT = Path(__file__).parents[1]
BASE = ROOT / "mini" / "base"
FIXTURE = ROOT / "mini" / "fixture"

# The flags of LLaVA-1.5's finetune_lora.sh, as people keep it in their own scripts, but for the
# places, --max_steps and --report_to.
OLD_SCRIPT = """
deepspeed --num_gpus 2 --master_port {port} llava/train/train_mem.py \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --deepspeed ./scripts/zero3.json \
    --model_name_or_path {base}/llama \
    --version v1 \
    --data_path {fixture}/pool.json \
    --image_folder {fixture}/images \
    --vision_tower {base}/clip \
    --pretrain_mm_mlp_adapter {base}/projector.safetensors \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir {output} \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 50000 \
    --save_total_limit 1 \
    --learning_rate 2e-4 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --max_steps 2 \
    --report_to none
"""


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, "PATH": path, **quiet, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_an_old_script_runs_unchanged(tmp_path):
    """Two ranks, ZeRO-3, two steps; the result is LLaVA's LoRA directory and loads."""
    places = {"base": BASE, "fixture": FIXTURE, "output": tmp_path / "lora", "port": free_port()}
    done = subprocess.run(
        ["bash", "-c", OLD_SCRIPT.format(**places)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"step (\d)/2  loss", done.stderr) == ["1", "2"]
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    wanted = {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"}
    assert wanted | {"config.json", "trainer_state.json"} <= names
    assert load(tmp_path / "lora", base=BASE / "llama").image_processor is not None


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a launcher that trains the small base weights on the fixture."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"  # everything is installed; pip would ask a network
    python.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  "-c import sys; print(sys.prefix)") echo "{tmp_path}" ;;
  "-m pip "*) ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""
    )
    python.chmod(0o755)
    return environment(
        PYTHON=str(python),
        DATA=str(FIXTURE / "pool.json"),
        IMAGES=str(FIXTURE / "images"),
        MODEL=str(BASE / "llama"),
        VISION_TOWER=str(BASE / "clip"),
        PROJECTOR=str(BASE / "projector.safetensors"),
        OUTPUT=str(tmp_path / "out"),
        ZERO="zero2",
        GLOBAL_BATCH="4",
    )


@pytest.fixture
def sbatch(job: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Start a batch script as SLURM would, on two nodes of one process each."""
    job |= {"PORT": str(free_port()), "SLURM_SUBMIT_DIR": str(ROOT)}

    def sbatch(script: str, *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", ROOT / "scripts" / "slurm" / script, *flags],
            cwd=ROOT,
            env={**job, **install(tmp_path / "bin", 2)},
            stderr=subprocess.PIPE,
            text=True,
        )

    return sbatch


@pytest.mark.slow
def test_a_job_is_requeued_before_its_limit_and_goes_on(sbatch, tmp_path):
    """P16 through the template: USR1 to the batch script alone, a checkpoint on two nodes, exit 75,
    `scontrol requeue`; the same job again ends the training from where it was."""
    flags = ["--max_steps", "24", "--dataloader_num_workers", "1", "--bf16", "False"]
    job = sbatch("finetune_lora.sbatch", *flags)
    log = ""
    for line in job.stderr:
        log += line
        if line.startswith("step 3/24"):
            os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(60) == 75, log
    assert (tmp_path / "bin" / "scontrol.log").read_text() == "requeue 7\n"
    stopped = step_of(newest_complete(tmp_path / "out"))
    assert 3 <= stopped < 24
    log = sbatch("finetune_lora.sbatch", *flags).communicate(timeout=120)[1]
    steps = [int(n) for n in re.findall(r"step (\d+)/24  loss", log)]
    assert steps == list(range(stopped + 1, 25)), log
    assert (tmp_path / "bin" / "scontrol.log").read_text() == "requeue 7\n"
    load(tmp_path / "out", base=BASE / "llama")


def test_a_plan_is_of_the_launchers_processes(job):
    """Sixteen GPUs are planned for by one process, which starts nothing."""
    job |= {"NPROC": "8", "TORCHRUN_ARGS": "--nnodes 2", "GLOBAL_BATCH": "128"}
    command = ["bash", "finetune_lora.sh", "--plan", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=job, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["steps"]["global_batch"] == 128 and plan["setup"]["world_size"] == 16
    assert not Path(job["OUTPUT"]).exists()
