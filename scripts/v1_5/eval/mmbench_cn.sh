#!/usr/bin/env bash
# MMBench, Chinese: Clean, PA, SA and SA+PA over all rows of the dev file; rotations of a question are asked once.
# Environment and flags: bash scripts/v1_5/eval/mmbench_cn.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" mmbench_cn "$@"
