#!/usr/bin/env bash
# POPE: does it see objects that are not there? F1 over 8,910 yes-or-no questions, the mean of three categories.
# Environment and flags: bash scripts/v1_5/eval/pope.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" pope "$@"
