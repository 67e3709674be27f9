#!/usr/bin/env bash
# Trains on the machines of a hostfile by DeepSpeed's launcher, started from one of them: over pdsh and ssh.
#   launch/deepspeed.sh HOSTFILE CONFIG [key=value ...]
# The rank that others meet is on the first machine of HOSTFILE (see hostfile.example). Any engine trains so; without
# ssh between the machines take torchrun.sh, under Slurm slurm/deepspeed.sbatch.
# DRY_RUN=1 prints what it would do. Also read: RUN, PYTHON, PORT, SSH_PORT, PDSH_SSH_ARGS_APPEND, GRACE.
set -euo pipefail
(($# > 1)) || { echo "usage: launch/deepspeed.sh HOSTFILE CONFIG [key=value ...]" >&2; exit 2; }

refuse() {
  echo "deepspeed.sh: $1" >&2
  exit 2
}
PYTHON=${PYTHON:-python} # at the same place on every machine
HOSTFILE=$1
CONFIG=$2
shift
NAME=${CONFIG%.y*ml}
[[ $CONFIG == *.y*ml ]] && NAME=${NAME##*/} # a file is known by its name alone, as in `snell train`
RUN=${RUN:-runs/$NAME/deepspeed}
GRACE=${GRACE:-120} # seconds to finish the step and save
[[ -r $HOSTFILE ]] || refuse "$HOSTFILE: no such hostfile"

mapfile -t LINES < <(grep -Ev '^[[:space:]]*(#|$)' "$HOSTFILE")
((${#LINES[@]} > 0)) || refuse "$HOSTFILE: names no machine"
read -r MASTER_ADDR SLOTS _ <<<"${LINES[0]}"
[[ $SLOTS =~ ^slots=[1-9][0-9]*$ ]] || refuse "$HOSTFILE: $MASTER_ADDR: expected NAME slots=NUMBER"
# Another for each run, below 32768, from where Linux lends ports to any connection.
MASTER_PORT=${PORT:-$((20000 + $(cksum <<<"$RUN" | cut -d' ' -f1) % 12000))}

words=("$@")
if ((${#LINES[@]} > 1)); then
  # pdsh hands the words to a shell on each machine, and reads % itself.
  for i in "${!words[@]}"; do
    [[ ${words[i]} != *[[:space:]%]* ]] || refuse "${words[i]}: pdsh carries no blank and no %; say this in a YAML file"
    words[i]=$(printf %q "${words[i]}")
  done
fi
ssh_port=()
[[ -n ${SSH_PORT:-} ]] && ssh_port=(--ssh_port "$SSH_PORT")

THREADS=$(($(nproc) / ${SLOTS#slots=})) # where the machines are alike

settings=(
  "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}"
  "DS_ENV_FILE=$RUN/.deepspeed_env"
)
export "${settings[@]}"
# ssh carries no environment: what decides how ranks talk goes by that file, which DeepSpeed hands to every machine.
mapfile -t carried < <(compgen -e | grep -E '^(NCCL|GLOO|TORCH|OMP|MKL|DS|HF|SNELL)_')
check=("$PYTHON" -m snell_dist launch hosts "$HOSTFILE")
((${#LINES[@]} == 1)) || check+=(--check "${ssh_port[@]/_/-}") # one machine needs no ssh
command=(
  "$PYTHON" -m deepspeed.launcher.runner
  # Our check is of all machines and has a time limit; theirs is of the first and has none.
  --hostfile "$HOSTFILE" --no_ssh_check "${ssh_port[@]}"
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
  --no_local_rank --module snell_dist train "${words[@]}" --folder "$RUN" --resume-if-any
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
  echo "# in $RUN/.deepspeed_env: ${carried[*]}"
  say "${check[@]}"
  say "${keep[@]}"
  exit
fi
"${check[@]}"
mkdir -p "$RUN"
for name in "${carried[@]}"; do printf '%s=%q\n' "$name" "${!name}"; done >"$DS_ENV_FILE"
exec "${keep[@]}"
