#!/usr/bin/env bash
# MME: perception and cognition, in points, from 2,374 yes-or-no questions.
# Environment and flags: bash scripts/v1_5/eval/mme.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" mme "$@"
