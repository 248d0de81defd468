#!/usr/bin/env bash
# A-OKVQA: Clean, PA, SA and SA+PA over the 1,145 validation questions, 27,480 orders of their options.
#
#   bash scripts/v1_5/eval/aokvqa.sh                                       the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/aokvqa.sh        playground/data/eval/aokvqa
benchmark=aokvqa folder=aokvqa
source "$(dirname "$0")/common.sh"
