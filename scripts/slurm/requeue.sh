#!/usr/bin/env bash
# What a batch script needs to survive its time limit; source it in a job submitted with
#
#   #SBATCH --requeue --open-mode=append --signal=B:USR1@300
#
# Five minutes before the limit Slurm sends USR1 to the batch script alone. `run_or_requeue srun ...` hands it on: the
# ranks finish their step, write a checkpoint and end with 75, and the job goes back into the queue, where the same
# command goes on from that checkpoint. 138 is a program that USR1 ended because it does not listen (selection keeps what
# it has committed). Nothing is requeued without the warning: a job that was cancelled stays cancelled.
warned=''

run_or_requeue() {
  local step status=0
  "$@" &
  step=$!
  trap 'warned=1; kill -USR1 "$step" 2>/dev/null || true' USR1
  wait "$step" || status=$?
  while kill -0 "$step" 2>/dev/null; do # the signal ends `wait`, not the step
    status=0
    wait "$step" || status=$?
  done
  trap - USR1
  if [ -n "$warned" ] && [[ "$status" = 75 || "$status" = 138 ]]; then
    echo "requeue: interrupted before the time limit (exit $status), job $SLURM_JOB_ID goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
  fi
  return "$status"
}
