#!/usr/bin/env bash
# ScienceQA: Clean, PA, SA and SA+PA over the 2,017 test questions with a picture, 27,586 orders of their options.
#
#   bash scripts/v1_5/eval/sqa.sh                                          the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/sqa.sh           playground/data/eval/scienceqa
benchmark=sqa folder=scienceqa
source "$(dirname "$0")/common.sh"
