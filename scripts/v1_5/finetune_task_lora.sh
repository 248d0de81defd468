#!/usr/bin/env bash
# Further LoRA fine-tuning of a whole LLaVA on data of your own: finetune_task_lora.yaml.
# Nothing set: the small world. Environment and flags: bash scripts/v1_5/finetune_task_lora.sh --help
exec bash "$(dirname "$0")/train.sh" finetune_task_lora "$@"
