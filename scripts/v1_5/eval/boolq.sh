#!/usr/bin/env bash
# BoolQ, text only: Clean, PA, SA and SA+PA over the 3,270 validation questions, yes and no as lettered options.
#
#   bash scripts/v1_5/eval/boolq.sh                                        the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/boolq.sh         playground/data/eval/boolq
benchmark=boolq folder=boolq
source "$(dirname "$0")/common.sh"
