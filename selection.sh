#!/usr/bin/env bash
# Picks the training subset worth using. Nothing set: ARDS on the small real world, two CPU cores, under ten minutes
# the first time (downloads, pictures, warm-up of the proxy) and under three afterwards.
#
#   bash selection.sh                                   the small real world, 30 % by ARDS
#   bash selection.sh random --budget 0.1               another method, any flag of `python -m selection select METHOD --help`
#   bash selection.sh all --budget 0.2                  every method that can run, one pass of the proxy, one comparison
#   bash selection.sh --pool llava_v1_5_mix665k.json --images playground/data --model checkpoints/llava-7b-warmup \
#     --model-base lmsys/vicuna-7b-v1.5 --budget 0.3 --out outputs/ards30        LLaVA-665K on every GPU of this node
#   bash selection.sh mllm_selector --pool ...          without --model: first fine-tunes its seed model (MODEL= the base)
#   bash selection.sh icons --targets targets.yaml      so do icons, less, tive and rds: a LoRA on 5 % of the pool
#
# NPROC=2     processes (default: one a GPU, else one); several nodes: scripts/slurm/selection.sbatch
# PYTHON=...  use this interpreter instead of making .venv
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh
export TOKENIZERS_PARALLELISM=false

# The default pool is built, and its proxy warmed up, unless the caller names a pool or only asks for help.
method=(ards)
case "${1:-}" in "" | -*) ;; *) method=("$1"); shift ;; esac
small_world=1 report=1 warmup=1 out='' previous=''
for argument in "$@"; do
  case "$argument" in
    --pool | --pool=* | --config | --config=* | --help | -h | --print_config*) small_world='' report='' ;;&
    --model | --model=* | --config | --config=* | --help | -h | --print_config*) warmup='' ;;&
    --config | --config=*) if [ "${method[0]}" = ards ]; then method=(); fi ;; # the file names it
    --dry[-_]run*) report= ;;
    --out=*) out=${argument#--out=} ;;
  esac
  if [ "$previous" = --out ]; then out=$argument; fi
  previous=$argument
done
defaults=()
if [ -n "$small_world" ]; then
  world=playground/mini
  "$PYTHON" -m mini build --out "$world"
  defaults=(--pool "$world/pool.json" --images "$world/images")
  case "${method[0]}" in
    icons | less | rds) defaults+=(--targets "$world/targets/targets.yaml" --budget 0.2) ;;
    tive) defaults+=(--budget 0.2) ;;
    *)
      "$PYTHON" -m mini warmup --data "$world" --out "$world/proxy"
      defaults+=(--model "$world/proxy" --budget 0.3) ;;
  esac
  if [ "${method[0]}" = all ]; then defaults+=(--settings mini); fi
  if [ "${method[0]}" = all ] || grep -qs "^clip: $world/clip" "mini/${method[0]}.yaml"; then "$PYTHON" -m mini clip --data "$world" --out "$world/clip"; fi
  if [ -f "mini/${method[0]}.yaml" ]; then defaults=(--config "mini/${method[0]}.yaml" "${defaults[@]}"); fi
fi
# The proxy of MLLM-Selector has learnt its seed set, that of the methods that compare gradients 5 % of the pool.
if [ -n "$warmup" ]; then
  source scripts/warmup.sh
  case "${method[0]:-}" in
    mllm_selector)
      share=$(value_of --n_seed "$@") draw=$(value_of --seed_draw "$@")
      warm_up "${share:-0.03}" "${draw:-0}" "${defaults[@]}" "$@" ;;
    less) moments=1 warm_up 0.05 0 "${defaults[@]}" "$@" ;;
    icons | tive | rds) warm_up 0.05 0 "${defaults[@]}" "$@" ;;
  esac
  defaults+=(${proxy[@]+"${proxy[@]}"})
fi

nproc=${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
if [ "$nproc" -gt 1 ] || [ -n "${TORCHRUN_ARGS:-}" ]; then
  # shellcheck disable=SC2206  # TORCHRUN_ARGS is a list of flags
  run=("$PYTHON" -m torch.distributed.run ${TORCHRUN_ARGS:---standalone} --nproc_per_node "$nproc" -m selection)
else
  run=("$PYTHON" -m selection)
fi
ask=(select "${method[@]}")
if [ "${method[0]:-}" = all ]; then ask=(all); fi
"${run[@]}" "${ask[@]}" "${defaults[@]}" "$@"
if [ -n "$report" ]; then "$PYTHON" -m mini report ${out:+--run "$out"}; fi
