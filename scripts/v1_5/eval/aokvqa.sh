#!/usr/bin/env bash
# A-OKVQA: Clean, PA, SA and SA+PA over the 1,145 validation questions, 27,480 orders of their options.
# Environment and flags: bash scripts/v1_5/eval/aokvqa.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" aokvqa "$@"
