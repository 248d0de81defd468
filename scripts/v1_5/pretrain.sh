#!/usr/bin/env bash
# Alignment pre-training of LLaVA-1.5: the projector alone, on image-caption pairs: pretrain.yaml.
# Nothing set: the small world. Environment and flags: bash scripts/v1_5/pretrain.sh --help
exec bash "$(dirname "$0")/train.sh" pretrain "$@"
