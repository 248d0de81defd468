#!/usr/bin/env bash
# Full fine-tuning of LLaVA-1.5-13B. Nothing set: the small world's model on the subset selected last, two CPU cores.
#
#   bash finetune.sh                                                       after `bash selection.sh`
#   DATA=outputs/ards30/subset.json IMAGES=playground/data MODEL=lmsys/vicuna-13b-v1.5 bash finetune.sh --save_steps 500
#
# Environment and flags: bash finetune.sh --help
set -euo pipefail
cd "$(dirname "$0")"
SIZE=13b exec bash scripts/v1_5/finetune.sh "$@"
