"""Traps in how the processes find each other: addresses, ports, ranks of nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from snell_dist.launch.lint.rule import ERROR, WARNING, Found, rule
from snell_dist.launch.lint.script import Launch, Script
from snell_dist.launch.lint.shell import EARLIER, shown

FIRST = 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1), in the batch script'
PORTS = r"(MASTER|RDZV|MAIN_PROCESS|RENDEZVOUS)_?PORT|PORT"


def addresses(script: Script) -> Iterator[tuple[int, str, str]]:
    """Line, text and place of everything that tells where to meet, of what runs on several nodes."""
    if script.several:
        for a in script.variables("MASTER_ADDR"):
            yield a.line, a.value, a.place
    for launch in script.launches:
        for option in ("master-addr", "main-process-ip", "rdzv-endpoint"):
            if option in launch.options and (script.spread(launch) or (script.several and launch.srun is None)):
                text = launch.options[option]
                yield script.origin(text, launch.line), text, launch.step.place


def _meets(launch: Launch, script: Script) -> bool:
    """By a store that hands out ranks: not the static rendezvous."""
    conf = launch.options.get("rdzv-conf", "")
    return launch.options.get("rdzv-backend", "static") != "static" or "c10d" in conf or script.has("PET_RDZV_BACKEND")


@rule(
    "master-addr-local",
    ERROR,
    about="several nodes, and each looks for the first one at home",
    why="localhost is another machine on each node: each waits for a meeting that nobody else attends",
    mend=FIRST,
)
def master_addr_local(script: Script) -> Found:
    for line, text, _ in addresses(script):
        if re.match(r"(localhost|127\.\d+\.\d+\.\d+|0\.0\.0\.0|::1)(:|$)", text):
            yield line, f"the address is {text} on {script.nodes} nodes"


@rule(
    "master-addr-own-host",
    ERROR,
    about="each task takes its own host for the first one",
    why="hostname, $HOSTNAME and $SLURMD_NODENAME inside a task name the node of that task, so each node waits alone",
    mend=FIRST,
)
def master_addr_own_host(script: Script) -> Found:
    for line, text, place in addresses(script):
        if place == "task" and re.search(r"\$\((hostname|uname -n)|\$\{?(HOSTNAME|SLURMD_NODENAME)\b", text):
            yield line, f"{shown(text)} is expanded by each task"


@rule(
    "master-addr-launch-node",
    ERROR,
    about="SLURM_LAUNCH_NODE_IPADDR as the first node's address",
    why="it is the host that srun was called on: empty in the batch shell, and the login node under salloc",
    mend=FIRST,
)
def master_addr_launch_node(script: Script) -> Found:
    for line, text, _ in addresses(script):
        if "SLURM_LAUNCH_NODE_IPADDR" in text:
            yield line, shown(text)


@rule(
    "master-addr-ip",
    WARNING,
    about="the first node's address from hostname -i",
    why="where /etc/hosts says so it is 127.0.1.1, on a node of several networks it is several words or the slow one",
    mend=FIRST + "; a name is enough",
)
def master_addr_ip(script: Script) -> Found:
    for line, text, place in addresses(script):
        command = re.search(r"\bhostname\s+(--ip-address|--all-ip-addresses|-[iI])\b", text)
        if command and not (place == "task" and "$(hostname" in text):
            yield line, f"the address is what `{command[0]}` says"


@rule(
    "fixed-port",
    WARNING,
    about="the port is written into the script",
    why="two jobs on one node meet at one port: the second fails, 'Address already in use', or joins the first",
    mend="MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)), in the batch script",
)
def fixed_port(script: Script) -> Found:
    if not script.batch or script.whole_nodes:
        return
    seen = set()
    for a in script.assignments:
        number = re.fullmatch(r"(?:\$\{\w+:?[-=])?\s*(\d+)\s*\}?", a.value)
        if re.fullmatch(PORTS, a.name, re.IGNORECASE) and number and number[1] != "0":
            seen.add(number[1])
            yield a.line, f"{a.name} is {number[1]} for every job"
    for launch in script.launches:
        for option in ("master-port", "main-process-port", "rdzv-endpoint"):
            number = re.search(r"(?:^|:)(\d+)$", launch.options.get(option, ""))
            if number and number[1] not in {"0", *seen}:
                yield launch.line, f"--{option} is {number[1]} for every job"


@rule(
    "random-per-task",
    ERROR,
    about="each task draws its own port or rendezvous id",
    why="$RANDOM inside a task differs from task to task, so they never meet",
    mend="draw it in the batch script, or take $SLURM_JOB_ID",
)
def random_per_task(script: Script) -> Found:
    for a in script.assignments:
        if a.place == "task" and re.fullmatch(PORTS, a.name, re.IGNORECASE) and re.search(r"(?<!\w)RANDOM", a.value):
            yield a.line, f"{a.name} is drawn by each task"
    for launch in script.launches:
        text = " ".join(launch.options.get(o, "") for o in ("rdzv-id", "rdzv-endpoint", "master-port"))
        if launch.step.place == "task" and re.search(r"\$\{?RANDOM", text) and script.many(launch):
            yield launch.line, "$RANDOM is drawn by each task"


@rule(
    "standalone",
    ERROR,
    about="torchrun --standalone on several nodes",
    why="each node then trains for itself, a whole run each, all writing to one folder",
    mend="--rdzv-backend=c10d --rdzv-endpoint=$MASTER_ADDR:$MASTER_PORT --rdzv-id=$SLURM_JOB_ID --nnodes=$SLURM_NNODES",
)
def standalone(script: Script) -> Found:
    for launch in script.of("torchrun"):
        if "standalone" in launch.options and script.spread(launch):
            yield launch.line, f"--standalone on {script.nodes} nodes"


@rule(
    "no-endpoint",
    ERROR,
    about="a c10d rendezvous without --rdzv-endpoint",
    why="--master-addr and MASTER_ADDR are for the static rendezvous; c10d without an endpoint meets on localhost",
    mend="--rdzv-endpoint=$MASTER_ADDR:$MASTER_PORT",
)
def no_endpoint(script: Script) -> Found:
    for launch in script.of("torchrun"):
        given = {"rdzv-endpoint", "standalone", "?"} & set(launch.options) or script.has("rdzv_endpoint|PET_RDZV")
        if launch.options.get("rdzv-backend") == "c10d" and not given and script.spread(launch):
            yield launch.line, "--rdzv-backend=c10d without --rdzv-endpoint"


@rule(
    "no-node-rank",
    ERROR,
    about="a static rendezvous without the node's rank",
    why="torchrun and accelerate take every node for node 0, and all wait for the others",
    mend="--rdzv-backend=c10d, which hands out ranks; or srun bash -c 'torchrun --node-rank=$SLURM_NODEID ...'",
)
def no_node_rank(script: Script) -> Found:
    for launch in script.launches:
        names = {"torchrun": ("nnodes", "node-rank"), "accelerate": ("num-machines", "machine-rank")}.get(launch.kind)
        if not names or not script.spread(launch) or _meets(launch, script):
            continue
        silent = {names[1], "standalone", "config-file", "?"} & set(launch.options)
        said = script.number(launch.options.get(names[0], "")) or 1
        if said > 1 and not silent and not script.has("PET_NODE_RANK|GROUP_RANK"):
            yield launch.line, f"--{names[0]}={said} without --{names[1]}"


@rule(
    "early-node-rank",
    ERROR,
    about="the node's rank is expanded by the batch shell",
    why="the batch shell runs on the first node, where $SLURM_NODEID and $SLURM_PROCID are 0: every node is node 0",
    mend="let the task expand it, srun bash -c 'torchrun --node-rank=$SLURM_NODEID ...' in single quotes; or use c10d",
)
def early_node_rank(script: Script) -> Found:
    for launch in script.launches:
        rank = launch.options.get("node-rank", launch.options.get("machine-rank", ""))
        if launch.step.early(rank, "SLURM_(NODEID|PROCID)") and script.spread(launch) and not _meets(launch, script):
            yield launch.line, f"the node's rank is {rank.replace(EARLIER, '$')}"


@rule(
    "node-rank-ignored",
    WARNING,
    about="torchrun --node-rank with a rendezvous that ignores it",
    why="c10d hands out ranks in order of arrival: rank 0 may live on another node than MASTER_ADDR",
    mend="delete --node-rank, and assume nowhere that rank 0 is on the first node",
)
def node_rank_ignored(script: Script) -> Found:
    for launch in script.of("torchrun"):
        if "node-rank" in launch.options and launch.options.get("rdzv-backend") in ("c10d", "etcd", "etcd-v2"):
            yield launch.line, f"--node-rank with --rdzv-backend={launch.options['rdzv-backend']}"
