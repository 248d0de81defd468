#!/usr/bin/env bash
# From the environment, for every training launcher:
#   DATA= IMAGES=       LLaVA JSON, and the folder of its images
#   MODEL=              what training starts from: a directory or a hub name
#   VISION_TOWER=       CLIP, and PROJECTOR= an mm_projector.bin, for a MODEL that is a language model
#   OUTPUT=             where the result goes
#   SIZE=7b             which LLaVA-1.5 the defaults name: 7b or 13b
#   ZERO=zero2          zero2, zero3, zero3_offload, a DeepSpeed file of your own, or none (plain data parallelism)
#   GLOBAL_BATCH=128    samples an optimizer step; kept whatever the number of processes, by accumulation
#   NPROC=8             processes on this machine (default: one a GPU, else two)
#   TORCHRUN_ARGS=...   torchrun's flags for several machines: see scripts/slurm/
#   REPORT_TO=wandb     tracker (default: none)
#   TRAINING=...        another training program (default: llava.train.train_mem)
#   PYTHON=...          this interpreter instead of .venv
# With neither MODEL nor DATA, or with DATA from the small world, the small world's model is trained.
#
# A launcher sets `recipe`, sources this file, sets its defaults and `flags`, and calls `train "$@"`.
# shellcheck disable=SC2154  # recipe and flags are the launcher's
set -euo pipefail
case " $* " in *" --help "* | *" -h "*)
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  sed -n '2,/^#$/s/^# \{0,1\}/ /p' "${BASH_SOURCE[0]}"
  echo "Flags of 'python -m llava.train --help_all' can follow; the last of a kind counts."
  exit ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup.sh
source scripts/flags.sh
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} SIZE=${SIZE:-13b}
small=()
source scripts/v1_5/small_world.sh

# Sets `batch`, the flags with which `processes` take GLOBAL_BATCH samples a step.
share_batch() {
  local each accumulated
  each=$(value_of --per_device_train_batch_size "$@")
  accumulated=$(value_of --gradient_accumulation_steps "$@")
  if [ -z "$each" ]; then
    each=$PER_DEVICE
    while [ "$each" -gt 1 ] && [ $((GLOBAL_BATCH % (each * processes))) -ne 0 ]; do each=$((each - 1)); done
  fi
  if [ -z "$accumulated" ]; then
    if [ $((GLOBAL_BATCH % (each * processes))) -ne 0 ]; then
      echo "error: GLOBAL_BATCH=$GLOBAL_BATCH does not divide among $processes processes of $each; set another, or" \
        "--per_device_train_batch_size and --gradient_accumulation_steps" >&2
      exit 2
    fi
    accumulated=$((GLOBAL_BATCH / (each * processes)))
  fi
  batch=(--per_device_train_batch_size "$each" --gradient_accumulation_steps "$accumulated")
  echo "$recipe: $processes processes x $each samples x $accumulated accumulated =" \
    "$((processes * each * accumulated)) samples a step" >&2
}

# Starts the training: LLaVA-1.5's common flags, then `flags`, then the small world's, then the caller's.
train() {
  local nodes processes batch deepspeed=() tower=() run=()
  NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}
  # shellcheck disable=SC2086  # TORCHRUN_ARGS is a list of flags
  nodes=$(value_of --nnodes ${TORCHRUN_ARGS:-})
  processes=$((NPROC * ${nodes:-1}))
  if [ ! -f "$DATA" ]; then echo "error: DATA=$DATA: no such file" >&2; exit 2; fi
  share_batch "$@"
  case "$ZERO" in
    none) ;;
    *.json) deepspeed=(--deepspeed "$ZERO") ;;
    *) deepspeed=(--deepspeed "scripts/$ZERO.json") ;;
  esac
  if [ -n "${VISION_TOWER:-}" ]; then tower=(--vision_tower "$VISION_TOWER"); fi
  if [ -n "${PROJECTOR:-}" ]; then tower+=(--pretrain_mm_mlp_adapter "$PROJECTOR"); fi
  case " $* " in
    *" --plan "*) run=(env WORLD_SIZE="$processes" "$PYTHON" -m llava.train) ;; # a plan needs no processes
    *)
      echo "$recipe: trains $MODEL on $DATA, into $OUTPUT" >&2
      # shellcheck disable=SC2206  # TORCHRUN_ARGS is a list of flags
      run=("$PYTHON" -m llava.launch ${TORCHRUN_ARGS:---standalone} --nproc_per_node "$NPROC"
        -m "${TRAINING:-llava.train.train_mem}") ;;
  esac
  exec "${run[@]}" "${deepspeed[@]}" \
    --model_name_or_path "$MODEL" --data_path "$DATA" --image_folder "$IMAGES" --output_dir "$OUTPUT" \
    "${tower[@]}" --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 \
    --mm_use_im_start_end False --mm_use_im_patch_token False \
    --bf16 True --tf32 True --num_train_epochs 1 --per_device_eval_batch_size 4 \
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 \
    --evaluation_strategy no --save_strategy steps --save_total_limit 2 \
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 \
    --lazy_preprocess True --report_to "${REPORT_TO:-none}" \
    "${batch[@]}" "${flags[@]}" "${small[@]}" "$@"
}
