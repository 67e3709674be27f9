"""Traps that only cost time: processor cores, threads, switches left on or off."""

from __future__ import annotations

import re

from snell_dist.launch.lint.rule import WARNING, Found, rule
from snell_dist.launch.lint.script import Script

LOUD = {"NCCL_DEBUG": "INFO TRACE", "CUDA_LAUNCH_BLOCKING": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
OFF = {
    "NCCL_P2P_DISABLE": "GPUs of a node talk through host memory",
    "NCCL_SHM_DISABLE": "GPUs of a node talk through the network",
    "NCCL_IB_DISABLE": "nodes talk over TCP instead of InfiniBand or RoCE",
}


@rule(
    "no-cpus",
    WARNING,
    about="GPUs without a word on processor cores",
    why="a task gets one core unless the site says otherwise: the readers of data share it, and the GPUs wait",
    mend="--cpus-per-task: the node's cores divided by its tasks",
)
def no_cpus(script: Script) -> Found:
    asked = any(script.asked(name) is not None for name in ("cpus-per-task", "cpus-per-gpu", "exclusive", "mincpus"))
    for launch in script.launches[:1]:
        as_tasks = launch.srun is None and (script.total() or 1) > 1  # cores asked for as --ntasks
        if script.wants_gpus and not asked and not as_tasks and "cpus-per-task" not in (launch.srun or {}):
            line = script.line_of("gpus-per-node", "gres", "gpus", "gpus-per-task")
            yield line, "GPUs are asked for, --cpus-per-task is not"


@rule(
    "srun-cpus",
    WARNING,
    about="srun does not take --cpus-per-task over from sbatch",
    why="since Slurm 22.05 a step asks for itself: where tasks are bound to cores, each may get a single one",
    mend='export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK", or srun --cpus-per-task="$SLURM_CPUS_PER_TASK"',
)
def srun_cpus(script: Script) -> Found:
    if script.asked("cpus-per-task") in (None, "1") or script.says("SRUN_CPUS_PER_TASK"):
        return
    for launch in script.launches:
        told = {"cpus-per-task", "cpus-per-gpu", "cpu-bind", "?"} & set(launch.srun or {})
        if launch.srun is not None and not told:
            yield launch.line, f"srun without the {script.asked('cpus-per-task')} cores of --cpus-per-task"


@rule(
    "omp-threads",
    WARNING,
    about="every task takes as many threads as it sees cores",
    why="torchrun sets OMP_NUM_THREADS=1, srun does not: several processes of a node fight for all of its cores",
    mend='export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK", or fewer, since readers of data need cores, too',
)
def omp_threads(script: Script) -> Found:
    for launch in script.of("python", "snell"):
        tasks = script.tasks(launch.srun) if script.many(launch) else None
        if tasks and tasks > 1 and not script.says("OMP_NUM_THREADS"):
            yield launch.line, f"{tasks} tasks on a node without OMP_NUM_THREADS"


@rule(
    "debug-left-on",
    WARNING,
    about="a debugging switch is on",
    why="the GPU waits after each operation, collectives are checked twice, or every process writes pages of log",
    mend="delete the line; set the variable for the one job that needs it",
)
def debug_left_on(script: Script) -> Found:
    for a in script.variables(*LOUD):
        if a.value.upper() in LOUD[a.name].split():
            yield a.line, f"{a.name}={a.value}"


@rule(
    "nccl-disabled",
    WARNING,
    about="a fast path of NCCL is turned off",
    why="that was somebody's way around a fault of one machine, and costs a multiple of the time elsewhere",
    mend="delete the line, and compare a step's time",
)
def nccl_disabled(script: Script) -> Found:
    for a in script.variables(*OFF):
        if a.value == "1":
            yield a.line, f"{a.name}=1: {OFF[a.name]}"


@rule(
    "interface-name",
    WARNING,
    about="a network interface by its name on one machine",
    why="on a node where it is called otherwise, NCCL and gloo find no interface, or take the slow one",
    mend="leave it out, exclude instead (^lo,docker), or find it on each node: ip route get ADDRESS",
)
def interface_name(script: Script) -> Found:
    for a in script.variables("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        names = a.value.lstrip("=").split(",")
        if not a.value.startswith("^") and all(re.fullmatch(r"[a-z]+\d\w*", name) for name in names):
            yield a.line, f"{a.name}={a.value}"
