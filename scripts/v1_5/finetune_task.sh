#!/usr/bin/env bash
# Further fine-tuning of a whole LLaVA on data of your own: finetune_task.yaml.
# Nothing set: the small world. Environment and flags: bash scripts/v1_5/finetune_task.sh --help
exec bash "$(dirname "$0")/train.sh" finetune_task "$@"
