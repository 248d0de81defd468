#!/usr/bin/env bash
# selection.sh sources it: what a method wants trained on a part of the pool first. MODEL= is what is fine-tuned, as for
# finetune_lora.sh. The words after the first are the flags that `select` will get. What is finished is not done again.
# shellcheck disable=SC2034,SC2154  # selection.sh has PYTHON, and uses base, trained and scorer
source scripts/flags.sh

# Sets `where`, the flags that name the pool, its `images` and `name`, and `base`, the model that is fine-tuned.
read_pool() {
  local pool limit
  pool=$(value_of --pool "$@") images=$(value_of --images "$@") limit=$(value_of --limit "$@")
  where=(--pool "$pool" ${images:+--images "$images"} ${limit:+--limit "$limit"})
  name=$(basename "$pool" .json)
  if [ "$name" = pool ]; then name=$(basename "$(dirname "$(realpath -m "$pool")")"); fi
  name+=${limit:+-$limit}
  case "$pool" in
    *playground/mini/pool.json) base=${MODEL:-mini/base/llama} ;;
    *) base=${MODEL:-lmsys/vicuna-${SIZE:-7b}-v1.5} ;;
  esac
}

# Fine-tunes a LoRA on $1 (a fraction or a count) of the pool, drawn with seed $2: `trained`. With `moments` set it is a
# checkpoint that holds Adam's moments, which a training without DeepSpeed keeps.
warm_up() {
  local share=$1 seed=$2 out images name where
  shift 2
  read_pool "$@"
  out=outputs/warmup-$name-$share-$seed trained=$out/model
  "$PYTHON" -m selection select random "${where[@]}" --budget "$share" --seed "$seed" --out "$out/samples"
  if [ -n "${moments:-}" ]; then
    DATA=$out/samples/subset.json OUTPUT=$out/moments IMAGES=${images:-.} ZERO=none \
      bash finetune_lora.sh --save_strategy epoch
    for trained in "$out"/moments/checkpoint-*; do :; done
  else
    DATA=$out/samples/subset.json OUTPUT=$trained IMAGES=${images:-.} bash finetune_lora.sh
  fi
}

# Trains CoIDO's scorer beside a LoRA on a random part of the pool: `scorer`.
co_train() {
  local share draw flag value out images name where paper=(--learning_rate 2e-5) batch=64
  read_pool "$@"
  share=$(value_of --share "$@") draw=$(value_of --draw "$@")
  share=${share:-0.2} out=outputs/cotrain-$name-$share-${draw:-0}
  for flag in features n_clusters n_neighbours architecture objective balance learning_rate; do
    value=$(value_of "--$flag" "$@")
    out+=${value:+-$flag-$value}
  done
  if [ "$base" = mini/base/llama ]; then paper=() batch=; fi
  "$PYTHON" -m selection select coido "$@" --prepare True --budget "$share" --out "$out/samples"
  DATA=$out/samples/subset.json OUTPUT=$out/model IMAGES=${images:-.} TRAINING=selection.methods.coido.cotrain \
    GLOBAL_BATCH=${GLOBAL_BATCH:-$batch} \
    bash finetune_lora.sh --coido_run "$out/samples" --num_train_epochs 2 "${paper[@]}"
  scorer=$out/model/scorer.safetensors
}
