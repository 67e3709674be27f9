"""A plan: which script, filled in how, and why. Made of a checked configuration before anything is queued."""

from __future__ import annotations

import json
import math
import re
import socket
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snell_dist import network, run_folder
from snell_dist.config import ConfigError, Loaded, Problem, UserError, nearest
from snell_dist.launch import hosts, machine
from snell_dist.run_config import Run

GRACE_S = 120  # to save in, where no save was measured
REQUEUE_S = 60  # from the last save to the end of the job
TIME = "04:00:00"
CPUS = 8  # a process
LOWEST_PORT, PORTS = 20000, 12000  # below 32768, from where Linux lends ports to any connection
WORD = re.compile(r"[^\s#'\"\\]+")
NODES = re.compile(r"(?P<least>[1-9]\d*)(?::(?P<most>[1-9]\d*))?")
KINDS = {
    "torchrun": "srun starts one torchrun a node, torchrun one process a GPU",
    "tasks": "srun starts every process, one a GPU",
    "deepspeed": "srun starts one DeepSpeed launcher a node",
}


@dataclass(frozen=True)
class Wish:
    """What the command line said; None: nothing. `options` go to Slurm as they are."""

    via: str
    kind: str | None = None
    nodes: str | None = None
    gpus_per_node: str | None = None
    processes_per_node: int | None = None
    cpus_per_gpu: int | None = None
    time: str | None = None
    partition: str | None = None
    options: dict[str, str | None] = field(default_factory=dict)
    container: str | None = None
    hostfile: Path | None = None
    port: int | None = None
    run: str | None = None


@dataclass(frozen=True)
class Plan:
    """`options` are #SBATCH lines (None: one to leave out), `settings` the script's variables, `words` its arguments.

    `said` explains it, a name and a sentence a line; `listens` is where rank 0 will, if that is known.
    """

    script: str
    words: list[str]
    settings: dict[str, str]
    options: dict[str, str | None]
    run: str
    hosts: list[hosts.Host]
    listens: tuple[str, int] | None
    said: list[tuple[str, str]]

    def text(self) -> str:
        width = max(len(name) for name, _ in self.said)
        return "\n".join(f"{name:{width}}  {sentence}" for name, sentence in self.said)


def make(loaded: Loaded[Run], config: str, overrides: Sequence[str], wish: Wish) -> Plan:
    """UserError (ConfigError for the configuration) where it could not run as wished, with what could."""
    _consistent(wish)
    make_it = _for_slurm if wish.via == "slurm" else _for_hosts
    try:
        return make_it(loaded, [config, *overrides], wish)
    except ConfigError as error:
        raise loaded.locate(error) from None


def share(batch_size: int, micro_batch_size: int | None, nodes: range, processes: Sequence[int]) -> str:
    """How a step's images come to the processes, in words; `processes` of each node, or of one where all are alike.

    ConfigError where they do not divide, for any number of nodes.
    """
    said = []
    for count in nodes:
        world = sum(processes) if len(processes) > 1 else count * processes[0]
        product = "+".join(map(str, processes)) if len(processes) > 1 else f"{count} x {processes[0]}"
        each, rest = divmod(batch_size, world)
        if rest:
            fitting = sorted((n for n in range(1, batch_size + 1) if batch_size % n == 0), key=lambda n: abs(n - world))
            below, above = batch_size - rest, batch_size - rest + world
            message = (
                f"{product} = world_size {world}, and {batch_size} / {world} leaves {rest} over; take"
                f" {' or '.join(map(str, sorted(fitting[:2])))} processes, or batch_size"
                f" {f'{below} or ' if below else ''}{above}"
            )
            raise ConfigError(Problem("data.batch_size", message, batch_size))
        micro = micro_batch_size or each
        pieces, rest = divmod(each, micro)
        if rest:
            fitting = sorted((n for n in range(1, each + 1) if each % n == 0), key=lambda n: abs(n - micro))
            message = (
                f"{batch_size} images / {world} processes = {each} each, and {each} / {micro} leaves {rest} over; take"
                f" {' or '.join(map(str, sorted(fitting[:2])))}"
            )
            raise ConfigError(Problem("data.micro_batch_size", message, micro))
        parts = _many(world, "process"), _many(pieces, "micro-batch"), _many(micro, "image")
        said.append(f"{batch_size} images = {' x '.join(parts)}")
    return "; ".join(said)


def measured_save_s(folder: Path) -> float | None:
    """The slowest save of a run, in seconds; None where none was measured."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(record, dict) and isinstance(record.get("save_s"), (int, float)):
            found.append(float(record["save_s"]))
    return max(found, default=None)


def grace(folders: Sequence[Path]) -> tuple[int, str]:
    """Seconds between being asked to stop and being ended, and why; from what saving took in earlier runs."""
    measured = {folder: took for folder in folders if (took := measured_save_s(folder)) is not None}
    if not measured:
        return GRACE_S, f"{GRACE_S} s to finish the step and save (no earlier run of this configuration says how long)"
    slowest = max(measured, key=lambda folder: measured[folder])
    took = measured[slowest]
    needed = max(GRACE_S, math.ceil(2 * took) + 60)
    return needed, f"{needed} s to finish the step and save; a save took up to {took:.1f} s in {slowest}"


def name_of(config: str) -> str:
    """As the scripts make it: a file's own name, a shipped configuration's whole one."""
    return Path(config).stem if config.endswith((".yaml", ".yml")) else config


def _for_slurm(loaded: Loaded[Run], words: list[str], wish: Wish) -> Plan:
    least, most = _nodes(wish.nodes or "1")
    place, about = _partition(wish.partition)
    count = _slurm_gpus(wish, place)
    if place and most > place.nodes:
        raise UserError(f"--nodes {wish.nodes}: partition {place.name} has {place.nodes} (sinfo)")
    processes = wish.processes_per_node or max(1, count.number)
    cpus, why_cpus = _cpus(wish, processes, place)
    seconds, why = grace(_earlier(loaded, words[0]))
    warning = seconds + REQUEUE_S
    time = wish.time or TIME
    _check_time(time, warning, place, asked=wish.time is not None)
    kind = wish.kind or "torchrun"
    name = name_of(words[0])
    run = wish.run or f"runs/{name}/<job id>"
    options = {
        "job-name": name.replace("/", "-"),
        "nodes": str(most) if least == most else f"{least}-{most}",
        "gpus-per-node": str(count) if count.number else None,
        "cpus-per-task": str(cpus),
        "time": time,
        "signal": f"B:USR1@{warning}",
        **({"partition": wish.partition} if wish.partition else {}),
        **{key: value for key, value in wish.options.items() if value is not None},
    }
    _words(options)
    own = _given(PROCESSES=wish.processes_per_node, PORT=wish.port, RUN=wish.run, CONTAINER=wish.container)
    settings = {"PYTHON": sys.executable, "GRACE": str(seconds), **own}
    script = "container" if wish.container else kind
    data = loaded.config.data
    batch = share(data.batch_size, data.micro_batch_size, range(least, most + 1), [processes])
    port = str(wish.port) if wish.port is not None else f"{LOWEST_PORT} + job id % {PORTS}: each job has its own"
    said = [
        ("script", f"slurm/{script}.sbatch: {KINDS[kind]}{', in ' + wish.container if wish.container else ''}"),
        ("run", f"{run}, also after a requeue"),
        ("hosts", f"{_range(least, most)} of {about}; their names are known when the job starts"),
        ("processes", f"{processes} a node: {_why_processes(wish, count)}"),
        ("batch", batch),
        ("threads", f"{max(1, cpus // processes)} a process: {why_cpus}"),
        ("port", f"{port}, on the first node"),
        ("interface", "on each node that which leads to the first; or set GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"),
        ("time", f"{time}; {warning} s before the end the run saves and requeues itself"),
        ("grace", why),
    ]
    return Plan(f"slurm/{script}.sbatch", words, settings, options, run, [], None, said)


def _for_hosts(loaded: Loaded[Run], words: list[str], wish: Wish) -> Plan:
    machines = hosts.read(wish.hostfile) if wish.hostfile else []
    if wish.via == "deepspeed":
        counts, why_counts = [host.slots for host in machines], f"as {wish.hostfile} says"
    else:
        counts, why_counts = _torchrun_processes(wish, machines)
    _check_local(wish, machines)
    least, most = _elastic(wish, machines)
    name = name_of(words[0])
    run = wish.run or f"runs/{name}/{wish.via}"
    _check_run(Path(run), loaded)
    seconds, why = grace([*_earlier(loaded, words[0]), Path(run)])
    many = len(machines) > 1
    port = wish.port
    if port is None and (many or wish.via == "deepspeed"):
        port = LOWEST_PORT + zlib.crc32(run.encode()) % PORTS
    first = machines[0].name if many else "localhost"
    settings = {"PYTHON": sys.executable, "RUN": run, "GRACE": str(seconds), **_given(PORT=port)}
    if wish.via == "torchrun":
        settings["PROCESSES"] = str(counts[0])
        if many:
            settings["NODES"] = " ".join(host.name for host in machines)
            settings["NNODES"] = str(most) if least == most else f"{least}:{most}"
    data = loaded.config.data
    processes = [counts[0]] if len(set(counts)) == 1 else counts
    batch = share(data.batch_size, data.micro_batch_size, range(least, most + 1), processes)
    each = "the same command on each of them" if wish.via == "torchrun" else "from here, over ssh"
    names = ", ".join(host.name for host in machines)
    started = " + ".join(map(str, processes)) + (" a node" if many and len(processes) == 1 else "")
    said = [
        ("script", f"{wish.via}.sh{': ' + each if many else ''}"),
        ("run", f"{run}{', in a folder that all machines share' if many else ''}"),
        ("hosts", f"{_range(least, most)} of {names} ({wish.hostfile})" if many else "this machine"),
        ("processes", f"{started}: {why_counts}"),
        ("batch", batch),
        ("threads", f"{max(1, machine.cores() // max(counts))} a process: {machine.cores()} cores here"),
        ("port", f"{port} on {first}" if port is not None else "any that is free"),
        ("grace", why),
    ]
    if many:
        interface = network.interface_to(first)
        there = f"{interface} leads from here to {first}" if interface else f"from here no way to {first} is known"
        said.insert(7, ("interface", f"{there}; each machine finds its own"))
    arguments = [str(wish.hostfile), *words] if wish.via == "deepspeed" else words
    listens = (first, port) if port is not None else None
    return Plan(f"{wish.via}.sh", arguments, settings, {}, run, machines, listens, said)


def _consistent(wish: Wish) -> None:
    """Options that would say nothing are mistakes."""
    slurm_only = {
        "--kind": wish.kind, "--time": wish.time, "--partition": wish.partition, "--container": wish.container,
        "--cpus-per-gpu": wish.cpus_per_gpu, **{f"--{key}": value for key, value in wish.options.items()},
    }  # fmt: skip
    for option, value in slurm_only.items():
        if value is not None and wish.via != "slurm":
            raise UserError(f"{option} {value}: goes with --via slurm, not {wish.via}")
    if wish.via == "slurm" and wish.hostfile is not None:
        raise UserError(f"--hostfile {wish.hostfile}: Slurm chooses the nodes; see --nodes and --exclude")
    if wish.via == "deepspeed":
        if wish.hostfile is None:
            raise UserError("--via deepspeed: needs --hostfile FILE, with a line NAME slots=NUMBER a machine")
        for option, said in (
            ("--nodes", wish.nodes),
            ("--gpus-per-node", wish.gpus_per_node),
            ("--processes-per-node", wish.processes_per_node),
        ):
            if said is not None:
                raise UserError(f"{option} {said}: with --via deepspeed the hostfile says it")
    if wish.via == "torchrun" and wish.nodes not in (None, "1") and wish.hostfile is None:
        raise UserError(f"--nodes {wish.nodes}: needs the machines' names: --hostfile FILE, NAME slots=NUMBER a line")
    if wish.container and wish.kind not in (None, "torchrun"):
        raise UserError(f"--kind {wish.kind}: a container is started by torchrun; leave --kind out")
    for option, number in (("--processes-per-node", wish.processes_per_node), ("--cpus-per-gpu", wish.cpus_per_gpu)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: must be at least 1")
    if wish.port is not None and not 1024 <= wish.port <= 65535:
        raise UserError(f"--port {wish.port}: must be from 1024 to 65535")


def _nodes(said: str) -> tuple[int, int]:
    match = NODES.fullmatch(said)
    least, most = (int(match["least"]), int(match["most"] or match["least"])) if match else (1, 0)
    if least > most:
        raise UserError(f"--nodes {said}: expected N or LEAST:MOST, such as 2 or 1:4")
    return least, most


def _elastic(wish: Wish, machines: list[hosts.Host]) -> tuple[int, int]:
    named = max(1, len(machines))
    if wish.nodes is None:
        return named, named
    least, most = _nodes(wish.nodes)
    if most != named:
        raise UserError(f"--nodes {wish.nodes}: {wish.hostfile or 'this machine'} makes {named}")
    return least, most


def _partition(said: str | None) -> tuple[machine.Partition | None, str]:
    """The one that was named, or Slurm's default, and how to call it; None where it cannot be looked up from here."""
    try:
        there = machine.partitions()
    except UserError as error:  # a script can be written anywhere
        return None, f"a partition that cannot be looked up here ({error})"
    if not there:
        return None, "a partition that cannot be looked up here (no Slurm)"
    if said is None:
        place = next((each for each in there if each.default), None)
        return place, f"partition {place.name}, Slurm's default" if place else "no partition: Slurm has no default"
    names = [each.name for each in there]
    for name in said.split(","):  # Slurm takes the first that has room
        if name not in names:
            raise UserError(f"--partition {name}: unknown{nearest(name, names)} (sinfo has {', '.join(names)})")
    return there[names.index(said.split(",")[0])], f"partition {said}"


def _slurm_gpus(wish: Wish, place: machine.Partition | None) -> machine.Count:
    if wish.gpus_per_node is None:
        return machine.Count(1 if place is None or place.gpus else 0)
    count = machine.count(wish.gpus_per_node)
    if place is None or not count.number:
        return count
    most = place.most_gpus(count.kind)
    if not most and count.kind and place.gpus:
        kinds = ", ".join(str(machine.Count(number, kind)) for kind, number in place.gpus.items())
        raise UserError(f"--gpus-per-node {count}: partition {place.name} has {kinds} (sinfo)")
    if count.number > most:
        said = f"at most {most} a node" if most else "no GPU"
        raise UserError(f"--gpus-per-node {count}: partition {place.name} has {said} (sinfo)")
    return count


def _cpus(wish: Wish, processes: int, place: machine.Partition | None) -> tuple[int, str]:
    wanted = (wish.cpus_per_gpu or CPUS) * processes
    if place is None or wanted <= place.cpus:
        return wanted, f"{wanted} cores a node"
    if wish.cpus_per_gpu is not None:
        raise UserError(
            f"--cpus-per-gpu {wish.cpus_per_gpu}: {processes} processes want {wanted} cores, and nodes of partition"
            f" {place.name} have {place.cpus}"
        )
    return place.cpus, f"{place.cpus} cores a node, all that partition {place.name} has"


def _check_time(time: str, warning: int, place: machine.Partition | None, asked: bool) -> None:
    length = machine.seconds(time)
    if length <= warning:
        raise UserError(f"--time {time}: is {length} s, and the last {warning} s are for saving and requeueing")
    if place and place.time_s is not None and length > place.time_s:
        allowed = f"partition {place.name} allows {place.time_s // 60} minutes"
        raise UserError(f"--time {time}{'' if asked else ' (the default)'}: {allowed}")


def _torchrun_processes(wish: Wish, machines: list[hosts.Host]) -> tuple[list[int], str]:
    slots = {host.slots for host in machines}
    if len(slots) > 1:
        raise UserError(f"{wish.hostfile}: torchrun starts equally many processes everywhere, slots differ")
    if machines:
        for option, said in (
            ("--gpus-per-node", wish.gpus_per_node),
            ("--processes-per-node", wish.processes_per_node),
        ):
            if said is not None:
                raise UserError(f"{option} {said}: {wish.hostfile} says it")
        return [slots.pop()] * len(machines), f"as {wish.hostfile} says"
    there = machine.gpus()
    count = machine.Count(there) if wish.gpus_per_node is None else machine.count(wish.gpus_per_node)
    if count.number > there:
        raise UserError(f"--gpus-per-node {count}: this machine has {there} (nvidia-smi -L)")
    return [wish.processes_per_node or max(1, count.number)], _why_processes(wish, count)


def _check_local(wish: Wish, machines: list[hosts.Host]) -> None:
    """What of the hostfile can be checked from here."""
    there = machine.gpus()
    for host in machines:
        if is_here(host.name) and 0 < there < host.slots:
            raise UserError(f"{wish.hostfile}: {host.name} slots={host.slots}: this machine has {there} GPUs")


def is_here(host: str) -> bool:
    """Whether a name is this machine's."""
    mine = socket.gethostname()
    return bool(hosts.LOCAL.fullmatch(host)) or host in (mine, mine.partition(".")[0], socket.getfqdn())


def _check_run(run: Path, loaded: Loaded[Run]) -> None:
    if (run / "config.yaml").is_file():
        different = run_folder.differences(run, loaded.config)
        if different:
            raise UserError(
                f"{run}: was made by another configuration (they differ in {', '.join(different)}); say --run FOLDER"
            )


def _earlier(loaded: Loaded[Run], config: str) -> list[Path]:
    names = sorted({loaded.name, name_of(config)})
    return [file.parent for name in names for file in sorted(Path("runs", name).glob("*/metrics.jsonl"))]


def _given(**settings: str | int | None) -> dict[str, str]:
    return {name: str(value) for name, value in settings.items() if value is not None}


def _words(options: dict[str, str | None]) -> None:
    for key, value in options.items():
        if value is not None and not WORD.fullmatch(value):
            raise UserError(f"--{key} {value!r}: expected one word without blanks, quotes and #")


def _why_processes(wish: Wish, count: machine.Count) -> str:
    if wish.processes_per_node is not None:
        return f"--processes-per-node; GPUs a node: {count}"
    if count.number:
        return f"one a GPU ({count})"
    return "no GPU was asked for" if wish.gpus_per_node is not None else "there is no GPU"


def _range(least: int, most: int) -> str:
    return _many(most, "node") if least == most else f"{least} to {_many(most, 'node')}"


def _many(number: int, word: str) -> str:
    plural = f"{word}es" if word.endswith(("s", "ch")) else f"{word}s"
    return f"{number} {word if number == 1 else plural}"
