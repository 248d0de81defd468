#!/usr/bin/env bash
# From the environment, for every evaluation launcher:
#   MODEL=              what is asked: a directory or a hub name; a LLaVA of any kind, or another vision-language model
#   MODEL_BASE=         what a LoRA was trained on (default: what its adapter_config.json names)
#   DATA=               the benchmark's folder (default: LLaVA's, below playground/data/eval)
#   IMAGES=             its pictures, where they are not in that folder
#   OUTPUT=             run folder (default: outputs/eval/<model>/<benchmark>); the same command goes on in it
#   NPROC=8             processes on this machine (default: one a GPU, else one)
#   TORCHRUN_ARGS=...   torchrun's flags for several machines
#   PYTHON=...          this interpreter instead of .venv
# With no MODEL, what finetune*.sh trained last on the small world is asked the small world's questions, else its proxy.
#
# A launcher sets `benchmark` and `folder` and sources this file, which runs it with the launcher's arguments.
# shellcheck disable=SC2154  # benchmark and folder are the launcher's
set -euo pipefail
case " $* " in *" --help "* | *" -h "*)
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  sed -n '2,/^#$/s/^# \{0,1\}/ /p' "${BASH_SOURCE[0]}"
  echo "Flags of 'python -m llava.eval run --help' can follow; the last of a kind counts."
  exit ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/setup.sh
export TOKENIZERS_PARALLELISM=false
world=playground/mini

# Whether path $1 lies in the small world, or is named as finetune*.sh names what it trains on it.
of_small_world() {
  case "$(realpath -m --relative-to=. -- "$1")" in "$world" | "$world"/* | outputs/finetune*) ;; *) false ;; esac
}

# The small world's model that was finished last; nothing if there is none.
newest_model() {
  local marker newest=''
  for marker in outputs/finetune*/COMPLETE; do
    if [ -f "$marker" ] && { [ -z "$newest" ] || [ "$marker" -nt "$newest" ]; }; then newest=$marker; fi
  done
  if [ -n "$newest" ]; then dirname "$newest"; fi
}

# Makes $1 by the command that follows; one that only finds it made says nothing.
made() {
  if [ -e "$1" ]; then "${@:2}" >/dev/null; else "${@:2}" >&2; fi
}

if [ -z "${MODEL:-}" ] && [ -n "${DATA:-}" ] && ! of_small_world "$DATA"; then
  echo "error: DATA=$DATA, but no MODEL; say whose answers are wanted: MODEL=liuhaotian/llava-v1.5-7b" >&2
  exit 2
fi
if of_small_world "${DATA:-${MODEL:-$world}}"; then
  made "$world/build.json" "$PYTHON" -m mini build --out "$world"
  DATA=${DATA:-$world/eval/$folder}
fi
if [ -z "${MODEL:-}" ]; then
  MODEL=$(newest_model) which="what was trained last"
  if [ -z "$MODEL" ]; then
    made "$world/proxy/warmup.json" "$PYTHON" -m mini warmup --data "$world" --out "$world/proxy"
    MODEL=$world/proxy which="no finetune*.sh has finished yet"
  fi
  echo "$benchmark: the small world; MODEL=$MODEL, $which" >&2
fi
: "${DATA:=playground/data/eval/$folder}" "${OUTPUT:=outputs/eval/$(basename "$MODEL")/$benchmark}"
if [ -z "${MODEL_BASE:-}" ] && [ -f "$MODEL/adapter_config.json" ]; then
  MODEL_BASE=$(sed -nE 's/.*"base_model_name_or_path": *"([^"]*)".*/\1/p' "$MODEL/adapter_config.json")
fi

nproc=${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
if [ "$nproc" -gt 1 ] || [ -n "${TORCHRUN_ARGS:-}" ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # shellcheck disable=SC2206  # TORCHRUN_ARGS is a list of flags
  run=("$PYTHON" -m llava.launch ${TORCHRUN_ARGS:---standalone} --nproc_per_node "$nproc" -m llava.eval)
else
  run=("$PYTHON" -m llava.eval)
fi
exec "${run[@]}" run --benchmark "$benchmark" --data "$DATA" ${IMAGES:+--images "$IMAGES"} \
  --model "$MODEL" ${MODEL_BASE:+--model-base "$MODEL_BASE"} --out "$OUTPUT" "$@"
