#!/usr/bin/env bash
# POPE: does it see objects that are not there? F1 over 8,910 yes-or-no questions, the mean of three categories.
#
#   bash scripts/v1_5/eval/pope.sh                                         the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/pope.sh          playground/data/eval/pope
benchmark=pope folder=pope
source "$(dirname "$0")/common.sh"
