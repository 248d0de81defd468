#!/usr/bin/env bash
# MMBench, Chinese: Clean, PA, SA and SA+PA over all rows of the dev file; rotations of a question are asked once.
#
#   bash scripts/v1_5/eval/mmbench_cn.sh                                   the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/mmbench_cn.sh    playground/data/eval/mmbench_cn
benchmark=mmbench_cn folder=mmbench_cn
source "$(dirname "$0")/common.sh"
