#!/usr/bin/env bash
# SEED-Bench: Clean, PA, SA and SA+PA over 19,242 questions on pictures and video frames, 24 orders each.
#
#   bash scripts/v1_5/eval/seed.sh                                         the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/seed.sh          playground/data/eval/seed_bench
benchmark=seed folder=seed_bench
source "$(dirname "$0")/common.sh"
