#!/usr/bin/env bash
# Further LoRA fine-tuning of a whole LLaVA on data of your own: adapters of the language model, and the projector.
# Made for 8 A100 of 80 GB; with ZERO=zero3_offload or a smaller batch for less (`--plan` says what fits).
#
#   bash scripts/v1_5/finetune_task_lora.sh                                the small world's warmed-up proxy, minutes on two cores
#   DATA=task.json IMAGES=images MODEL=liuhaotian/llava-v1.5-13b OUTPUT=checkpoints/task bash scripts/v1_5/finetune_task_lora.sh
recipe=finetune_task_lora
source "$(dirname "$0")/common.sh"

: "${MODEL:=liuhaotian/llava-v1.5-$SIZE}" "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}" "${IMAGES:=playground/data}"
: "${OUTPUT:=checkpoints/llava-v1.5-$SIZE-task-lora}" "${ZERO:=zero3}" "${GLOBAL_BATCH:=128}" "${PER_DEVICE:=16}"
flags=(--version v1 --image_aspect_ratio pad --group_by_modality_length True --save_steps 50000
  --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4)
train "$@"
