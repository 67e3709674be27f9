#!/usr/bin/env bash
# Trains on one machine, or on several without a scheduler: one process a GPU; what dies is started again.
#   launch/torchrun.sh CONFIG [key=value ...]
# On several: the same command on each, within ten minutes, in folders that are one (NFS or the like):
#   NODES="host1 host2" launch/torchrun.sh CONFIG [key=value ...]
#   NODES="host1 host2" NNODES=1:2 launch/torchrun.sh CONFIG ...     goes on with those that are left
# DRY_RUN=1 prints what it would do. Also read: RUN, PYTHON, PROCESSES (default: GPUs), PORT, GRACE.
set -euo pipefail
(($# > 0)) || { echo "usage: launch/torchrun.sh CONFIG [key=value ...]" >&2; exit 2; }

PYTHON=${PYTHON:-python}
CONFIG=$1
NAME=${CONFIG%.y*ml}
[[ $CONFIG == *.y*ml ]] && NAME=${NAME##*/} # a file is known by its name alone, as in `snell train`
RUN=${RUN:-runs/$NAME/torchrun}
GRACE=${GRACE:-120} # seconds to finish the step and save

read -ra HOSTS <<<"${NODES:-localhost}"
NNODES=${NNODES:-${#HOSTS[@]}}
MASTER_ADDR=${HOSTS[0]}
if [[ $NNODES == 1 ]]; then
  MASTER_PORT=${PORT:-0} # any that is free
else
  # One for all nodes and another for each run, below 32768, from where Linux lends ports to any connection.
  MASTER_PORT=${PORT:-$((20000 + $(cksum <<<"$RUN" | cut -d' ' -f1) % 12000))}
fi

GPUS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
PROCESSES=${PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
THREADS=$(($(nproc) / PROCESSES))

settings=(
  "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}"
  # Else a restart meets peers of the attempt before it in the launcher's store, and hangs.
  "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
)
command=(
  "$PYTHON" -m torch.distributed.run
  --nnodes="$NNODES" --nproc-per-node="$PROCESSES"
  --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="${RUN//\//-}"
  # Seconds to wait for the first node, for the fewest nodes, and then for more.
  "--rdzv-conf=read_timeout=600,join_timeout=600,last_call_timeout=15"
  --max-restarts=3
  # By default SIGUSR1 ends torchrun and leaves its processes alone; and 30 s may be too few to save.
  "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout="$GRACE"
  -m snell_dist train "$@" --folder "$RUN" --resume-if-any
)
# Starts the command again until the run is complete, and gives up after attempts without progress.
keep=("$PYTHON" -m snell_dist keep "$RUN" --grace "$GRACE" -- "${command[@]}")

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
  say "${keep[@]}"
  exit
fi
export "${settings[@]}"
exec "${keep[@]}"
