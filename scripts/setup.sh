#!/usr/bin/env bash
# Prepares the Python environment; every launcher calls it, running it twice costs a second.
#   default        .venv in the clone, made from constraints.txt (about a minute with a good connection)
#   PYTHON=...     use this interpreter and install into its environment only what is missing
#   TORCH=...      another torch, e.g. TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
# Source it with the extras of pyproject.toml that are needed beside the core, `core` for none: it exports PYTHON.
# Launchers source the core; mini/launch.py, which knows what a command needs, has the rest installed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "setup: no Python >= 3.11 on the PATH; install one or set PYTHON=/path/to/python" >&2
  return 2
}

if [ -z "${PYTHON:-}" ]; then
  PYTHON="$root/.venv/bin/python"
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    base=$(find_python)
    echo "setup: making $root/.venv with $("$base" --version)" >&2
    rm -rf "$root/.venv"
    if ! "$base" -m venv "$root/.venv" >&2; then
      echo "setup: '$base -m venv' failed; on Debian or Ubuntu: apt install python3-venv, or set PYTHON=..." >&2
      exit 2
    fi
  fi
else
  PYTHON=$(command -v "$PYTHON" || { echo "setup: PYTHON=$PYTHON is not an interpreter" >&2; exit 2; })
fi
export PYTHON
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')

# The stamp has a line for everything that was installed from these very files.
stamp=$prefix/.robust-selection-setup
made=$(cat "$root/constraints.txt" "$root/pyproject.toml" | sha256sum | cut -c1-16)
missing=()
for extra in core "$@"; do
  grep -qsx "$made $extra" "$stamp" || [[ " ${missing[*]} " = *" $extra "* ]] || missing+=("$extra")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "setup: installing the pinned packages into $prefix: ${missing[*]}" >&2
  # A torch that is there stays, unless it is too old: TORCH may have chosen it in an earlier call.
  constraints=$(mktemp)
  grep -v '^torch==' "$root/constraints.txt" >"$constraints"
  if [ "${missing[0]}" = core ]; then
    # shellcheck disable=SC2086  # TORCH may carry pip options
    "$PYTHON" -m pip install -qq --disable-pip-version-check ${TORCH:-$(grep '^torch==' "$root/constraints.txt")} >&2
  fi
  extras=$(IFS=,; echo "${missing[*]}")
  extras=${extras#core} extras=${extras#,}
  "$PYTHON" -m pip install -qq --disable-pip-version-check -c "$constraints" -e "$root${extras:+[$extras]}" >&2
  rm "$constraints"
  for extra in "${missing[@]}"; do echo "$made $extra"; done >>"$stamp" 2>/dev/null || true
fi
