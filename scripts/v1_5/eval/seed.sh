#!/usr/bin/env bash
# SEED-Bench: Clean, PA, SA and SA+PA over 19,242 questions on pictures and video frames, 24 orders each.
# Environment and flags: bash scripts/v1_5/eval/seed.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" seed "$@"
