#!/usr/bin/env bash
# ARC-Easy, text only: Clean, PA, SA and SA+PA over 2,277 of the test questions, 54,954 orders of their options.
# Environment and flags: bash scripts/v1_5/eval/arc_e.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" arc_e "$@"
