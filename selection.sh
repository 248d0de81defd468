#!/usr/bin/env bash
# Picks the training subset worth using. Nothing set: ARDS on the small real world, two CPU cores, under ten minutes
# the first time (downloads, pictures, warm-up of the proxy) and under three afterwards.
#
#   bash selection.sh                                   the small real world, 30 % by ARDS
#   bash selection.sh random --budget 0.1               another method, any flag of `python -m selection select METHOD --help`
#   bash selection.sh all --budget 0.2                  every method that can run, signals shared, one comparison
#   bash selection.sh --pool llava_v1_5_mix665k.json --images playground/data --model checkpoints/llava-7b-warmup \
#     --model-base lmsys/vicuna-7b-v1.5 --budget 0.3 --out outputs/ards30        LLaVA-665K on every GPU of this node
#
# A method that wants a model of its own trains it first, where no --model is given: MODEL= is what is fine-tuned, and
# the rest of the environment is that of finetune_lora.sh.
# NPROC=2     processes (default: one a GPU, else one); several nodes: scripts/slurm/selection.sbatch
# PYTHON=...  use this interpreter instead of making .venv
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh core
exec "$PYTHON" -m mini.launch select "$@"
