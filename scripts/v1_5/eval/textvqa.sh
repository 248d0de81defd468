#!/usr/bin/env bash
# TextVQA: soft accuracy on the 5,000 validation questions, OCR tokens in the prompt.
#
#   bash scripts/v1_5/eval/textvqa.sh                                      the small world
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/v1_5/eval/textvqa.sh       playground/data/eval/textvqa
benchmark=textvqa folder=textvqa
source "$(dirname "$0")/common.sh"
