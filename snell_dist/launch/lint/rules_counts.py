"""Traps in how many processes there are, where, and which one each takes itself for."""

from __future__ import annotations

import re
from collections.abc import Iterator

from snell_dist.launch.lint.rule import ERROR, WARNING, Found, rule
from snell_dist.launch.lint.script import ELSEWHERE, SPREADS, Launch, Script

PROGRAM = "python", "snell"  # what is no launcher of its own
OWN_GPUS = {"gpus", "gpus-per-node", "gpus-per-task", "gres"}  # of an srun


@rule(
    "without-srun",
    ERROR,
    about="several nodes, and the command runs on the first one only",
    why="a batch script runs on the first node; without srun the others idle, and torchrun waits for them in vain",
    mend="srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun ...",
)
def without_srun(script: Script) -> Found:
    if not script.several or script.of("deepspeed"):
        return
    for launch in script.launches:
        reached = launch.srun is not None or ELSEWHERE.search(launch.step.text)
        if not reached and (launch.elastic or not script.has(SPREADS.pattern)):
            yield launch.line, f"{launch.kind} without srun on {script.nodes} nodes"


@rule(
    "tasks-twice",
    ERROR,
    about="a task for each GPU, and a launcher in each that starts one process for each GPU",
    why="GPUs times GPUs processes start on each node: 'invalid device ordinal', a port in use, or a wait for ranks",
    mend="one task a node under torchrun: --ntasks-per-node=1; or a task a GPU without torchrun",
)
def tasks_twice(script: Script) -> Found:
    for launch in script.launches:
        name = {"torchrun": "nproc-per-node", "accelerate": "num-processes"}.get(launch.kind)
        tasks = script.tasks(launch.srun) if launch.srun is not None else None
        said = launch.options.get(name or "", "")
        if tasks and tasks > 1 and ((script.number(said) or 1) > 1 or re.search(r"^(gpu|auto)$|GPUS", said)):
            yield launch.line, f"{tasks} tasks on each node, each with --{name}={script.number(said) or said}"


@rule(
    "nodes-differ",
    ERROR,
    about="the launcher is told another number of nodes than Slurm",
    why="it waits for nodes that never come, or leaves out some that are paid for",
    mend="--nnodes=$SLURM_NNODES (accelerate: --num_machines $SLURM_NNODES)",
)
def nodes_differ(script: Script) -> Found:
    for launch in script.launches:
        name = {"torchrun": "nnodes", "accelerate": "num-machines", "deepspeed": "num-nodes"}.get(launch.kind)
        nodes = script.number((launch.srun or {}).get("nodes", "")) or script.fixed_nodes
        said = launch.options.get(name or "", "")
        least, _, most = said.partition(":")
        low, high = script.number(least), script.number(most or least)
        if not nodes or not low or not high or "standalone" in launch.options or low <= nodes <= high:
            continue
        if high != script.total(launch.srun) and not ELSEWHERE.search(launch.step.text):  # an agent for each GPU
            yield launch.line, f"--{name}={said} where Slurm gives {nodes}"


@rule(
    "processes-differ",
    ERROR,
    about="the launcher starts another number of processes than there are GPUs",
    why="more: 'invalid device ordinal'; fewer: GPUs idle",
    mend="--nproc-per-node=$SLURM_GPUS_ON_NODE (accelerate: --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)))",
)
def processes_differ(script: Script) -> Found:
    for launch in script.launches:
        tasks = script.tasks(launch.srun)
        if not script.gpus or tasks != 1 or OWN_GPUS & set(launch.srun or {}) or "cpu" in launch.options:
            continue
        said = _each_node(script, launch)
        shared = launch.step.command.background or script.says("CUDA_VISIBLE_DEVICES")  # by several commands
        if said and (said > script.gpus or (said < script.gpus and not shared)):
            yield launch.line, f"{said} processes on a node for {script.gpus} GPUs"


def _each_node(script: Script, launch: Launch) -> int | None:
    options = launch.options
    if launch.kind == "torchrun":
        silent = "?" in options or script.says("PET_NPROC_PER_NODE") or script.says("LOCAL_WORLD_SIZE")
        return script.number(options["nproc-per-node"]) if "nproc-per-node" in options else None if silent else 1
    if launch.kind == "accelerate" and "num-processes" in options:
        total, machines = script.number(options["num-processes"]), script.number(options.get("num-machines", "1"))
        return total // machines if total and machines and total % machines == 0 else None
    if launch.kind == "deepspeed":
        return script.number(options.get("num-gpus", ""))
    return None


@rule(
    "world-size-differs",
    ERROR,
    about="WORLD_SIZE is not the number of tasks",
    why="init_process_group waits for ranks that never come, or refuses a rank beyond the size",
    mend="export WORLD_SIZE=$SLURM_NTASKS",
)
def world_size_differs(script: Script) -> Found:
    totals = {script.total(launch.srun) for launch in script.of(*PROGRAM) if script.many(launch)}
    for a in script.variables("WORLD_SIZE"):
        said = script.number(a.value)
        if totals and said and said not in totals:
            yield a.line, f"WORLD_SIZE is {said}, and srun starts {max(t for t in totals if t)} tasks"


@rule(
    "tasks-exceed-gpus",
    WARNING,
    about="more tasks on a node than GPUs",
    why="two ranks share a GPU: NCCL refuses ('Duplicate GPU detected'), or memory runs out",
    mend="--ntasks-per-node equal to the GPUs of a node",
)
def tasks_exceed_gpus(script: Script) -> Found:
    for launch in script.of(*PROGRAM):
        tasks = script.tasks(launch.srun) if script.many(launch) else None
        if tasks and script.gpus and tasks > script.gpus and not OWN_GPUS & set(launch.srun or {}):
            yield launch.line, f"{tasks} tasks on a node for {script.gpus} GPUs"


@rule(
    "typed-gpus",
    ERROR,
    about="SLURM_GPUS_PER_NODE is used as a number, and is none",
    why="it repeats what was asked for, the type too: 'a100:4' is no number",
    mend="$SLURM_GPUS_ON_NODE, or ${SLURM_GPUS_PER_NODE##*:}",
)
def typed_gpus(script: Script) -> Found:
    asked = script.asked("gpus-per-node")
    if asked and ":" in asked:
        yield from ((line, f"SLURM_GPUS_PER_NODE is {asked}") for line in _gpus_as_number(script))


@rule(
    "perhaps-typed-gpus",
    WARNING,
    about="SLURM_GPUS_PER_NODE is used as a number, and may be none",
    why="it repeats what sbatch was asked for: nothing, or with a type, 'a100:4'",
    mend="$SLURM_GPUS_ON_NODE, or ${SLURM_GPUS_PER_NODE##*:}",
)
def perhaps_typed_gpus(script: Script) -> Found:
    if script.batch and not script.wants_gpus:  # so the command line says it
        yield from ((line, "SLURM_GPUS_PER_NODE") for line in _gpus_as_number(script))


def _gpus_as_number(script: Script) -> Iterator[int]:
    if not script.has(r"\bSLURM_GPUS_PER_NODE="):
        for line, _ in script.find(r"\$\{?SLURM_GPUS_PER_NODE(?![#%/\w])"):
            if not re.match(r"\s*(echo|printf)\b", script.lines[line - 1]):
                yield line


@rule(
    "unset-count",
    ERROR,
    about="a count that Slurm sets only where it was asked for",
    why="SLURM_CPUS_PER_TASK, SLURM_NTASKS_PER_NODE, SLURM_GPUS_PER_NODE are empty unless that option is given",
    mend="give the option, or use $SLURM_GPUS_ON_NODE, $SLURM_CPUS_ON_NODE, or a default: ${SLURM_CPUS_PER_TASK:-1}",
)
def unset_count(script: Script) -> Found:
    if not script.directives:
        return
    for option in ("cpus-per-task", "ntasks-per-node", "gpus-per-node"):
        variable = f"SLURM_{option.replace('-', '_').upper()}"
        asked = script.asked(option) is not None or any(option in (step.srun or {}) for step in script.steps)
        if asked or script.has(rf"\b{variable}=") or (option == "gpus-per-node" and not script.wants_gpus):
            continue
        for line, _ in script.find(rf"\$(?:\{{{variable}(?=[}}#%/])|{variable}\b)"):
            if not re.search(r"^\s*(echo|printf)\b|\s-[nz]\s", script.lines[line - 1]):
                yield line, f"{variable} is empty: --{option} is not given"


@rule(
    "early-rank",
    ERROR,
    about="ranks are expanded by the batch shell",
    why="the batch shell is task 0: $SLURM_PROCID and $SLURM_LOCALID are 0 there, and so is every task's rank",
    mend="let each task set them: srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python ...'",
)
def early_rank(script: Script) -> Found:
    many = [launch for launch in script.of(*PROGRAM) if script.many(launch)]
    for a in script.variables("RANK", "LOCAL_RANK"):
        if many and a.place == "batch" and re.search(r"SLURM_(PROCID|LOCALID)", a.value):
            yield a.line, f"{a.name}={a.value} outside srun"
    for launch in many:
        if launch.step.early(launch.step.text, "SLURM_(PROCID|LOCALID)"):
            yield launch.line, "$SLURM_PROCID or $SLURM_LOCALID among the words of srun"


@rule(
    "no-rank",
    WARNING,
    about="tasks are told the world's size but not their rank",
    why="a program that reads WORLD_SIZE (init_method env://) also reads RANK and LOCAL_RANK, which srun does not set",
    mend="srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python ...'",
)
def no_rank(script: Script) -> Found:
    if "WORLD_SIZE" not in script.exported or script.has(r"\bRANK=|SLURM_PROCID"):
        return
    for launch in script.of(*PROGRAM):
        if script.many(launch):
            yield launch.line, "WORLD_SIZE is exported, RANK is not"


@rule(
    "deepspeed-under-srun",
    ERROR,
    about="the deepspeed launcher in every task",
    why="it reaches the nodes by ssh itself: each task starts the whole job once more",
    mend="call deepspeed without srun, with --hostfile; or srun torchrun: DeepSpeed trains under it",
)
def deepspeed_under_srun(script: Script) -> Found:
    for launch in script.of("deepspeed"):
        if script.many(launch) and "no-ssh" not in launch.options:
            yield launch.line, f"srun starts deepspeed {script.total(launch.srun)} times"


@rule(
    "deepspeed-no-hostfile",
    ERROR,
    about="the deepspeed launcher is not told the nodes",
    why="without a hostfile it sees this machine only; it does not ask Slurm",
    mend="write `NODE slots=GPUS` for each of scontrol show hostnames into a file, and give --hostfile=FILE",
)
def deepspeed_no_hostfile(script: Script) -> Found:
    for launch in script.of("deepspeed"):
        told = {"hostfile", "H", "no-ssh", "?"} & set(launch.options) or script.has("/job/hostfile")
        if script.several and launch.srun is None and not told:
            yield launch.line, f"deepspeed without --hostfile on {script.nodes} nodes"


@rule(
    "export-drops",
    ERROR,
    about="--export without ALL takes the environment from the tasks",
    why="tasks get only the variables that are named: no MASTER_ADDR, no PATH; srun inherits it from #SBATCH",
    mend="--export=ALL, or --export=ALL,NAME=value",
)
def export_drops(script: Script) -> Found:
    def drops(said: str | None) -> bool:
        return bool(said) and "ALL" not in said.upper().split(",")  # type: ignore[union-attr]

    inherited = drops(script.asked("export")) and not script.says("SLURM_EXPORT_ENV")
    for launch in script.launches:
        if launch.srun is not None and "export" in launch.srun:
            if drops(launch.srun["export"]):
                yield launch.line, f"srun --export={launch.srun['export']}"
        elif launch.srun is not None and inherited:
            yield script.line_of("export"), f"#SBATCH --export={script.asked('export')}"
