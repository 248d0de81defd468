#!/usr/bin/env bash
# common.sh sources it. Where the caller names no MODEL, and no DATA from elsewhere, it builds the small world and
# sets MODEL, DATA, IMAGES, ... to its parts and `small` to the flags of mini/<recipe>.yaml.
# shellcheck disable=SC2034,SC2154  # common.sh and the launcher share these variables
world=playground/mini

# Whether file $1 is the small world's, or was selected from its pool.
of_small_world() {
  [ "$(realpath -m "$(dirname "$1")")" = "$(realpath -m "$world")" ] ||
    grep -qs "$world/pool.json" "$(dirname "$1")/manifest.json"
}

# The subset that was selected last from the small world; nothing if there is none.
newest_subset() {
  local manifest newest=''
  for manifest in outputs/*/manifest.json; do
    of_small_world "$manifest" || continue
    if [ -z "$newest" ] || [ "$manifest" -nt "$newest" ]; then newest=$manifest; fi
  done
  if [ -n "$newest" ]; then echo "$(dirname "$newest")/subset.json"; fi
}

if [ -z "${MODEL:-}" ] && { [ -z "${DATA:-}" ] || of_small_world "$DATA"; }; then
  echo "$recipe: the small world, flags of mini/${recipe/_task/}.yaml" >&2
  "$PYTHON" -m mini build --out "$world"
  case "$recipe" in
    pretrain) # the projector is what is trained
      "$PYTHON" -m mini captions --data "$world"
      MODEL=mini/base/llama DATA=${DATA:-$world/captions.json} PROJECTOR=${PROJECTOR-} ;;
    finetune_task*) # a LLaVA brings its own tower and projector
      "$PYTHON" -m mini warmup --data "$world" --out "$world/proxy"
      MODEL=$world/proxy VISION_TOWER=${VISION_TOWER-} ;;
    *) MODEL=mini/base/llama PROJECTOR=${PROJECTOR-mini/base/projector.safetensors} ;;
  esac
  DATA=${DATA:-$(newest_subset)} DATA=${DATA:-$world/pool.json}
  IMAGES=${IMAGES:-$world/images} VISION_TOWER=${VISION_TOWER-mini/base/clip}
  OUTPUT=${OUTPUT:-outputs/$recipe-$(basename "$(dirname "$DATA")")}
  ZERO=${ZERO:-zero2} GLOBAL_BATCH=${GLOBAL_BATCH:-16} PER_DEVICE=8
  mapfile -t small < <(sed -nE 's/^([a-z0-9_]+): *([^ #]+).*$/--\1\n\2/p' "mini/${recipe/_task/}.yaml")
fi
