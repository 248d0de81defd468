"""Flags: those of LLaVA's own scripts work unchanged, wrong ones are told in one line."""

from __future__ import annotations

import pytest
import torch

from llava.errors import UsageError
from llava.train.arguments import parse

NEEDED = ["--model_name_or_path", "lm", "--data_path", "x.json", "--output_dir", "out"]

# finetune_lora.sh of LLaVA-1.5, without --deepspeed (another package) and wandb (likewise).
FINETUNE_LORA = """
--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5
--model_name_or_path lmsys/vicuna-13b-v1.5 --version v1
--data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data
--vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu
--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
--image_aspect_ratio pad --group_by_modality_length True --bf16 True
--output_dir ./checkpoints/llava-v1.5-13b-lora --num_train_epochs 1
--per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
--evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1
--learning_rate 2e-4 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
--logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True
--dataloader_num_workers 4 --lazy_preprocess True --report_to none
"""


def test_llavas_own_script():
    arguments = parse(FINETUNE_LORA.split())
    training = arguments.training
    assert (training.lora_enable, training.lora_r, training.lora_alpha) == (True, 128, 256)
    assert training.get_warmup_steps(1000) == 30  # the ratio, under the name it has now
    assert training.eval_strategy == "no"
    assert training.mm_projector_lr == 2e-5
    assert training.group_by_modality_length and arguments.data.image_aspect_ratio == "pad"
    assert getattr(training, "activation_checkpointing", training.gradient_checkpointing) is True
    assert training.compute_dtype is torch.bfloat16
    assert training.use_cpu is not torch.cuda.is_available()


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
        (["--learnin_rate", "1"], "unknown flag --learnin_rate; did you mean --learning_rate"),
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
    assert len(short.splitlines()) < 100
    with pytest.raises(SystemExit):
        parse(["--help_all"])
    assert len(capsys.readouterr().out) > 4 * len(short)
