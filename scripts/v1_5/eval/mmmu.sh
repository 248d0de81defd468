#!/usr/bin/env bash
# MMMU: Clean, PA, SA and SA+PA over the 847 lettered validation questions; --pictures all shows all of a question's.
#
#   bash scripts/v1_5/eval/mmmu.sh                                         the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/mmmu.sh          playground/data/eval/mmmu
benchmark=mmmu folder=mmmu
source "$(dirname "$0")/common.sh"
