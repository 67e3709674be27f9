"""What will hurt, judged from facts of machines that are not here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import snell

from snell_dist.doctor import env
from snell_dist.doctor.env import GIB, Facts, Gpu

WANTS = ["torch>=2.6", "timm>=1.0.20", 'deepspeed>=0.19.8; extra == "deepspeed"', 'pytest>=8; extra == "dev"']
GOOD = Facts(
    packages={"torch": "2.14.1", "timm": "1.0.31", "deepspeed": "0.19.8"},
    wants=WANTS,
    python="3.11.7",
    torch_cuda="12.8",
    torch_gpus=2,
    driver="570.1",
    driver_cuda="12.8",
    gpus=[Gpu("H100", 80 * GIB, 0)] * 2,
    links={"0-1": "NVLink"},
    cores=64,
    affinity=16,
    memory=500 * GIB,
    memory_free=400 * GIB,
    shm=100 * GIB,
    limits={"open files": (65536, None), "locked memory": (None, None), "core file": (0, None)},
    tools={"g++": "/usr/bin/g++", "ninja": "/usr/bin/ninja"},
    host="node1",
    addresses=["10.0.0.5"],
    interfaces={"lo": "127.0.0.1", "eth0": "10.0.0.5", "docker0": "172.17.0.1"},
    folder="/data",
    disk_free=900 * GIB,
    variables={"OMP_NUM_THREADS": "8"},
)


def hurts(**facts: object) -> list[str]:
    return [f"{line.name}: {h.what}: {h.mend}" for line in env.lines(replace(GOOD, **facts)) for h in line.hurts]


def test_a_good_machine_hurts_nowhere() -> None:
    assert hurts() == []
    assert env.text(GOOD).endswith("nothing here will hurt")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"packages": {**GOOD.packages, "torch": "2.5.1"}}, "torch: >=2.6 is wanted: pip install"),
        ({"packages": {"torch": "2.14.1", "deepspeed": "0.19.8"}}, "timm: is needed: pip install 'timm>=1.0.20'"),
        ({"packages": {**GOOD.packages, "deepspeed": "0.19.2"}}, "deepspeed: ZeRO-3 fails on frozen parameters"),
        ({"packages": {**GOOD.packages, "deepspeed": "0.19.5"}}, "deepspeed: is older than what was tested"),
        ({"torch_gpus": 0, "torch_cuda": None}, "GPUs: torch, built without CUDA, can use none of them"),
        ({"gpus": [Gpu("H100", 80 * GIB, 0), Gpu("A100", 40 * GIB, 0)]}, "the slowest sets the pace"),
        ({"gpus": [GOOD.gpus[0], Gpu("H100", 80 * GIB, 30 * GIB)]}, "GPU 1: 30.0 GiB are in use by others"),
        ({"links": {"0-1": "across sockets"}}, "links: sharded engines gather the base over PCIe"),
        ({"cpu_quota": 16.0, "affinity": 64}, "cores: 64 are seen but only 16 granted"),
        ({"variables": {}}, "each of 2 processes takes 1 thread under torchrun and 16 under srun"),
        ({"variables": {"OMP_NUM_THREADS": "16"}}, "2 x 16 threads share 16 cores: export OMP_NUM_THREADS=8"),
        ({"memory_limit": 32 * GIB}, "memory: processes are killed together above 32.0 GiB"),
        ({"memory_free": GIB}, "memory: hardly any is free"),
        ({"shm": GIB // 16}, "/dev/shm: images cross from readers there"),
        ({"limits": {"open files": (1024, 524288)}}, "open files: readers and many processes run out"),
        ({"limits": {"open files": (1024, 2048)}}, "nofile in limits.conf"),
        ({"limits": {"locked memory": (65536, 65536)}, "rdma": ["mlx5_0"]}, "ulimit -l unlimited"),
        ({"limits": {"core file": (None, None)}}, "core file: a crash writes the memory of every process"),
        ({"tools": {"g++": None}}, "g++: torch.compile and DeepSpeed build code"),
        ({"tools": {"ninja": None}}, "ninja: torch.compile and DeepSpeed build code"),
        ({"addresses": ["127.0.1.1"]}, "host name: with several nodes, others would be sent to themselves"),
        ({"addresses": []}, "host name: gloo and torchrun look it up"),
        ({"addresses": ["10.9.9.9"]}, "host name: that is no address of this machine"),
        ({"disk_free": GIB}, "free disk: checkpoints and run folders fill it soon"),
    ],
)
def test_each_thing_that_hurts_is_one_line_with_its_mend(facts: dict, said: str) -> None:
    (line,) = hurts(**facts)
    assert said in line


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "GLOO_SOCKET_IFNAME=ib0: there is no ib0: one of eth0"),
        ({"NCCL_P2P_DISABLE": "1"}, "GPUs talk through host memory"),
        ({"NCCL_DEBUG": "INFO"}, "every process writes pages of log"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "the GPU waits after every operation"),
        ({"MASTER_ADDR": "localhost", "SLURM_NNODES": "4"}, "4 nodes each look for the first one at home"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no launcher is seen"),
    ],
)
def test_variables_that_hurt(variables: dict[str, str], said: str) -> None:
    (line,) = hurts(variables={"OMP_NUM_THREADS": "2", **variables})
    assert said in line


@pytest.mark.parametrize("said", ["eth", "=eth0", "^docker", "eth0,docker0"])
def test_interfaces_are_named_as_nccl_reads_them(said: str) -> None:
    assert hurts(variables={"OMP_NUM_THREADS": "2", "NCCL_SOCKET_IFNAME": said}) == []


def test_several_networks_want_a_choice() -> None:
    found = hurts(interfaces={"eth0": "10.0.0.5", "ib0": "10.1.0.5"})
    assert ["GLOO" in found[0], "NCCL" in found[1], len(found)] == [True, True, 2]


def test_ninja_is_not_missed_without_deepspeed() -> None:
    assert hurts(packages={"torch": "2.14.1", "timm": "1.0.31"}, tools={"ninja": None}) == []


def test_secrets_are_not_shown() -> None:
    found = env.relevant(
        {"SLURM_JWT": "abc123", "NCCL_DEBUG": "WARN", "HOME": "/home/me", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    )
    assert found == {"SLURM_JWT": "(hidden)", "NCCL_DEBUG": "WARN"}


def test_control_groups_of_both_versions(tmp_path: Path) -> None:
    two = tmp_path / "two"
    (two / "job" / "step").mkdir(parents=True)
    (two / "job" / "cpu.max").write_text("250000 100000\n")
    (two / "job" / "step" / "cpu.max").write_text("max 100000\n")
    (two / "job" / "memory.max").write_text(f"{8 * GIB}\n")
    (two / "job" / "step" / "memory.max").write_text("max\n")
    assert env.cgroup(two, "0::/job/step\n") == (2.5, 8 * GIB)
    one = tmp_path / "one"
    for name in ("cpu,cpuacct", "memory"):
        (one / name).mkdir(parents=True)
        for link in name.split(","):
            if link != name:
                (one / link).symlink_to(name)
    (one / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    (one / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (one / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert env.cgroup(one, "4:memory:/docker/1\n1:cpu,cpuacct:/docker/1\n0::/\n") == (4.0, None)
    assert env.cgroup(tmp_path / "none", "") == (None, None)


def test_the_command_tells_of_this_machine() -> None:
    done = snell("doctor", "env", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["packages"]["torch"] and said["cores"] >= said["affinity"] >= 1
    assert {"of", "what", "mend"} == set().union(*(set(h) for h in said["hurts"])) or not said["hurts"]
