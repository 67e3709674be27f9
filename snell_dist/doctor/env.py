"""What of this machine decides how training goes, and what of it will hurt.

`look` gathers facts; everything else is a pure function of them, so that it holds for machines that are not here.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from snell_dist.engines.zero import BROKEN, EXTRA
from snell_dist.network import addresses, interfaces

GIB = 2**30
LEAST_SHM, LEAST_FILES, LEAST_DISK, LEAST_MEMORY = GIB, 4096, 5 * GIB, 2 * GIB
BUSY = 0.05  # of a GPU's memory, in use before we came
SHOWN = "NCCL_", "GLOO_", "MASTER_", "SLURM_", "TORCH", "CUDA_", "OMP_", "MKL_", "DS_", "RANK", "WORLD_SIZE", "LOCAL_"
OURS = ("TORCH_CPP_LOG_LEVEL",)
SECRET = "TOKEN", "SECRET", "PASSWORD", "JWT", "_KEY"
VIRTUAL = "lo", "docker", "veth", "br-", "virbr", "ifb"  # interfaces that lead to no other machine
LIMITS = {"open files": "RLIMIT_NOFILE", "locked memory": "RLIMIT_MEMLOCK", "core file": "RLIMIT_CORE"}
LEVELS = {0: "one board", 10: "one PCIe switch", 20: "PCIe switches", 30: "host bridge", 40: "one NUMA node"}


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    used: int
    pcie: str | None = None
    mig: bool = False


@dataclass(frozen=True)
class Facts:
    """Sizes in bytes; None: there is no limit, or it is not told here."""

    packages: Mapping[str, str]  # what is installed, of what is wanted
    wants: list[str]  # requirements, as package metadata has them
    python: str = ""
    system: str = ""
    torch_cuda: str | None = None  # that torch was built for
    torch_gpus: int = 0  # that torch can use
    nccl: str | None = None
    driver: str | None = None
    driver_cuda: str | None = None  # the newest that the driver can do
    gpus: list[Gpu] = field(default_factory=list)
    links: Mapping[str, str] = field(default_factory=dict)  # between two GPUs
    rdma: list[str] = field(default_factory=list)
    cores: int = 1
    affinity: int = 1
    cpu_quota: float | None = None
    memory: int = 0
    memory_free: int | None = None
    memory_limit: int | None = None
    shm: int | None = None
    limits: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)  # soft, hard
    tools: Mapping[str, str | None] = field(default_factory=dict)
    host: str = ""
    addresses: list[str] = field(default_factory=list)  # of the host's name
    interfaces: Mapping[str, str | None] = field(default_factory=dict)
    folder: str = ""
    disk_free: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)
    clock: str = ""

    @property
    def usable(self) -> int:
        """Cores, as the tightest of three sees them."""
        return max(1, min(self.affinity, int(self.cpu_quota or self.affinity)))

    @property
    def processes(self) -> int:
        """How many are likely to train here at once."""
        said = [self.variables.get(name, "") for name in ("SLURM_NTASKS", "WORLD_SIZE")]
        return max([1, len(self.gpus), *(int(word) for word in said if word.isdigit())])


@dataclass(frozen=True)
class Hurt:
    what: str
    mend: str


@dataclass(frozen=True)
class Line:
    name: str
    value: str
    hurts: list[Hurt]


def lines(facts: Facts) -> list[Line]:
    return [line for judge in JUDGES for line in judge(facts)]


def text(facts: Facts) -> str:
    found = lines(facts)
    width = max(len(line.name) for line in found)
    said = []
    for line in found:
        said.append(f"{line.name:{width}}  {line.value}")
        said += [f"{'':{width}}  ! {hurt.what}: {hurt.mend}" for hurt in line.hurts]
    count = sum(len(line.hurts) for line in found)
    return "\n".join([*said, "", f"{count} of these will hurt (!)" if count else "nothing here will hurt"])


def as_json(facts: Facts) -> str:
    hurts = [{"of": line.name, **asdict(hurt)} for line in lines(facts) for hurt in line.hurts]
    return json.dumps(asdict(facts) | {"hurts": hurts}, indent=2)


# What is judged, in the order in which it is said.


def versions(facts: Facts) -> list[Line]:
    found = [Line("python", f"{facts.python}, {facts.system}", [])]
    for name, wanted in _wanted(facts.wants).items():
        there = facts.packages.get(name)
        if there is None and wanted.marker is None:
            found.append(Line(name, "missing", [Hurt("is needed", f"pip install '{_plain(wanted)}'")]))
        elif there is not None:
            old = Version(there) not in wanted.specifier
            hurts = [Hurt(f"{wanted.specifier} is wanted", f"pip install --upgrade '{_plain(wanted)}'")] if old else []
            found.append(Line(name, there, _deepspeed(there) if name == "deepspeed" and old else hurts))
    if "deepspeed" not in facts.packages:
        found.append(Line("deepspeed", "not installed (only engine.name=zero needs it)", []))
    return found


def _deepspeed(there: str) -> list[Hurt]:
    if Version(there) <= Version(BROKEN):
        return [Hurt("ZeRO-3 fails on frozen parameters in recomputed blocks", f"pip install --upgrade '{EXTRA}'")]
    return [Hurt("is older than what was tested", f"pip install --upgrade '{EXTRA}'")]


def _wanted(wants: Iterable[str]) -> dict[str, Requirement]:
    """Of this package, and of those extras that change how it runs."""
    every = [Requirement(want) for want in wants]
    return {each.name: each for each in every if each.marker is None or each.name in ("deepspeed", "bitsandbytes")}


def _plain(wanted: Requirement) -> str:
    return f"{wanted.name}{wanted.specifier}"


def gpus(facts: Facts) -> list[Line]:
    if not facts.gpus:
        return [Line("GPUs", "none that NVIDIA's driver tells of", [])]
    hurts = []
    if facts.torch_gpus == 0:
        built = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
        mend = f"install a torch for CUDA {facts.driver_cuda} or older, or look at CUDA_VISIBLE_DEVICES"
        hurts.append(Hurt(f"torch, {built}, can use none of them", mend))
    if len({(gpu.name, gpu.memory) for gpu in facts.gpus}) > 1:
        hurts.append(Hurt("they differ, and the slowest sets the pace", "choose equal ones by CUDA_VISIBLE_DEVICES"))
    found = [
        Line("driver", f"{facts.driver}, for CUDA up to {facts.driver_cuda}", []),
        Line("torch's CUDA", f"{facts.torch_cuda}, NCCL {facts.nccl}", []),
        Line("GPUs", f"{len(facts.gpus)}, of which torch can use {facts.torch_gpus}", hurts),
    ]
    for i, gpu in enumerate(facts.gpus):
        busy = gpu.used > BUSY * gpu.memory
        taken = [Hurt(f"{_size(gpu.used)} are in use by others", "see nvidia-smi; choose another, or wait")]
        about = [gpu.name, _size(gpu.memory), *([gpu.pcie] if gpu.pcie else []), *(["MIG"] if gpu.mig else [])]
        found.append(Line(f"GPU {i}", ", ".join(about), taken if busy else []))
    slow = [pair for pair, link in facts.links.items() if link != "NVLink"]
    mend = "prefer engine.name=ddp, or fsdp with engine.frozen=replicate, where the model fits"
    sharded = [Hurt("sharded engines gather the base over PCIe between some", mend)] if slow else []
    if facts.links:
        by_kind: dict[str, list[str]] = {}
        for pair, link in facts.links.items():
            by_kind.setdefault(link, []).append(pair)
        value = "; ".join(f"{link}: {' '.join(pairs)}" for link, pairs in by_kind.items())
        found.append(Line("links", value, sharded))
    return found


def cores(facts: Facts) -> list[Line]:
    quota, hurts = facts.cpu_quota, []
    if quota is not None and quota < facts.affinity:
        share = max(1, facts.usable // facts.processes)
        what = f"{facts.affinity} are seen but only {quota:g} granted, so readers and threads are too many"
        hurts.append(Hurt(what, f"data.workers={max(1, share - 1)}, OMP_NUM_THREADS={share}"))
    limit = "no limit by cgroup" if quota is None else f"cgroup limit {quota:g}"
    return [Line("cores", f"{facts.cores}, of which this process may use {facts.affinity}; {limit}", hurts)]


def threads(facts: Facts) -> list[Line]:
    said, several = facts.variables.get("OMP_NUM_THREADS"), facts.processes > 1
    hurts, share = [], max(1, facts.usable // facts.processes)
    if said is None and several:
        what = f"each of {facts.processes} processes takes 1 thread under torchrun and {facts.usable} under srun"
        hurts.append(Hurt(what, f"export OMP_NUM_THREADS={share}"))
    elif said is not None and said.isdigit() and int(said) * facts.processes > facts.usable:
        what = f"{facts.processes} x {said} threads share {facts.usable} cores"
        hurts.append(Hurt(what, f"export OMP_NUM_THREADS={share}"))
    return [Line("OMP_NUM_THREADS", said or "not set", hurts)]


def memory(facts: Facts) -> list[Line]:
    hurts, limit = [], facts.memory_limit
    if limit is not None and limit < 0.9 * facts.memory:
        hurts.append(Hurt(f"processes are killed together above {_size(limit)}", "ask for more, or fewer data.workers"))
    if facts.memory_free is not None and facts.memory_free < LEAST_MEMORY:
        hurts.append(Hurt("hardly any is free", "end other programs"))
    free = "" if facts.memory_free is None else f", {_size(facts.memory_free)} free"
    value = f"{_size(facts.memory)}{free}, {'no limit' if limit is None else f'limit {_size(limit)}'} by cgroup"
    return [Line("memory", value, hurts)]


def shared_memory(facts: Facts) -> list[Line]:
    if facts.shm is None:
        return [Line("/dev/shm", "none", [])]
    what = "images cross from readers there, and too little is a bus error"
    short = [Hurt(what, "docker run --shm-size=8g (or --ipc=host), or data.workers=0")]
    return [Line("/dev/shm", _size(facts.shm), short if facts.shm < LEAST_SHM else [])]


def limits(facts: Facts) -> list[Line]:
    found = []
    for name, (soft, hard) in facts.limits.items():
        hurts = []
        if name == "open files" and soft is not None and soft < LEAST_FILES:
            enough = hard is None or hard >= LEAST_FILES
            mend = f"ulimit -n {'65536' if hard is None else min(hard, 65536)}" if enough else "nofile in limits.conf"
            hurts.append(Hurt("readers and many processes run out of them", mend))
        if name == "locked memory" and soft is not None and facts.rdma:
            hurts.append(Hurt("NCCL over RDMA cannot register its buffers", "ulimit -l unlimited"))
        if name == "core file" and soft != 0:
            hurts.append(Hurt("a crash writes the memory of every process to the disk", "ulimit -c 0"))
        plain = str if name == "open files" else _size
        said = ["unlimited" if value is None else plain(value) for value in (soft, hard)]
        found.append(Line(name, f"{said[0]} (at most {said[1]})", hurts))
    return found


def tools(facts: Facts) -> list[Line]:
    why = "torch.compile and DeepSpeed build code at their first use"
    mends = {
        "g++": "apt-get install g++",
        "ninja": "pip install ninja",
    }
    needed = {"g++": True, "ninja": "deepspeed" in facts.packages}
    return [
        Line(name, path or "missing", [Hurt(why, mends[name])] if path is None and needed[name] else [])
        for name, path in facts.tools.items()
    ]


def network(facts: Facts) -> list[Line]:
    real = [name for name, address in facts.interfaces.items() if address and not name.startswith(VIRTUAL)]
    mine = [name for name, address in facts.interfaces.items() if address in facts.addresses]
    set_it = f"export GLOO_SOCKET_IFNAME={real[0]} NCCL_SOCKET_IFNAME={real[0]}" if real else "connect it"
    hurts, at = [], ", ".join(facts.addresses) or "nothing"
    if not facts.addresses:
        hurts.append(Hurt("gloo and torchrun look it up to find this machine", f"name it in /etc/hosts, or {set_it}"))
    elif all(_loops(address) for address in facts.addresses):
        what = "with several nodes, others would be sent to themselves"
        hurts.append(Hurt(what, f"{set_it}, and MASTER_ADDR by address; or mend /etc/hosts"))
    elif facts.interfaces and not mine:
        hurts.append(Hurt("that is no address of this machine", f"mend /etc/hosts or DNS, or {set_it}"))
    through = f" ({', '.join(mine)})" if mine else ""
    shown = ", ".join(f"{name} {address or 'without address'}" for name, address in facts.interfaces.items())
    which = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        said = facts.variables.get(variable)
        missing = [] if said is None else _absent(said, facts.interfaces)
        if missing:
            which.append(Hurt(f"{variable}={said}: there is no {', '.join(missing)}", f"one of {', '.join(real)}"))
        elif said is None and len(real) > 1:
            which.append(Hurt(f"{variable} is not set, and nodes may pick different ones", f"export {variable}=..."))
    found = [Line("host name", f"{facts.host}, which is {at}{through}", hurts), Line("interfaces", shown, which)]
    return [*found, Line("RDMA", ", ".join(facts.rdma), [])] if facts.rdma else found


def _loops(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _absent(said: str, interfaces: Mapping[str, str | None]) -> list[str]:
    """Of a list as NCCL reads it: prefixes, exact after `=`; what is excluded (`^`) may be absent."""
    if said.startswith("^"):
        return []
    names = said.removeprefix("=").split(",")
    return [name for name in names if not any(here.startswith(name) for here in interfaces)]


def disk(facts: Facts) -> list[Line]:
    little = [Hurt("checkpoints and run folders fill it soon", "--out on a larger disk, or a smaller train.keep")]
    return [Line("free disk", f"{_size(facts.disk_free)} in {facts.folder}", little * (facts.disk_free < LEAST_DISK))]


def variables(facts: Facts) -> list[Line]:
    """But for the number of threads, which is judged with the cores."""
    said = sorted(facts.variables.items())
    return [Line(name, value, _of_variable(name, value, facts)) for name, value in said if name != "OMP_NUM_THREADS"]


def _of_variable(name: str, value: str, facts: Facts) -> list[Hurt]:
    nodes = facts.variables.get("SLURM_NNODES", facts.variables.get("SLURM_JOB_NUM_NODES", "1"))
    unset = f"unset {name}, unless you look for an error"
    launched = "TORCHELASTIC_RUN_ID" in facts.variables or "SLURM_PROCID" in facts.variables
    rules = {
        "NCCL_P2P_DISABLE": (value == "1", "GPUs talk through host memory", unset),
        "NCCL_SHM_DISABLE": (value == "1", "processes of one machine talk through the network", unset),
        "NCCL_IB_DISABLE": (value == "1" and bool(facts.rdma), "RDMA is there and not used", unset),
        "NCCL_DEBUG": (value.upper() in ("INFO", "TRACE"), "every process writes pages of log", unset),
        "CUDA_LAUNCH_BLOCKING": (value == "1", "the GPU waits after every operation", unset),
        "TORCH_DISTRIBUTED_DEBUG": (value.upper() == "DETAIL", "every collective is checked by another one", unset),
        "MASTER_ADDR": (
            nodes != "1" and (_loops(value) or value == "localhost"),
            f"{nodes} nodes each look for the first one at home",
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)',
        ),
        "WORLD_SIZE": (
            value != "1" and not launched,
            f"no launcher is seen, and a run would wait for {value} processes",
            "unset RANK WORLD_SIZE, or start with torchrun",
        ),
    }
    hurts, what, mend = rules.get(name, (False, "", ""))
    return [Hurt(what, mend)] if hurts else []


def clock(facts: Facts) -> list[Line]:
    return [Line("clock", facts.clock, [])]


JUDGES = [
    versions, gpus, cores, threads, memory, shared_memory, limits, tools, network, disk, variables, clock,
]  # fmt: skip


def _size(number: int | None) -> str:
    value = float(number or 0)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.0f} GiB" if value >= 100 else f"{value:.1f} GiB"


# Looking.


def look() -> Facts:
    import torch

    wants = metadata.requires("snell_dist") or []
    host, build = socket.gethostname(), torch.version.cuda
    quota, memory_limit = cgroup(Path("/sys/fs/cgroup"), _read(Path("/proc/self/cgroup")))
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])  # as ZeRO has it
    has_affinity = hasattr(os, "sched_getaffinity")
    return Facts(
        packages=_installed(_wanted(wants)),
        wants=wants,
        python=platform.python_version(),
        system=platform.platform(),
        torch_cuda=build,
        torch_gpus=torch.cuda.device_count(),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        rdma=_names(Path("/sys/class/infiniband")),
        cores=os.cpu_count() or 1,
        affinity=len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1,
        cpu_quota=quota,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_free=_available(_read(Path("/proc/meminfo"))),
        memory_limit=memory_limit,
        shm=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        limits={name: _limit(getattr(resource, number)) for name, number in LIMITS.items()},
        tools={name: shutil.which(name, path=path) for name in ("g++", "ninja")},
        host=host,
        addresses=addresses(host),
        interfaces=interfaces(),
        folder=str(Path.cwd()),
        disk_free=shutil.disk_usage(".").free,
        variables=relevant(os.environ),
        clock=_clock(_read(Path("/proc/uptime"))),
        **_driver(),
    )


def relevant(variables: Mapping[str, str]) -> dict[str, str]:
    """What decides how training goes, without secrets and without what the command sets itself."""
    shown = {name: value for name, value in variables.items() if name.startswith(SHOWN) and name not in OURS}
    return {name: "(hidden)" if any(word in name for word in SECRET) else value for name, value in shown.items()}


def cgroup(root: Path, own: str) -> tuple[float | None, int | None]:
    """Cores and bytes that this process's control groups grant, of either version; `own` is /proc/self/cgroup."""
    quotas, memories = [], []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(",") if controllers else [""]:
            folder = root / name / path.strip("/")
            # inside a container the path is often the host's, and the group is mounted as the root
            for place in (folder, *folder.parents):
                if place == root.parent:
                    break
                quotas.append(_quota(place))
                memories += [_read(place / file).strip() for file in ("memory.max", "memory.limit_in_bytes")]
    bound = [int(word) for word in memories if word.isdigit() and int(word) < 2**60]  # version 1 says no limit so
    return min((q for q in quotas if q is not None), default=None), min(bound, default=None)


def _quota(place: Path) -> float | None:
    said = _read(place / "cpu.max").split()
    said = said or [_read(place / f"cpu.cfs_{what}_us").strip() for what in ("quota", "period")]
    return int(said[0]) / int(said[1]) if len(said) == 2 and said[0].isdigit() and said[1].isdigit() else None


def _driver() -> dict[str, Any]:
    """What NVIDIA's driver tells; nothing, and no word of it, where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "driver_cuda": f"{version // 1000}.{version % 1000 // 10}",
            "gpus": [_gpu(handle) for handle in handles],
            "links": {f"{i}-{j}": _link(handles[i], handles[j]) for j in range(len(handles)) for i in range(j)},
        }
    except pynvml.NVMLError:
        return {}


def _gpu(handle: Any) -> Gpu:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    generation = _told(lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle))
    width = _told(lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
    mig = _told(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0])
    pcie = f"PCIe {generation} x{width}" if generation and width else None
    return Gpu(pynvml.nvmlDeviceGetName(handle), memory.total, memory.used, pcie, bool(mig))


def _link(one: Any, other: Any) -> str:
    import pynvml

    status = _told(lambda: pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK))
    if status == pynvml.NVML_P2P_STATUS_OK:
        return "NVLink"
    level = _told(lambda: pynvml.nvmlDeviceGetTopologyCommonAncestor(one, other))
    return LEVELS.get(level, "across sockets") if level is not None else "not told"


def _told(ask: Callable[[], Any]) -> Any:
    import pynvml

    with suppress(pynvml.NVMLError):  # MIG slices and some drivers do not tell all
        return ask()
    return None


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _available(meminfo: str) -> int | None:
    found = [line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _limit(which: int) -> tuple[int | None, int | None]:
    soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))
    return soft, hard


def _clock(uptime: str) -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"{now}, running for {float(uptime.split()[0]) / 3600:.1f} h" if uptime else now
