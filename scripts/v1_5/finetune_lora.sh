#!/usr/bin/env bash
# LoRA fine-tuning of LLaVA-1.5 on a visual-instruction mixture: finetune_lora.yaml.
# Nothing set: the small world. Environment and flags: bash scripts/v1_5/finetune_lora.sh --help
exec bash "$(dirname "$0")/train.sh" finetune_lora "$@"
