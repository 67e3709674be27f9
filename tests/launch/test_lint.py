"""Every rule fires on a good script that was spoiled in one place, and on nothing else; good scripts are silent."""

import subprocess
import time
from pathlib import Path

import pytest

import snell_dist
from snell_dist.launch.lint import RULES, lint, report
from snell_dist.launch.lint.options import evaluate, seconds
from snell_dist.launch.lint.script import Script
from snell_dist.launch.lint.shell import commands

ROOT = Path(snell_dist.__file__).parents[1]

TORCHRUN = """\
#!/usr/bin/env bash
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
run=runs/$SLURM_JOB_ID
command=(
  srun --kill-on-bad-exit=1
  torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" # a process for each GPU: don't count twice
  --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$SLURM_JOB_ID"
  --max-restarts=3 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=300
  train.py --output-dir="$run"
)
exec snell keep "$run" -- "${command[@]}"
"""

TASKS = """\
#!/bin/bash
#SBATCH -N 2 --ntasks-per-node=4
#SBATCH --gres=gpu:4 -c 8
#SBATCH -t 2:00:00 --requeue --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH -o logs/%j.out
set -euo pipefail
export MASTER_ADDR=$(hostname)   # of the batch shell: the first node
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$((SLURM_NNODES * 4)) OMP_NUM_THREADS=4
srun -K --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
  exec python -u train.py --out runs/$SLURM_JOB_ID
'
"""

DEEPSPEED = """\
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=12:00:00 --no-requeue --signal=B:TERM@300
set -euo pipefail
hosts=hostfile-$SLURM_JOB_ID
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots=8/' > "$hosts"
exec deepspeed --hostfile="$hosts" --master_port=$((20000 + SLURM_JOB_ID % 20000)) train.py --deepspeed ds.json
"""

ARRAY = """\
#!/bin/bash
#SBATCH --array=0-31
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=0:30:00
#SBATCH --output=logs/%A_%a.out
source ~/venv/bin/activate
python train.py --seed "$SLURM_ARRAY_TASK_ID" --out "runs/$SLURM_ARRAY_JOB_ID/$SLURM_ARRAY_TASK_ID"
"""

CONTAINER = """\
#!/bin/bash
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=h100:8 --exclusive
#SBATCH --time=0:50:00
set -eo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ARGS="--nnodes $SLURM_NNODES --nproc-per-node 8 \\
      --rdzv-backend c10d --rdzv-endpoint $MASTER_ADDR:29400 --rdzv-id $SLURM_JOB_ID"
srun --kill-on-bad-exit=1 --container-image=/images/torch.sqsh --container-mounts="$PWD:/work" \\
  bash -c "cd /work && torchrun $ARGS train.py 2>&1" | tee "log-$SLURM_JOB_ID"
srun --kill-on-bad-exit=1 apptainer exec --nv torch.sif torchrun $ARGS evaluate.py
"""

TRAP = """\
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gres=gpu:a100:2 --cpus-per-task=16
#SBATCH --time=8:00:00 --requeue --open-mode=append --signal=B:USR1@600
ask() {
  echo "the limit is near: $(date)"
  touch "runs/$SLURM_JOB_ID/stop"
}
trap ask USR1
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
srun --cpus-per-task=16 --kill-on-bad-exit=1 bash -c 'torchrun --nnodes=2 --node-rank=$SLURM_NODEID \\
  --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT --nproc-per-node=2 train.py' &
wait $! || true
wait $!
"""

LAPTOP = """\
#!/usr/bin/env bash
cd "$(dirname "$0")"
torchrun --standalone --nproc-per-node=2 train.py | tee log
"""

GOOD = {
    **{"torchrun": TORCHRUN, "tasks": TASKS, "deepspeed": DEEPSPEED, "array": ARRAY},
    **{"container": CONTAINER, "trap": TRAP, "laptop": LAPTOP},
}

SRUN, HEAD = "srun --kill-on-bad-exit=1", '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
EXEC, TRAINS = 'exec snell keep "$run" -- "${command[@]}"', "exec python -u train.py"
RANKS = "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID"
STATIC = "--rdzv-backend=c10d --rdzv-endpoint"

# rule, the good script, what of it becomes what
SPOILED = [
    ("no-shebang", "torchrun", "#!/usr/bin/env bash\n", ""),
    ("no-shebang", "torchrun", "#!/usr/bin/env bash\n", "\n#!/usr/bin/env bash\n"),
    ("dos-line-endings", "torchrun", "set -euo pipefail\n", "set -euo pipefail\r\n"),
    ("late-directive", "torchrun", 'cd "$S', '#SBATCH --exclusive\ncd "$S'),
    ("unread-directive", "torchrun", "set -eu", "# SBATCH --exclusive\nset -eu"),
    ("unread-directive", "torchrun", "set -eu", "  #SBATCH --mem=0\nset -eu"),
    ("unread-directive", "array", "#SBATCH --array=0-31", "##SBATCH --array=0-31"),
    ("short-with-equals", "torchrun", "--job-name=train", "-J=train"),
    ("variable-in-directive", "torchrun", "--output=%x", "--output=$HOME/%x"),
    ("variable-in-directive", "torchrun", "--output=%x", "--output=~/%x"),
    ("output-without-id", "torchrun", "%x-%j.out", "%x.out"),
    ("output-without-id", "array", "%A_%a.out", "%A.out"),
    ("output-folder-too-late", "tasks", "set -eu", "mkdir -p logs\nset -eu"),
    ("no-append", "torchrun", "#SBATCH --open-mode=append\n", ""),
    ("script-folder", "torchrun", '"$SLURM_SUBMIT_DIR"', '"$(dirname "$0")"'),
    ("script-folder", "torchrun", '"$SLURM_SUBMIT_DIR"', '"$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"'),
    ("hidden-failure", "container", "set -eo pipefail", "set -e"),
    ("lost-status", "array", '/$SLURM_ARRAY_TASK_ID"', '/$SLURM_ARRAY_TASK_ID"\ndate'),
    ("conda-activate", "array", "source ~/venv/bin/activate", "conda activate train"),
    ("master-addr-local", "torchrun", f"MASTER_ADDR={HEAD}", "MASTER_ADDR=localhost"),
    ("master-addr-local", "tasks", "MASTER_ADDR=$(hostname)", "MASTER_ADDR=127.0.0.1"),
    ("master-addr-own-host", "tasks", RANKS, f"{RANKS} MASTER_ADDR=$(hostname)"),
    ("master-addr-own-host", "tasks", RANKS, f"{RANKS} MASTER_ADDR=$SLURMD_NODENAME"),
    ("master-addr-own-host", "tasks", RANKS, f"{RANKS} MASTER_ADDR=`hostname -s`"),
    ("master-addr-launch-node", "torchrun", HEAD, "$SLURM_LAUNCH_NODE_IPADDR"),
    ("master-addr-ip", "torchrun", HEAD, '$(srun -N1 -n1 -w "$head" hostname --ip-address)'),
    ("master-addr-ip", "tasks", "$(hostname)", "$(hostname -I | awk '{print $1}')"),
    ("fixed-port", "torchrun", "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))", "MASTER_PORT=29500"),
    ("fixed-port", "torchrun", "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))", "MASTER_PORT=${MASTER_PORT:-6000}"),
    ("fixed-port", "torchrun", ":$MASTER_PORT", ":29400"),
    ("fixed-port", "deepspeed", "$((20000 + SLURM_JOB_ID % 20000))", "29500"),
    ("random-per-task", "tasks", RANKS, f"{RANKS} MASTER_PORT=$((20000 + RANDOM % 9999))"),
    ("random-per-task", "container", "torchrun $ARGS train.py 2", "torchrun $ARGS --rdzv-id=\\$RANDOM train.py 2"),
    ("standalone", "container", 'ARGS="', 'ARGS="--standalone '),
    ("no-endpoint", "torchrun", '--rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"', '--master-addr="$MASTER_ADDR"'),
    ("no-node-rank", "trap", "--node-rank=$SLURM_NODEID", ""),
    ("early-node-rank", "trap", "=$SLURM_NODEID", "='$SLURM_NODEID'"),
    ("node-rank-ignored", "torchrun", "--rdzv-backend=c10d", "--rdzv-backend=c10d --node-rank=$SLURM_NODEID"),
    ("without-srun", "torchrun", "  srun --kill-on-bad-exit=1\n", ""),
    ("tasks-twice", "torchrun", "--ntasks-per-node=1", "--ntasks-per-node=4"),
    ("tasks-twice", "container", "apptainer exec", "--ntasks-per-node=8 apptainer exec"),
    ("nodes-differ", "torchrun", '--nnodes="$SLURM_NNODES"', "--nnodes=4"),
    ("nodes-differ", "torchrun", '--nnodes="$SLURM_NNODES"', "--nnodes=3:4"),
    ("processes-differ", "torchrun", '--nproc-per-node="$SLURM_GPUS_ON_NODE"', "--nproc-per-node=8"),
    ("processes-differ", "torchrun", '--nproc-per-node="$SLURM_GPUS_ON_NODE"', ""),
    ("world-size-differs", "tasks", "WORLD_SIZE=$((SLURM_NNODES * 4))", "WORLD_SIZE=16"),
    ("world-size-differs", "tasks", "WORLD_SIZE=$((SLURM_NNODES * 4))", "WORLD_SIZE=$SLURM_NNODES"),
    ("tasks-exceed-gpus", "tasks", "gpu:4", "gpu:2"),
    ("typed-gpus", "container", "--nproc-per-node 8", "--nproc-per-node $SLURM_GPUS_PER_NODE"),
    ("perhaps-typed-gpus", "laptop", "cd", "#SBATCH --time=5\nset -o pipefail\nGPUS=$SLURM_GPUS_PER_NODE; cd"),
    ("unset-count", "array", "source", "export OMP_NUM_THREADS=$SLURM_NTASKS_PER_NODE\nsource"),
    ("early-rank", "tasks", "WORLD_SIZE=", "RANK=$SLURM_PROCID WORLD_SIZE="),
    (
        "early-rank",
        "tasks",
        f"bash -c '\n  {RANKS}\n  {TRAINS} --out runs/$SLURM_JOB_ID\n'",
        "env RANK=$SLURM_PROCID python x.py",
    ),
    ("no-rank", "tasks", f"{RANKS}\n", "\n"),
    ("deepspeed-under-srun", "deepspeed", "exec deepspeed", "exec srun -K --cpus-per-task=64 deepspeed"),
    ("deepspeed-no-hostfile", "deepspeed", '--hostfile="$hosts"', ""),
    ("export-drops", "torchrun", "--output=%x-%j.out", "--output=%x-%j.out --export=NONE"),
    ("export-drops", "torchrun", SRUN, f"{SRUN} --export=NCCL_DEBUG=WARN"),
    ("no-requeue", "deepspeed", "--no-requeue", ""),
    ("no-signal", "deepspeed", "--signal=B:TERM@300", ""),
    ("signal-untrapped", "deepspeed", "exec deepspeed", "deepspeed"),
    ("signal-untrapped", "torchrun", EXEC, '"${command[@]}"'),
    ("trap-never-signalled", "tasks", "set -eu", "trap 'touch stop' SIGTERM\nset -eu"),
    ("signal-reaches-nobody", "array", "#SBATCH --gpus=1\n", "#SBATCH --gpus=1 --signal=USR1@90\n"),
    ("trap-in-foreground", "trap", "train.py' &\nwait $! || true\nwait $!", "train.py'"),
    ("background-without-wait", "array", 'TASK_ID"\n', 'TASK_ID" &\n'),
    ("wait-once", "trap", "wait $! || true\n", ""),
    ("signal-kills-agent", "container", "--exclusive", "--exclusive --signal=USR1@300"),
    ("signal-kills-agent", "trap", "touch", "kill -USR1 $!; touch"),
    ("short-grace", "tasks", "TERM@120", "TERM@30"),
    ("shutdown-timeout", "torchrun", "--shutdown-timeout=300", "--shutdown-timeout=900"),
    ("shutdown-timeout", "torchrun", "--shutdown-timeout=300", ""),
    ("restart-store", "torchrun", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", ""),
    ("requeue-unbounded", "trap", "touch", "scontrol requeue $SLURM_JOB_ID; touch"),
    ("run-folder-by-date", "torchrun", "run=runs/$SLURM_JOB_ID", "run=runs/$(date +%F-%T)"),
    ("node-local-checkpoints", "tasks", "--out runs/", "--out /tmp/runs/"),
    ("node-local-checkpoints", "torchrun", "run=runs/", "run=$SLURM_TMPDIR/runs/"),
    ("no-kill-on-bad-exit", "tasks", "srun -K", "srun"),
    ("no-cpus", "array", "#SBATCH --cpus-per-task=8\n", ""),
    ("srun-cpus", "tasks", '--cpus-per-task="$SLURM_CPUS_PER_TASK"', ""),
    ("omp-threads", "tasks", "OMP_NUM_THREADS=4", ""),
    ("debug-left-on", "torchrun", "export TORCH", "export NCCL_DEBUG=INFO TORCH"),
    ("debug-left-on", "torchrun", "export TORCH", "export CUDA_LAUNCH_BLOCKING=1 TORCH"),
    ("nccl-disabled", "torchrun", "export TORCH", "export NCCL_IB_DISABLE=1 TORCH"),
    ("interface-name", "torchrun", "export TORCH", "export NCCL_SOCKET_IFNAME=ib0 TORCH"),
    ("unknown-rule", "torchrun", "set -eu", "# snell: allow no-singal\nset -eu"),
]


def rules(text: str, name: str = "job.sh") -> list[str]:
    return sorted({finding.rule for finding in lint(text, name)})


@pytest.mark.parametrize("name", GOOD)
def test_good_scripts_are_silent(name: str) -> None:
    assert lint(GOOD[name], f"{name}.sh") == []


@pytest.mark.parametrize("name", GOOD)
def test_good_scripts_are_scripts(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=GOOD[name], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("rule", "name", "good", "bad"), SPOILED, ids=[f"{n}-{s[0]}" for n, s in enumerate(SPOILED)])
def test_one_spoiled_place_is_one_finding(rule: str, name: str, good: str, bad: str) -> None:
    assert GOOD[name].count(good) >= 1
    assert rules(GOOD[name].replace(good, bad, 1)) == [rule]


# the good script, and what may well stand in it
HARMLESS = [
    ("torchrun", "set -eu", "##SBATCH --mail-type=END\nset -eu"),
    ("torchrun", "set -eu", "### more to come #SBATCH\nset -eu"),
    ("torchrun", "--output=%x-%j.out", "--output=/dev/null"),
    ("torchrun", "export TORCH", "export NCCL_DEBUG=WARN CUDA_LAUNCH_BLOCKING=0 NCCL_SOCKET_IFNAME=^lo,docker TORCH"),
    ("torchrun", "export TORCH", "# export NCCL_IB_DISABLE=1\nexport TORCH"),
    ("torchrun", "export TORCH", "export NCCL_SOCKET_IFNAME=eth0,en,ib TORCH"),
    ("torchrun", SRUN, f"{SRUN} --export=ALL,NCCL_DEBUG=WARN"),
    ("torchrun", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"),  # it was asked for as a number
    ("container", "--nproc-per-node 8", "--nproc-per-node ${SLURM_GPUS_PER_NODE##*:}"),
    ("torchrun", '--nnodes="$SLURM_NNODES"', "--nnodes=1:2"),
    ("torchrun", '--nnodes="$SLURM_NNODES"', '--nnodes="$NNODES"'),
    ("torchrun", 'cd "$S', "srun --ntasks=1 hostname\npython -c 'print(1)'\ncd \"$S"),
    ("torchrun", 'cd "$S', 'cat > later.sbatch <<EOF\n#!/bin/bash\n#SBATCH --time=5\nEOF\ncd "$S'),
    ("torchrun", 'cd "$S', 'echo "the script is $0 on $(hostname)"\ncd "$S'),
    ("tasks", "WORLD_SIZE=$((SLURM_NNODES * 4))", "WORLD_SIZE=$SLURM_NTASKS"),
    ("tasks", "WORLD_SIZE=$((SLURM_NNODES * 4))", "WORLD_SIZE=8"),
    ("tasks", "srun -K", 'srun "${options[@]}"'),
    ("tasks", f"{RANKS}\n", "\n# the program reads SLURM_PROCID\nexport SLURM_PROCID\n"),
    ("array", "python train.py", "conda run -n env python train.py"),
    ("array", "#SBATCH --gpus=1", "#SBATCH --gpus=1 --open-mode=truncate"),
    ("array", "source ~/venv/bin/activate", "source /opt/conda/etc/profile.d/conda.sh\nconda activate x"),
    ("trap", "wait $! || true\nwait $!", "while kill -0 $!; do wait $!; done"),
    ("trap", "touch", 'echo "${SLURM_RESTART_COUNT:-0} restarts"; scontrol requeue "$SLURM_JOB_ID"; touch'),
    ("trap", "touch", 'if [ $? -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi; touch'),
    (
        "container",
        "set -eo pipefail",
        "set -eo pipefail\nsrun -N1 -n1 torchrun --standalone --nproc-per-node=8 x.py",
    ),
    ("laptop", "torchrun --standalone", "MASTER_ADDR=localhost MASTER_PORT=29500 torchrun"),
]


@pytest.mark.parametrize(("name", "good", "other"), HARMLESS)
def test_what_is_no_trap_is_silent(name: str, good: str, other: str) -> None:
    assert GOOD[name].count(good) >= 1
    assert rules(GOOD[name].replace(good, other, 1)) == []


def test_every_rule_is_shown_to_fire() -> None:
    assert {rule for rule, *_ in SPOILED} == {rule.id for rule in RULES}
    assert len(RULES) >= 24


def test_shipped_scripts_are_clean() -> None:
    scripts = [f for f in (ROOT / "launch").rglob("*") if f.suffix in (".sbatch", ".sh")]
    assert scripts or not (ROOT / "launch").is_dir()
    assert all(Script(f.read_text(), f.name).launches for f in scripts if f.suffix == ".sbatch")  # silent, not blind
    assert {
        str(f.relative_to(ROOT)): rules(f.read_text(), f.name) for f in scripts if rules(f.read_text(), f.name)
    } == {}


def test_a_comment_silences_a_rule() -> None:
    spoiled = GOOD["tasks"].replace("srun -K", "srun").replace("TERM@120", "TERM@30")
    assert rules(spoiled) == ["no-kill-on-bad-exit", "short-grace"]
    assert rules(spoiled + "# snell: allow short-grace, no-kill-on-bad-exit\n") == []


def test_the_report_names_place_reason_and_mend() -> None:
    spoiled = GOOD["torchrun"].replace("%x-%j.out", "%x.out")
    (finding,) = lint(spoiled, "job.sbatch")
    first, why, mend = report([finding], "job.sbatch").splitlines()
    assert first == "job.sbatch:11: warning: output-without-id: --output=%x.out"
    assert why.startswith("    why: two jobs") and mend.startswith("    mend: put %j")
    assert "no trap" in report([], "job.sbatch")


def test_findings_stand_where_the_trap_is() -> None:
    spoiled = GOOD["torchrun"].replace(HEAD, "$(srun -N1 -n1 hostname --ip-address)")
    (finding,) = lint(spoiled, "x.sh")
    assert "MASTER_ADDR=$(srun" in spoiled.splitlines()[(finding.line or 0) - 1]


@pytest.mark.parametrize(
    ("launch", "found"),
    [
        ('srun -K bash -c "torchrun --nnodes=3 --nproc-per-node=4 \\$SCRIPT"', True),
        ("srun -K torchrun --nnodes=3 --nproc-per-node=4 x.py", True),
        ("CMD='torchrun --nnodes=3 --nproc-per-node=4 x.py'\nsrun -K $CMD", True),
        ('N=3\nOPTS="--nnodes=$N"\nexport CMD="torchrun $OPTS x.py"\nsrun -K bash -c "$CMD" | tee log', True),
        ("srun -K bash <<'EOF'\ntorchrun --nnodes=3 --nproc-per-node=4 x.py\nEOF", True),
        ("cat > task.sh <<'EOF'\npython -m torch.distributed.run --nnodes 3 x.py\nEOF\nsrun -K bash task.sh", True),
        ("srun -K singularity exec --nv a.sif bash -c 'cd /w; torchrun --nnodes=3 x.py'", True),
        ('opts=(--nnodes=3)\nopts+=(--nproc-per-node=4)\nsrun -K torchrun "${opts[@]}" x.py', True),
        ("if true; then\n  srun -K torchrun --nnodes=$((1 + 2)) x.py\nfi", True),
        ("run() { srun -K torchrun --nnodes 3 x.py; }\nrun", True),
        ("case $1 in torchrun) srun -K torchrun --nnodes=3 x.py ;; esac", True),
        ('PY=${PY:-python}\nsrun -K "$PY" -m torch.distributed.run --nnodes=3 x.py', True),
        ("srun -K bash -c 'exec \"$@\"' task torchrun --nnodes=3 x.py", True),
        ('srun -K bash -c \'exec "$0" -m torch.distributed.run "$@"\' python --nnodes=3 x.py', True),
        ("export A B=3\nsrun -K torchrun --nnodes=$B x.py", True),
        ("# srun -K torchrun --nnodes=3 x.py\ntrue", False),
        ("echo 'srun torchrun --nnodes=3 x.py'", False),
        ("cat <<EOF\nsrun torchrun --nnodes=3 x.py\nEOF", False),
        ("srun -K -N 3 torchrun --nnodes=3 x.py", False),
        ("srun -K torchrun --nnodes=${NODES:-3} x.py", False),
        ("srun -K torchrun --nnodes=1:3 x.py", False),
        ("srun -K python x.py --nnodes=3", False),
    ],
)
def test_launchers_are_found_wherever_they_stand(launch: str, found: bool) -> None:
    head = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --time=10\nset -e\n"
    assert ("nodes-differ" in rules(f"{head}{launch}\n")) == found


@pytest.mark.parametrize(
    "directives",
    ["-N2 -n 8", "--nodes 2 --ntasks=8", "-N 2-2 --ntasks-per-node=4", "--ntasks=8 --tasks-per-node 4"],
)
def test_nodes_and_tasks_however_asked_for(directives: str) -> None:
    script = Script(f"#!/bin/bash\n#SBATCH {directives} # a remark\nsrun python x.py\n", "x")
    assert (script.nodes, script.total() or 8) == (2, 8)


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        ("--gpus-per-node=a100:4", 4),
        ("--gres=gpu:4", 4),
        ("--gres=gpu:a100:4,lscratch:50", 4),
        ("--gres=lscratch:50,gpu:a100_3g.20gb:2", 2),
        ("--gres gpu", 1),
        ("--gpus-per-task=1 --ntasks-per-node=4", 4),
        ("-G 8", 4),
        ("--gpus=v100:8", 4),
        ("--gres=lscratch:50", None),
    ],
)
def test_gpus_however_asked_for(asked: str, gpus: int | None) -> None:
    assert Script(f"#!/bin/bash\n#SBATCH --nodes=2 {asked}\n", "x").gpus == gpus


def test_words_of_the_shell() -> None:
    text = "a=1 srun \"b c\" 'd #e' $(f | g) \\\n  h # i\nif j; then k & fi; { l | m; } &\nn <<E >o\np\nE\nq"
    found = commands(text)
    assert [c.words for c in found] == [
        ("a=1", "srun", '"b c"', "'d #e'", "$(f | g)", "h"),
        *[("j",), ("k",), ("l",), ("m",), ("n", ">", "o"), ("q",)],
    ]
    assert [c.background for c in found] == [False, False, True, True, True, False, False]
    assert [c.line for c in found] == [1, 3, 3, 3, 3, 4, 7]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "'",
        '"$(',
        "$((((",
        "#!/bin/bash\n#SBATCH\n#SBATCH -\n#SBATCH --\n",
        "<<",
        "a=(",
        "srun",
        "srun bash -c",
        "python",
        "exec",
        "trap",
        "export",
        "x=$(`",
        "case x in",
        ")",
        "}}",
        "cat <<E\n",
    ],
)
def test_broken_scripts_are_read_all_the_same(text: str) -> None:
    assert report(lint(text, "x.sbatch"), "x.sbatch")


@pytest.mark.parametrize("text", ["$(", "(", "{ ", "bash -c '", "a=$a$a\n"])
def test_no_script_takes_long(text: str) -> None:
    begun = time.monotonic()
    lint(f"#!/bin/bash\na=1\n{text * 20_000}", "x.sbatch")
    assert time.monotonic() - begun < 30


def test_times_of_slurm() -> None:
    said = {"30": 1800, "30:15": 1815, "2:00:00": 7200, "1-12": 129600, "1-00:30": 88200, "1-0:0:5": 86405, "x": None}
    assert {text: seconds(text) for text in said} == said


def test_arithmetic() -> None:
    assert [evaluate(t) for t in ("2*(3+1)", "7/2", "1/0", "x+1", "2**3")] == [8, 3, None, None, None]
