#!/usr/bin/env bash
# GQA: accuracy on the 12,578 questions of testdev_balanced.
#
#   bash scripts/v1_5/eval/gqa.sh                                          the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/gqa.sh           playground/data/eval/gqa
benchmark=gqa folder=gqa
source "$(dirname "$0")/common.sh"
