#!/usr/bin/env bash
# MMBench, English: Clean, PA, SA and SA+PA over all rows of the dev file; rotations of a question are asked once.
#
#   bash scripts/v1_5/eval/mmbench.sh                                      the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/mmbench.sh       playground/data/eval/mmbench
benchmark=mmbench folder=mmbench
source "$(dirname "$0")/common.sh"
