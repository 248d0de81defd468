#!/usr/bin/env bash
# GQA: accuracy on the 12,578 questions of testdev_balanced.
# Environment and flags: bash scripts/v1_5/eval/gqa.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" gqa "$@"
