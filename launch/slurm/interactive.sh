#!/usr/bin/env bash
# Nodes to try things on: a shell in an allocation, in which every script beside this one runs with bash.
#   NODES=2 GPUS=4 launch/slurm/interactive.sh --partition=gpu --account=me      (any option of salloc)
# and in it:
#   bash launch/slurm/torchrun.sbatch CONFIG [key=value ...]                     (or DRY_RUN=1 bash ...)
# Ctrl-C saves and stops; with the same RUN the command goes on. Also read: CPUS (of a GPU), TIME, DRY_RUN.
set -euo pipefail

GPUS=${GPUS:-1}
CPUS=${CPUS:-8}

# The shell may be on the login node, where no GPU can be counted: PROCESSES tells the scripts.
settings=("PROCESSES=$((GPUS > 0 ? GPUS : 1))")
command=(
  salloc --job-name=snell --nodes="${NODES:-1}" --ntasks-per-node=1 --gpus-per-node="$GPUS"
  --cpus-per-task="$((CPUS * (GPUS > 0 ? GPUS : 1)))" --time="${TIME:-01:00:00}" "$@"
)

say() { # the words as a shell reads them
  local word line=
  for word; do
    [[ $word == *[!A-Za-z0-9_./:=,@+-]* ]] && word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}
if [[ ${DRY_RUN:-0} != 0 ]]; then
  for setting in "${settings[@]}"; do say export "$setting"; done
  say "${command[@]}"
  exit
fi
export "${settings[@]}"
exec "${command[@]}"
