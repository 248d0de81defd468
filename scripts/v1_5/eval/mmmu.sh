#!/usr/bin/env bash
# MMMU: Clean, PA, SA and SA+PA over the 847 lettered validation questions; --pictures all shows all of a question's.
# Environment and flags: bash scripts/v1_5/eval/mmmu.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" mmmu "$@"
