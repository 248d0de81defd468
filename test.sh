#!/usr/bin/env bash
# Sets up the environment and runs the tests on the CPU: about eight minutes on two cores.
# Arguments go to pytest: bash test.sh tests/selection -k store
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh dev train judge mini
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -n "${WORKERS:-$(getconf _NPROCESSORS_ONLN)}" --dist loadfile "$@"
