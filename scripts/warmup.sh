#!/usr/bin/env bash
# selection.sh sources it: the proxy of methods that read a model fine-tuned on a random part of the pool.
# shellcheck disable=SC2034,SC2154  # selection.sh has PYTHON and uses proxy
source scripts/flags.sh

# Draws $1 (a fraction or a count) of the pool with seed $2 and fine-tunes a LoRA on it, in outputs/warmup-...; the
# other words are the flags that `select` will get. Sets `proxy`, the flags that name the result. MODEL= is what is
# fine-tuned, as for finetune_lora.sh. With `moments` set the result is a checkpoint that holds Adam's moments, which a
# training without DeepSpeed keeps. What is finished is not done again.
warm_up() {
  local share=$1 seed=$2 pool images limit name out base model
  shift 2
  pool=$(value_of --pool "$@") images=$(value_of --images "$@") limit=$(value_of --limit "$@")
  name=$(basename "$pool" .json)
  if [ "$name" = pool ]; then name=$(basename "$(dirname "$(realpath -m "$pool")")"); fi
  out=outputs/warmup-$name${limit:+-$limit}-$share-$seed
  "$PYTHON" -m selection select random --pool "$pool" ${images:+--images "$images"} ${limit:+--limit "$limit"} \
    --budget "$share" --seed "$seed" --out "$out/samples"
  base=${MODEL:-}
  if [ -z "$base" ]; then
    base=lmsys/vicuna-${SIZE:-7b}-v1.5
    if grep -qs playground/mini/pool.json "$out/samples/manifest.json"; then base=mini/base/llama; fi
  fi
  model=$out/model
  if [ -n "${moments:-}" ]; then
    DATA=$out/samples/subset.json OUTPUT=$out/moments IMAGES=${images:-.} ZERO=none \
      bash finetune_lora.sh --save_strategy epoch
    for model in "$out"/moments/checkpoint-*; do :; done
  else
    DATA=$out/samples/subset.json OUTPUT=$model IMAGES=${images:-.} bash finetune_lora.sh
  fi
  proxy=(--model "$model" --model-base "$base")
}
