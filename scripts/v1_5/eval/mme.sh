#!/usr/bin/env bash
# MME: perception and cognition, in points, from 2,374 yes-or-no questions.
#
#   bash scripts/v1_5/eval/mme.sh                                          the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/mme.sh           playground/data/eval/MME
benchmark=mme folder=MME
source "$(dirname "$0")/common.sh"
