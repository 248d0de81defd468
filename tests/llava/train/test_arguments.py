"""Flags: those of LLaVA's own scripts work unchanged, wrong ones are told in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants

from llava.errors import UsageError
from llava.model.sources import find_directory
from llava.train.arguments import check_machine, parse

NEEDED = ["--model_name_or_path", "lm", "--data_path", "x.json", "--output_dir", "out"]

# LLaVA-1.5's scripts, with the launcher's own flag; only wandb, which is not here, is left out.
COMMON = """
--local_rank=0 --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu
--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True
--num_train_epochs 1 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
--evaluation_strategy no --save_strategy steps --save_total_limit 1 --weight_decay 0.
--warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
--model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4
--lazy_preprocess True --report_to none
"""
FINETUNE = """
--deepspeed ./scripts/zero3.json --version v1 --image_aspect_ratio pad
--group_by_modality_length True --per_device_train_batch_size 16 --save_steps 50000
--data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data
"""
VICUNA, LLAVA = "lmsys/vicuna-13b-v1.5", "liuhaotian/llava-v1.5-13b"
PROJECTOR = "./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin"
LORA = "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5"
SCRIPTS = {
    "pretrain": f"""
        --deepspeed ./scripts/zero2.json --model_name_or_path {VICUNA} --version plain
        --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
        --image_folder ./playground/data/LLaVA-Pretrain/images --tune_mm_mlp_adapter True
        --learning_rate 1e-3 --per_device_train_batch_size 32 --save_steps 24000
        --output_dir ./checkpoints/llava-v1.5-13b-pretrain""",
    "finetune": f"""{FINETUNE} --model_name_or_path {VICUNA} --learning_rate 2e-5
        --pretrain_mm_mlp_adapter {PROJECTOR} --output_dir ./checkpoints/llava-v1.5-13b""",
    "finetune_lora": f"""{FINETUNE} --model_name_or_path {VICUNA} --learning_rate 2e-4 {LORA}
        --pretrain_mm_mlp_adapter {PROJECTOR} --output_dir ./checkpoints/llava-v1.5-13b-lora""",
    "finetune_task": f"""{FINETUNE} --model_name_or_path {LLAVA} --learning_rate 2e-5
        --output_dir ./checkpoints/llava-v1.5-13b-task""",
    "finetune_task_lora": f"""{FINETUNE} --model_name_or_path {LLAVA} --learning_rate 2e-4 {LORA}
        --output_dir ./checkpoints/llava-v1.5-13b-task-lora""",
}
# What LLaVA's own classes say, but for the two flags that a run cannot do without.
DEFAULTS = {
    "model": {
        "version": "v0",
        "freeze_backbone": False,
        "tune_mm_mlp_adapter": False,
        "vision_tower": None,
        "mm_vision_select_layer": -1,
        "pretrain_mm_mlp_adapter": None,
        "mm_projector_type": "linear",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": True,
        "mm_patch_merge_type": "flat",
        "mm_vision_select_feature": "patch",
    },
    "data": {
        "lazy_preprocess": False,
        "is_multimodal": False,
        "image_folder": None,
        "image_aspect_ratio": "square",
    },
    "training": {
        "cache_dir": None,
        "optim": "adamw_torch",
        "remove_unused_columns": False,
        "freeze_mm_mlp_adapter": False,
        "mpt_attn_impl": "triton",
        "model_max_length": 512,
        "double_quant": True,
        "quant_type": "nf4",
        "bits": 16,
        "lora_enable": False,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_weight_path": "",
        "lora_bias": "none",
        "mm_projector_lr": None,
        "group_by_modality_length": False,
    },
}


# In a process of its own: with --deepspeed, parsing joins a process group.
PARSE = """
import json, sys
from llava.train.arguments import check_machine, parse
for script in json.load(sys.stdin):
    parts = parse(script.split())
    flags = {**vars(parts.model), **vars(parts.data), **vars(parts.training)}
    flags["evaluation_strategy"] = flags["eval_strategy"]
    flags["warmup_ratio"] = parts.training.get_warmup_steps(1000) / 1000
    flags["deepspeed"] = f"./scripts/zero{flags['deepspeed']['zero_optimization']['stage']}.json"
    flags["dtype"] = parts.training.compute_dtype
    print(json.dumps(flags, default=str))
"""


def test_llavas_own_scripts():
    """Each flag has the value it is given, under its new name where it has one."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps([COMMON + script for script in SCRIPTS.values()]),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = dict(zip(SCRIPTS, map(json.loads, done.stdout.splitlines()), strict=True))
    other = {"report_to": [], "tf32": None}  # none asked for; no GPU, on which it means something
    for name, flags in found.items():
        words = f"{COMMON} {SCRIPTS[name]}".replace("=", " ").split()
        for flag, value in zip(words[::2], words[1::2], strict=True):
            got = flags[flag[2:]]
            expected = float(value) if isinstance(got, float) else other.get(flag[2:], value)
            assert got == expected or str(got) == expected, (name, flag)
        assert flags["dtype"] == "torch.bfloat16" and flags["use_cpu"]


@pytest.mark.parametrize("part", DEFAULTS)
def test_defaults_are_llavas(part):
    arguments = getattr(parse(NEEDED), part)
    for flag, value in DEFAULTS[part].items():
        assert getattr(arguments, flag) == value, flag
        words = [f"--{flag}", str(value)] if value is not None and value != "" else []
        assert getattr(getattr(parse([*NEEDED, *words]), part), flag) == value, flag


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("False", False), ("true", True), ("0", False)]
)
def test_booleans_are_words(text, value):
    assert parse([*NEEDED, "--tune_mm_mlp_adapter", text]).model.tune_mm_mlp_adapter is value


def test_equals_signs_and_hyphens():
    arguments = parse([*NEEDED, "--warmup_ratio=0.1", "--mm-projector-type=mlp2x_gelu", "--bf16"])
    assert arguments.training.get_warmup_steps(50) == 5
    assert arguments.training.bf16 is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learnin_rate", "1"], r"unknown flag --learnin_rate; did you mean --learning_rate\?"),
        (["--evaluation_strateg", "no"], r"did you mean --evaluation_strategy\?"),
        (["--mm-projector-tipe", "linear"], r"did you mean --mm_projector_type\?"),
        (["--xyzzy", "1"], "unknown flag --xyzzy; see --help_all"),
        (["--bf16", "True", "--fp16", "True"], "At most one of fp16 and bf16"),
        (["--learning_rate", "fast"], "--learning_rate.*invalid float value: 'fast'"),
        (["--version", "v9"], "unknown template 'v9'"),
        (["--mm_projector_type", "mlp2x_relu"], "mm_projector_type mlp2x_relu: not supported"),
        (["--mm_patch_merge_type", "spatial"], "only flat is supported"),
        (["--mm_use_im_start_end", "True"], "--mm_use_im_start_end True is not supported"),
        (["--eval_strategy", "steps", "--eval_steps", "5"], "give --eval_data_path"),
        (["--eval_on_start", "True"], "give --eval_data_path"),
        (["--load_best_model_at_end", "True"], "every checkpoint is a model"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["--remove_unused_columns", "True"], "must stay False"),
        (["--lora_enable", "True", "--lora_r", "0"], "--lora_r 0"),
        (["--lora_enable", "True", "--lora_dropout", "1"], "--lora_dropout 1.0: is a share"),
        (["--lora_enable", "True", "--tune_mm_mlp_adapter", "True"], "drop --lora_enable"),
        (["--tune_mm_mlp_adapter", "--freeze_mm_mlp_adapter"], "contradict each other; drop one"),
        (["--freeze_backbone", "--freeze_mm_mlp_adapter"], "leave nothing to train; drop one"),
        (["--bits", "4"], "--bits 4: quantised weights cannot be trained; add --lora_enable True"),
        (["--bits", "5"], "--bits: invalid choice: '5'"),
        (["--packing", "--per_device_train_batch_size", "1"], "--packing joins the samples"),
        (["--fsdp", "full_shard"], "use --deepspeed scripts/zero3.json"),
        (["--train_sampling_strategy", "group_by_length"], "--group_by_modality_length True"),
        (
            ["--train_sampling_strategy", "sequential", "--group_by_modality_length"],
            "contradict each other",
        ),
        (["--save_strategy", "sometimes"], "sometimes"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UsageError, match=message):
        parse([*NEEDED, *flags])


def test_flags_for_another_machine_are_for_planning():
    flags = parse([*NEEDED, "--fp16", "True"]).training
    if flags.use_cpu:
        with pytest.raises(UsageError, match="--fp16 True needs a GPU; on the CPU use --bf16"):
            check_machine(flags)
    check_machine(parse([*NEEDED, "--bf16", "True"]).training)


def test_cache_dir_is_where_hub_models_are(parts, tmp_path, monkeypatch):
    for name in ("OFFLINE", "CACHE"):  # CACHE as it is, so that it is put back
        value = name == "OFFLINE" or getattr(constants, f"HF_HUB_{name}")
        monkeypatch.setattr(constants, f"HF_HUB_{name}", value)
    repository = tmp_path / "models--lm-sys--vicuna"
    shutil.copytree(parts / "lm", repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    name = "lm-sys/vicuna"
    with pytest.raises(UsageError, match="lm-sys/vicuna: no such directory"):
        find_directory(name)
    parse([*NEEDED, "--cache_dir", str(tmp_path)])
    assert find_directory(name) == repository / "snapshots" / "abc"


def test_a_misspelt_flag_is_told_before_a_missing_one():
    with pytest.raises(UsageError, match=r"unknown flag --output_dirr; did you mean --output_dir"):
        parse(["--output_dirr", "out"])


@pytest.mark.parametrize("missing", ["--model_name_or_path", "--data_path", "--output_dir"])
def test_required_flags(missing):
    at = NEEDED.index(missing)
    with pytest.raises(UsageError, match=f"{missing} is required"):
        parse(NEEDED[:at] + NEEDED[at + 2 :])


def test_help_shows_what_a_newcomer_needs(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    short = capsys.readouterr().out
    assert "--lora_enable True" in short and "--learning_rate" in short
    assert len(short.splitlines()) < 105
    with pytest.raises(SystemExit):
        parse(["--help_all"])
    assert len(capsys.readouterr().out) > 4 * len(short)
