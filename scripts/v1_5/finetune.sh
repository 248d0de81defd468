#!/usr/bin/env bash
# Fine-tuning of LLaVA-1.5 on a visual-instruction mixture: language model and projector: finetune.yaml.
# Nothing set: the small world. Environment and flags: bash scripts/v1_5/finetune.sh --help
exec bash "$(dirname "$0")/train.sh" finetune "$@"
