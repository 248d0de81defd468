#!/usr/bin/env bash
# Sourced by launchers.

# The last value of flag $1 among the words that follow; nothing if it is not there.
value_of() {
  local flag=$1 value='' previous='' word
  shift
  for word in "$@"; do
    if [ "$previous" = "$flag" ]; then value=$word; fi
    case "$word" in "$flag="*) value=${word#*=} ;; esac
    previous=$word
  done
  echo "$value"
}
