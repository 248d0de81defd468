#!/usr/bin/env bash
# TextVQA: soft accuracy on the 5,000 validation questions, OCR tokens in the prompt.
# Environment and flags: bash scripts/v1_5/eval/textvqa.sh --help
exec bash "$(dirname "$0")/../evaluate.sh" textvqa "$@"
