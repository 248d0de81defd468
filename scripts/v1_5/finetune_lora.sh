#!/usr/bin/env bash
# LoRA fine-tuning of LLaVA-1.5 on a visual-instruction mixture: adapters of the language model, and the projector.
# Made for 8 A100 of 80 GB; with ZERO=zero3_offload or a smaller batch for less (`--plan` says what fits).
#
#   bash scripts/v1_5/finetune_lora.sh                                     the small world, minutes on two cores
#   DATA=outputs/ards30/subset.json IMAGES=playground/data MODEL=lmsys/vicuna-13b-v1.5 bash scripts/v1_5/finetune_lora.sh
recipe=finetune_lora
source "$(dirname "$0")/common.sh"

: "${MODEL:=lmsys/vicuna-$SIZE-v1.5}" "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${PROJECTOR=checkpoints/llava-v1.5-$SIZE-pretrain/mm_projector.bin}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}" "${IMAGES:=playground/data}"
: "${OUTPUT:=checkpoints/llava-v1.5-$SIZE-lora}" "${ZERO:=zero3}" "${GLOBAL_BATCH:=128}" "${PER_DEVICE:=16}"
flags=(--version v1 --image_aspect_ratio pad --group_by_modality_length True --save_steps 50000
  --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4)
train "$@"
