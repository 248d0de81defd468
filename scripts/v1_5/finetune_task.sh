#!/usr/bin/env bash
# Further fine-tuning of a whole LLaVA on data of your own: language model and projector.
# Needs what finetune.sh needs: 8 A100 of 80 GB for 13B, 7B on 4.
#
#   bash scripts/v1_5/finetune_task.sh                                     the small world's warmed-up proxy, minutes on two cores
#   DATA=task.json IMAGES=images MODEL=liuhaotian/llava-v1.5-13b OUTPUT=checkpoints/task bash scripts/v1_5/finetune_task.sh
recipe=finetune_task
source "$(dirname "$0")/common.sh"

: "${MODEL:=liuhaotian/llava-v1.5-$SIZE}" "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}" "${IMAGES:=playground/data}"
: "${OUTPUT:=checkpoints/llava-v1.5-$SIZE-task}" "${ZERO:=zero3}" "${GLOBAL_BATCH:=128}" "${PER_DEVICE:=16}"
flags=(--version v1 --image_aspect_ratio pad --group_by_modality_length True --learning_rate 2e-5 --save_steps 50000)
train "$@"
