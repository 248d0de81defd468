#!/usr/bin/env bash
# Asks a model the questions of a benchmark; eval/ has a launcher for each.
#
#   bash scripts/v1_5/evaluate.sh sqa                                      the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/evaluate.sh sqa       playground/data/eval/scienceqa
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh core
exec "$PYTHON" -m mini.launch evaluate "$@"
