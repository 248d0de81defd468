#!/usr/bin/env bash
# GQA-OOD: accuracy on GQA's testdev_balanced and on its out-of-distribution part: all 2,796, head 1,733, tail 1,063.
#
#   bash scripts/v1_5/eval/gqa_ood.sh                                      the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/gqa_ood.sh       playground/data/eval/gqa
benchmark=gqa_ood folder=gqa
source "$(dirname "$0")/common.sh"
