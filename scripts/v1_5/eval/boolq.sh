#!/usr/bin/env bash
# BoolQ, text only: Clean, PA, SA and SA+PA over the 3,270 validation questions, yes and no as lettered options.
# Environment and flags: bash scripts/v1_5/eval/boolq.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" boolq "$@"
