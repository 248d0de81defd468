#!/usr/bin/env bash
# LoRA fine-tuning of LLaVA-1.5-7B. Nothing set: the small world's model on the subset selected last, two CPU cores.
#
#   bash finetune_lora.sh                                                  after `bash selection.sh`
#   DATA=playground/mini/pool.json bash finetune_lora.sh                   the small world's whole pool
#   DATA=outputs/ards30/subset.json IMAGES=playground/data MODEL=lmsys/vicuna-7b-v1.5 bash finetune_lora.sh --save_steps 500
#
# Environment and flags: bash finetune_lora.sh --help
set -euo pipefail
cd "$(dirname "$0")"
SIZE=${SIZE:-7b} exec bash scripts/v1_5/finetune_lora.sh "$@"
