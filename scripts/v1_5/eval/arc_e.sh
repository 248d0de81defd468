#!/usr/bin/env bash
# ARC-Easy, text only: Clean, PA, SA and SA+PA over 2,277 of the test questions, 54,954 orders of their options.
#
#   bash scripts/v1_5/eval/arc_e.sh                                        the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/arc_e.sh         playground/data/eval/arc_e
benchmark=arc_e folder=arc_e
source "$(dirname "$0")/common.sh"
