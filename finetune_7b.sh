#!/usr/bin/env bash
# Full fine-tuning of LLaVA-1.5-7B. Nothing set: the small world's model on the subset selected last, two CPU cores.
#
#   bash finetune_7b.sh                                                    after `bash selection.sh`
#   DATA=outputs/ards30/subset.json IMAGES=playground/data MODEL=lmsys/vicuna-7b-v1.5 bash finetune_7b.sh --save_steps 500
#
# Environment and flags: bash finetune_7b.sh --help
set -euo pipefail
cd "$(dirname "$0")"
SIZE=7b exec bash scripts/v1_5/finetune.sh "$@"
