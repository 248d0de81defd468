"""Flags that transformers has dropped since LLaVA: each has a decision, and it is carried out."""

from __future__ import annotations

import dataclasses

import pytest
import transformers

from llava.errors import UsageError
from llava.train.arguments import ModelArguments, TrainingArguments, parse
from llava.train.legacy import DECISIONS, NoEffect, Refused, Renamed, modernise, nearest

NEEDED = ["--model_name_or_path", "lm", "--data_path", "x.json", "--output_dir", "out"]

# Fields of transformers.TrainingArguments 4.37.2, which LLaVA pins, that take a flag. The last two
# were in 4.31.0, which it pinned at first.
OLD = """
output_dir overwrite_output_dir do_train do_eval do_predict evaluation_strategy
prediction_loss_only per_device_train_batch_size per_device_eval_batch_size
per_gpu_train_batch_size per_gpu_eval_batch_size gradient_accumulation_steps
eval_accumulation_steps eval_delay learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon
max_grad_norm num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_ratio
warmup_steps log_level log_level_replica log_on_each_node logging_dir logging_strategy
logging_first_step logging_steps logging_nan_inf_filter save_strategy save_steps save_total_limit
save_safetensors save_on_each_node save_only_model no_cuda use_cpu use_mps_device seed data_seed
jit_mode_eval use_ipex bf16 fp16 fp16_opt_level half_precision_backend bf16_full_eval
fp16_full_eval tf32 local_rank ddp_backend tpu_num_cores tpu_metrics_debug debug
dataloader_drop_last eval_steps dataloader_num_workers past_index run_name disable_tqdm
remove_unused_columns label_names load_best_model_at_end metric_for_best_model greater_is_better
ignore_data_skip fsdp fsdp_min_num_params fsdp_config fsdp_transformer_layer_cls_to_wrap deepspeed
label_smoothing_factor optim optim_args adafactor group_by_length length_column_name report_to
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers dataloader_pin_memory
dataloader_persistent_workers skip_memory_metrics use_legacy_prediction_loop push_to_hub
resume_from_checkpoint hub_model_id hub_strategy hub_token hub_private_repo hub_always_push
gradient_checkpointing gradient_checkpointing_kwargs include_inputs_for_metrics fp16_backend
push_to_hub_model_id push_to_hub_organization push_to_hub_token mp_parameters auto_find_batch_size
full_determinism torchdynamo ray_scope ddp_timeout torch_compile torch_compile_backend
torch_compile_mode dispatch_batches split_batches include_tokens_per_second
include_num_input_tokens_seen neftune_noise_alpha
sharded_ddp xpu_backend
""".split()
CURRENT = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}


def test_every_old_flag_is_current_or_decided_on():
    assert len(OLD) == 120
    assert [name for name in OLD if name not in CURRENT | DECISIONS.keys()] == []


def test_decisions_are_about_flags_there_were_and_lead_to_flags_there_are():
    ours = {f.name for cls in (ModelArguments, TrainingArguments) for f in dataclasses.fields(cls)}
    for name, decision in DECISIONS.items():
        assert name in OLD or name in ours, name
        if isinstance(decision, Renamed):
            assert decision.to in CURRENT, name


@pytest.mark.parametrize(
    ("old", "field", "value"),
    [
        ("--evaluation_strategy no", "eval_strategy", "no"),
        ("--warmup_ratio 0.1", "warmup_steps", 0.1),
        ("--warmup-ratio=0.1", "warmup_steps", 0.1),
        ("--warmup_ratio 0.1 --warmup_ratio 0.2", "warmup_steps", 0.2),
        ("--warmup_ratio 0.1 --warmup_steps 7", "warmup_steps", 7),
        ("--warmup_steps 7 --warmup_ratio 0.1", "warmup_steps", 7),
        ("--warmup_ratio 0.1 --warmup_steps 0", "warmup_steps", 0.1),
        ("--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
        ("--per_gpu_eval_batch_size 3", "per_device_eval_batch_size", 3),
        ("--no_cuda", "use_cpu", True),
        ("--gradient_checkpointing True", "gradient_checkpointing", True),
        ("--gradient_checkpointing", "activation_checkpointing", True),
        ("--push_to_hub_model_id me/it", "hub_model_id", "me/it"),
        ("--push_to_hub_token abc", "hub_token", "abc"),
        ("--local_rank=0", "local_rank", 0),
        ("--report_to none", "report_to", []),
    ],
)
def test_renamed(old, field, value):
    assert getattr(parse([*NEEDED, *old.split()]).training, field) == value


@pytest.mark.parametrize(
    ("old", "note"),
    [
        ("--overwrite_output_dir", "--overwrite_output_dir: no effect; a run goes on"),
        ("--overwrite_output_dir True", "--overwrite_output_dir True: no effect"),
        ("--logging_dir=runs", "--logging_dir runs: no effect; set TENSORBOARD_LOGGING_DIR"),
        ("--save_safetensors False", "--save_safetensors False: no effect; weights are always"),
        ("--lora_weight_path x", "--lora_weight_path x: no effect"),
        ("--warmup_steps 0 --warmup_ratio 0.1", "--warmup_steps 0: no effect; steps, unless 0"),
    ],
)
def test_without_effect_is_told_once(old, note, capsys):
    parse([*NEEDED, *old.split()])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(note)


def test_only_the_first_process_tells(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse([*NEEDED, "--logging_dir", "runs"])
    assert capsys.readouterr().err == ""


def test_what_happens_anyway_needs_no_word():
    """Every decision has a value that asks for nothing else than what is done."""
    for name, decision in DECISIONS.items():
        if isinstance(decision, NoEffect | Refused):
            for value in decision.usual:
                assert modernise([f"--{name}", value]) == ([], []), name


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("--group_by_length True", "--group_by_length True: use --group_by_modality_length True"),
        ("--half_precision_backend apex", "only PyTorch's mixed precision"),
        ("--sharded_ddp zero_dp_2", "use --deepspeed scripts/zero2.json"),
        ("--adafactor", "--adafactor: use --optim adafactor"),
        ("--split_batches True", "divide --per_device_train_batch_size"),
        ("--fsdp_min_num_params 10", "use --deepspeed"),
        ("--warmup_ratio 1", "--warmup_ratio 1: is a share of all steps, 0 to below 1"),
        ("--warmup_ratio much", "not a number"),
    ],
)
def test_refused_where_it_would_train_something_else(old, message):
    with pytest.raises(UsageError, match=message):
        parse([*NEEDED, *old.split()])


def test_other_words_stay_as_they_are():
    words = ["--mm_vision_select_layer", "-2", "--image_roots", "a", "b", "--bf16", "x", "--y=a=b"]
    assert modernise(words) == ([*words[:-1], "--y", "a=b"], [])
    assert modernise(["-h"]) == (["-h"], [])


def test_nearest_knows_old_names_too():
    assert nearest("--warmup_ratoi", ["--warmup_steps"]) == "--warmup_ratio"
    assert nearest("--qqqqq", ["--warmup_steps"]) is None
