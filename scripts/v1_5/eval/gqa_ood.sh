#!/usr/bin/env bash
# GQA-OOD: accuracy on GQA's testdev_balanced and on its out-of-distribution part: all 2,796, head 1,733, tail 1,063.
# Environment and flags: bash scripts/v1_5/eval/gqa_ood.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" gqa_ood "$@"
