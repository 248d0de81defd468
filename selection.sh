#!/usr/bin/env bash
# Picks the training subset worth using. Nothing set: ARDS on the small real world, two CPU cores, under ten minutes
# the first time (downloads, pictures, warm-up of the proxy) and under three afterwards.
#
#   bash selection.sh                                   the small real world, 30 % by ARDS
#   bash selection.sh random --budget 0.1               another method, any flag of `python -m selection select METHOD --help`
#   bash selection.sh all --budget 0.2                  every method that can run, signals shared, one comparison
#   bash selection.sh --pool llava_v1_5_mix665k.json --images playground/data --model checkpoints/llava-7b-warmup \
#     --model-base lmsys/vicuna-7b-v1.5 --budget 0.3 --out outputs/ards30        LLaVA-665K on every GPU of this node
#   bash selection.sh mllm_selector --pool ...          without --model: first fine-tunes its seed model (MODEL= the base)
#   bash selection.sh coido --pool ...                  without --model or --scorer: first trains its scorer beside a LoRA
#   bash selection.sh icons --targets targets.yaml      without --model: first a LoRA on 5 % of the pool; so do less, tive, rds, all
#
# NPROC=2     processes (default: one a GPU, else one); several nodes: scripts/slurm/selection.sbatch
# PYTHON=...  use this interpreter instead of making .venv
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh
export TOKENIZERS_PARALLELISM=false

# The default pool is built, and models are trained, unless the caller names them or only asks for help.
method=(ards)
case "${1:-}" in "" | -*) ;; *) method=("$1"); shift ;; esac
small_world=1 report=1 training=1 dry='' out='' previous=''
for argument in "$@"; do
  case "$argument" in
    --pool | --pool=* | --config | --config=* | --help | -h | --print_config*) small_world='' report='' ;;&
    --model | --model=* | --config | --config=* | --help | -h | --print_config*) training='' ;;&
    --scorer | --scorer=* | --trajectory | --trajectory=* | --prepare | --prepare=*) training='' ;;
    --config | --config=*) if [ "${method[0]}" = ards ]; then method=(); fi ;; # the file names it
    --dry[-_]run*) dry=1 report= ;;
    --out=*) out=${argument#--out=} ;;
  esac
  if [ "$previous" = --out ]; then out=$argument; fi
  previous=$argument
done
if [ "${method[0]:-all}" != all ] && [ ! -f "selection/methods/${method[0]}.py" ]; then
  exec "$PYTHON" -m selection select "${method[@]}" # which names those there are
fi
verb=(select "${method[@]}")
if [ "${method[0]:-}" = all ]; then verb=(all); fi
defaults=()
if [ -n "$small_world" ]; then
  world=playground/mini
  "$PYTHON" -m mini build --out "$world"
  defaults=(--pool "$world/pool.json" --images "$world/images")
  case "${method[0]}" in
    icons | less | rds | all) defaults+=(--targets "$world/targets/targets.yaml" --budget 0.2) ;;
    tive | coido | mllm_selector) defaults+=(--budget 0.2) ;;
    *)
      "$PYTHON" -m mini warmup --data "$world" --out "$world/proxy"
      defaults+=(--model "$world/proxy" --budget 0.3) ;;
  esac
  if [ "${method[0]}" = all ]; then defaults+=(--settings mini); fi
  if [ "${method[0]}" = all ] || grep -qs "^clip: $world/clip" "mini/${method[0]}.yaml"; then "$PYTHON" -m mini clip --data "$world" --out "$world/clip"; fi
  if [ -f "mini/${method[0]}.yaml" ]; then defaults=(--config "mini/${method[0]}.yaml" "${defaults[@]}"); fi
fi
source scripts/prepare.sh
own=()
if [ -n "$training" ]; then
  case "${method[0]:-}" in
    mllm_selector | icons | tive | rds | less | coido | all)
      if [ -n "$dry" ]; then
        echo "error: --dry_run: ${method[0]} would first train a model; name one with --model" >&2
        exit 2
      fi
      # A flag that does not exist is told before hours go into a model.
      "$PYTHON" -m selection "${verb[@]}" "${defaults[@]}" "$@" --print_config=skip_default >/dev/null ;;
  esac
  case "${method[0]:-}" in
    mllm_selector) # its proxy has learnt its seed set
      share=$(value_of --n_seed "$@") draw=$(value_of --seed_draw "$@")
      warm_up "${share:-0.03}" "${draw:-0}" "${defaults[@]}" "$@" ;;
    icons | tive | rds) warm_up 0.05 0 "${defaults[@]}" "$@" ;;
    less | all) moments=1 warm_up 0.05 0 "${defaults[@]}" "$@" ;;
    coido)
      co_train "${defaults[@]}" "$@"
      own=(--scorer "$scorer") ;;
  esac
  if [ -n "${trained:-}" ]; then own=(--model "$trained" --model-base "$base"); fi
fi
# The holdout model of RHO-LOSS has learnt other samples than its proxy.
if [ -n "$small_world" ] && [ -z "$dry" ] && [ -z "$(value_of --holdout_model "$@")" ]; then
  case "${method[0]}" in
    rho_loss | all)
      warm_up 0.05 1 "${defaults[@]}" "$@"
      own+=(--holdout_model "$trained" --holdout_base "$base") ;;
  esac
fi
defaults+=("${own[@]}")

nproc=${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
if [ "$nproc" -gt 1 ] || [ -n "${TORCHRUN_ARGS:-}" ]; then
  # shellcheck disable=SC2206  # TORCHRUN_ARGS is a list of flags
  run=("$PYTHON" -m torch.distributed.run ${TORCHRUN_ARGS:---standalone} --nproc_per_node "$nproc" -m selection)
else
  run=("$PYTHON" -m selection)
fi
"${run[@]}" "${verb[@]}" "${defaults[@]}" "$@"
if [ -n "$report" ]; then "$PYTHON" -m mini report ${out:+--run "$out"}; fi
