#!/usr/bin/env bash
# Fine-tuning of LLaVA-1.5 on a visual-instruction mixture: language model and projector, vision tower frozen.
# LLaVA reports 20 hours for 13B and 10 for 7B on 8 A100 of 80 GB and 665K samples; a 30 % subset takes 30 % of it.
#
#   bash scripts/v1_5/finetune.sh                                          the small world, minutes on two cores
#   DATA=outputs/ards30/subset.json IMAGES=playground/data MODEL=lmsys/vicuna-13b-v1.5 bash scripts/v1_5/finetune.sh
recipe=finetune
source "$(dirname "$0")/common.sh"

: "${MODEL:=lmsys/vicuna-$SIZE-v1.5}" "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${PROJECTOR=checkpoints/llava-v1.5-$SIZE-pretrain/mm_projector.bin}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}" "${IMAGES:=playground/data}"
: "${OUTPUT:=checkpoints/llava-v1.5-$SIZE}" "${ZERO:=zero3}" "${GLOBAL_BATCH:=128}" "${PER_DEVICE:=16}"
flags=(--version v1 --image_aspect_ratio pad --group_by_modality_length True --learning_rate 2e-5 --save_steps 50000)
train "$@"
