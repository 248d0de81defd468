#!/usr/bin/env bash
# Alignment pre-training of LLaVA-1.5: the projector alone, on 558K image-caption pairs.
# LLaVA reports 5.5 hours for 13B and 3.5 for 7B on 8 A100 of 80 GB. The small world's takes a minute on two cores.
#
#   bash scripts/v1_5/pretrain.sh                                          the small world's 4,127 captions
#   SIZE=7b DATA=blip_laion_cc_sbu_558k.json IMAGES=LLaVA-Pretrain/images bash scripts/v1_5/pretrain.sh
recipe=pretrain
source "$(dirname "$0")/common.sh"

: "${MODEL:=lmsys/vicuna-$SIZE-v1.5}" "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${DATA:=playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
: "${IMAGES:=playground/data/LLaVA-Pretrain/images}" "${OUTPUT:=checkpoints/llava-v1.5-$SIZE-pretrain}"
: "${ZERO:=zero2}" "${GLOBAL_BATCH:=256}" "${PER_DEVICE:=32}"
flags=(--version plain --tune_mm_mlp_adapter True --learning_rate 1e-3 --save_steps 24000)
train "$@"
