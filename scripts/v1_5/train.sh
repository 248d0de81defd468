#!/usr/bin/env bash
# Trains by a recipe: the name of a YAML file in this folder, or the path of one of your own, from the clone.
#
#   bash scripts/v1_5/train.sh finetune_lora --help
#   DATA=outputs/ards30/subset.json IMAGES=playground/data bash scripts/v1_5/train.sh my.yaml --save_steps 500
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh core
exec "$PYTHON" -m mini.launch train "$@"
