#!/usr/bin/env bash
# ScienceQA: Clean, PA, SA and SA+PA over the 2,017 test questions with a picture, 27,586 orders of their options.
# Environment and flags: bash scripts/v1_5/eval/sqa.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" sqa "$@"
