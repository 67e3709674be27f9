"""What the shipped scripts would run, word by word, and that they are whole shell programs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(p.relative_to(LAUNCH).as_posix() for p in LAUNCH.rglob("*") if p.suffix in (".sh", ".sbatch"))
TRAIN = [
    "torchrun.sh",
    "slurm/torchrun.sbatch",
    "slurm/tasks.sbatch",
    "slurm/deepspeed.sbatch",
    "slurm/container.sbatch",
]
SLURM = [name for name in TRAIN if name.startswith("slurm/")]
TORCHRUN = ["torchrun.sh", "slurm/torchrun.sbatch", "slurm/container.sbatch"]
HOSTS = str(LAUNCH / "hostfile.example")
AWKWARD = 'backbone.templates=["it\'s a {}", "$HOME `x` \\n"]'


@dataclass(frozen=True)
class Dry:
    """What DRY_RUN=1 printed: the variables, the command that stays, and what it starts again and again."""

    exports: dict[str, str]
    kept: list[str]
    command: list[str]
    text: str

    def option(self, name: str) -> str:
        (word,) = (word for word in self.command if word.startswith(f"--{name}="))
        return word.partition("=")[2]


def start(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Outside Slurm, whatever this machine is a part of."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_", "MASTER_"))}
    clean |= {"PYTHON": "python", "CONTAINER": "image.sif"} | variables
    command = ["bash", str(LAUNCH / script), *words]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60, check=False)


def dry(script: str, *words: str, **variables: str) -> Dry:
    done = start(script, *words, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    exports, commands = {}, []
    for line in done.stdout.splitlines():
        said = shlex.split(line, comments=True)
        if said[:1] == ["export"]:
            name, _, value = said[1].partition("=")
            exports[name] = value
        elif said:
            commands.append(said)
    kept, _, command = (commands[-1], None, commands[-1])
    if "--" in kept:
        cut = kept.index("--")
        kept, command = kept[:cut], kept[cut + 1 :]
    return Dry(exports, kept, command, done.stdout)


def shellcheck() -> str:
    found = shutil.which("shellcheck")
    if found is None:
        assert not os.environ.get("CI"), "CI has to have shellcheck"
        pytest.skip("no shellcheck on this machine (apt install shellcheck)")
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    done = subprocess.run([shellcheck(), str(LAUNCH / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_how_it_is_started(name: str) -> None:
    lines = (LAUNCH / name).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")
    assert f"launch/{name}" in lines[2]
    assert os.access(LAUNCH / name, os.X_OK)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "slurm/interactive.sh"])
def test_without_a_configuration_a_script_says_its_usage(name: str) -> None:
    done = start(name)
    assert done.returncode == 2
    assert re.fullmatch(rf"usage: .*launch/{name} .*\n", done.stderr)


def test_nothing_is_read_from_beside_a_script() -> None:
    """sbatch copies a script to a folder of its own."""
    for name in SCRIPTS:
        text = (LAUNCH / name).read_text()
        assert "BASH_SOURCE" not in text and "dirname" not in text and not re.search(r"^\s*(source|\.) ", text, re.M)


def test_what_scripts_have_in_common_is_the_same_in_all() -> None:
    texts = {name: (LAUNCH / name).read_text() for name in SCRIPTS}
    assert len({re.search(r"^say\(\).*?^}$", text, re.M | re.S).group() for text in texts.values()}) == 1  # type: ignore[union-attr]
    for line in ("HOSTS=", "MASTER_ADDR=", "MASTER_PORT=", "GPUS=", "PROCESSES=", "CPUS=", "THREADS=", "NAME=", "RUN="):
        assert len({re.search(rf"^{line}.*$", texts[name], re.M).group() for name in SLURM}) == 1, line  # type: ignore[union-attr]
    for name in SLURM:
        for option in ("requeue", "signal=B:USR1@180", "output=%x-%j.out", "open-mode=append"):
            assert re.search(rf"^#SBATCH --{option} +#", texts[name], re.M), (name, option)


@pytest.mark.parametrize("name", TRAIN)
def test_each_trains_the_configuration_in_its_run_folder(name: str) -> None:
    said = dry(name, "mine.yml", "optim.lr=1e-3", AWKWARD, SLURM_JOB_ID="77")
    folder = "runs/mine/torchrun" if name == "torchrun.sh" else "runs/mine/77"
    assert said.kept == ["python", "-m", "snell_dist", "keep", folder, "--grace", "120"]
    wanted = ["snell_dist", "train", "mine.yml", "optim.lr=1e-3", AWKWARD, "--folder", folder, "--resume-if-any"]
    assert said.command[-len(wanted) :] == wanted


def test_a_shipped_configuration_keeps_its_whole_name() -> None:
    assert dry("torchrun.sh", "vtab/cifar_lora").kept[4] == "runs/vtab/cifar_lora/torchrun"
    assert dry("torchrun.sh", "my/vtab/cifar.yaml").kept[4] == "runs/cifar/torchrun"


@pytest.mark.parametrize("name", TRAIN)
def test_run_python_and_grace_can_be_said(name: str) -> None:
    said = dry(name, "demo", RUN="here/there", PYTHON="/a b/python", GRACE="600")
    assert said.kept == ["/a b/python", "-m", "snell_dist", "keep", "here/there", "--grace", "600"]
    assert said.command[said.command.index("--folder") + 1] == "here/there"


@pytest.mark.parametrize("name", TORCHRUN)
def test_torchrun_restarts_and_passes_signals_on(name: str) -> None:
    said = dry(name, "demo", GRACE="240")
    assert said.exports["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert said.option("rdzv-backend") == "c10d"
    assert said.option("max-restarts") == "3"
    assert said.option("signals-to-handle") == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    assert said.option("shutdown-timeout") == "240"


def test_torch_knows_every_option_of_torchrun() -> None:
    from torch.distributed.run import get_args_parser

    for name in TORCHRUN:
        command = dry(name, "demo").command
        told = command[command.index("torch.distributed.run") + 1 :]
        parsed = get_args_parser().parse_args(told)
        assert (parsed.module, parsed.training_script, parsed.rdzv_backend) == (True, "snell_dist", "c10d")


@pytest.mark.parametrize("name", SLURM)
def test_ports_are_those_of_the_job_and_below_what_linux_lends(name: str) -> None:
    def port(job: str) -> int:
        return int(
            next(
                re.findall(r"(?:MASTER_PORT=|:|master_port )(\d{5})\b", dry(name, "demo", SLURM_JOB_ID=job).text)[0]
                for _ in "x"
            )
        )

    assert port("0") == 20000
    assert port("51234") == 20000 + 51234 % 12000
    assert port("11999") == 31999


@pytest.mark.parametrize("name", SLURM)
def test_gpus_are_counted_by_a_plain_number(name: str) -> None:
    def processes(**variables: str) -> int:
        said = dry(name, "demo", **variables)
        if name == "slurm/tasks.sbatch":
            return int(said.option("ntasks-per-node"))
        return int(re.search(r"nproc-per-node=(\d+)|slots=(\d+)", said.text).expand(r"\1\2"))  # type: ignore[union-attr]

    assert processes(SLURM_GPUS_PER_NODE="a100:4", SLURM_GPUS_ON_NODE="4") == 4
    assert processes(SLURM_GPUS_ON_NODE="0") == 1
    assert processes(SLURM_GPUS_ON_NODE="4", PROCESSES="2") == 2


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm/torchrun.sbatch"])
def test_without_slurms_count_the_driver_is_asked(name: str, tmp_path: Path) -> None:
    """The driver's tool is an imitation: no machine of ours has three GPUs, or MIG."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = -L ] && printf "GPU 0: H100\\n  MIG 1g.5gb Device 0: x\\nGPU 1: H100\\nGPU 2: H100\\n"\n'
    )
    tool.chmod(0o755)
    found = dry(name, "demo", PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_GPUS_PER_NODE="h100:8")
    assert found.option("nproc-per-node") == "3"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert dry(name, "demo", PATH=f"{tmp_path}:{os.environ['PATH']}").option("nproc-per-node") == "1"


@pytest.mark.parametrize("name", SLURM)
def test_cores_are_divided_among_processes(name: str) -> None:
    four = {"SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NUM_NODES": "2"}
    said = dry(name, "demo", **four)
    assert said.exports["OMP_NUM_THREADS"] == "8"
    tasks = name == "slurm/tasks.sbatch"
    assert said.command[:5] == [
        "srun", "--nodes=2", f"--ntasks={8 if tasks else 2}", f"--ntasks-per-node={4 if tasks else 1}",
        f"--cpus-per-task={8 if tasks else 32}",
    ]  # fmt: skip
    assert said.command[5] == "--kill-on-bad-exit=1"
    assert dry(name, "demo", SLURM_CPUS_PER_TASK="2", SLURM_GPUS_ON_NODE="4").exports["OMP_NUM_THREADS"] == "1"
    assert dry(name, "demo", OMP_NUM_THREADS="3").exports["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("name", SLURM)
def test_the_first_node_is_where_they_meet(name: str, tmp_path: Path) -> None:
    if shutil.which("scontrol") is None:
        assert not os.environ.get("CI"), "CI has to have Slurm"
        pytest.skip("no Slurm on this machine, whose scontrol reads lists of nodes")
    (tmp_path / "slurm.conf").write_text("ClusterName=c\nSlurmctldHost=h\n")  # scontrol wants one, and asks nobody
    said = dry(name, "demo", SLURM_CONF=str(tmp_path / "slurm.conf"), SLURM_JOB_NODELIST="gpu[07-08],cpu1")
    assert re.search(r"MASTER_ADDR=gpu07\n|endpoint=gpu07:|--master_addr gpu07 ", said.text)
    if name == "slurm/deepspeed.sbatch":
        assert "hostfile: gpu07 slots=1, gpu08 slots=1, cpu1 slots=1\n" in said.text


def test_a_list_of_nodes_that_cannot_be_read_ends_the_job(tmp_path: Path) -> None:
    broken = tmp_path / "slurm.conf"
    broken.write_text("Nonsense\n")
    done = start("slurm/torchrun.sbatch", "demo", SLURM_JOB_NODELIST="a,b", SLURM_CONF=str(broken), DRY_RUN="1")
    assert done.returncode != 0
    assert not done.stdout


def test_one_machine_takes_any_free_port() -> None:
    said = dry("torchrun.sh", "demo")
    assert said.option("nnodes") == "1"
    assert said.option("rdzv-endpoint") == "localhost:0"
    assert "/" not in said.option("rdzv-id")  # torchrun makes a folder of this name
    assert dry("torchrun.sh", "demo", PORT="29999").option("rdzv-endpoint") == "localhost:29999"


def test_several_machines_meet_at_the_first_at_the_runs_port() -> None:
    said = dry("torchrun.sh", "demo", NODES="a b")
    again = dry("torchrun.sh", "demo", NODES="a b", NNODES="1:2")
    other = dry("torchrun.sh", "clip/digits", NODES="a b")
    assert said.option("nnodes") == "2"
    assert again.option("nnodes") == "1:2"
    assert said.option("rdzv-endpoint") == again.option("rdzv-endpoint") != other.option("rdzv-endpoint")
    host, port = said.option("rdzv-endpoint").split(":")
    assert host == "a"
    assert 20000 <= int(port) < 32000
    assert said.option("rdzv-conf") == "read_timeout=600,join_timeout=600,last_call_timeout=15"


def test_each_task_gets_torchs_names_for_its_numbers() -> None:
    """What srun would run, run here with srun's variables of one task."""
    command = dry("slurm/tasks.sbatch", "demo", SLURM_JOB_ID="5").command
    inner = command[command.index("bash") : command.index("python")]
    numbers = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
    done = subprocess.run([*inner, "env"], env=os.environ | numbers, capture_output=True, text=True, check=True)
    for line in ("RANK=5", "LOCAL_RANK=1", "WORLD_SIZE=8", "LOCAL_WORLD_SIZE=4"):
        assert line in done.stdout.splitlines()


def test_deepspeed_under_slurm_learns_its_nodes_number_on_the_node() -> None:
    said = dry("slurm/deepspeed.sbatch", "demo", AWKWARD, PYTHON="echo", SLURM_JOB_ID="5")
    inner = said.command[said.command.index("bash") :]
    done = subprocess.run(inner, env=os.environ | {"SLURM_NODEID": "3"}, capture_output=True, text=True, check=True)
    beginning = "-m deepspeed.launcher.runner --no_ssh --node_rank=3 --hostfile runs/demo/5/.hostfile --master_addr "
    assert done.stdout.startswith(beginning)
    assert f"train demo {AWKWARD} --folder" in done.stdout


def test_deepspeed_over_ssh_checks_all_machines_first() -> None:
    said = dry("deepspeed.sh", HOSTS, "demo", SSH_PORT="2222")
    lines = [shlex.split(line, comments=True) for line in said.text.splitlines()]
    assert ["python", "-m", "snell_dist", "launch", "hosts", HOSTS, "--check", "--ssh-port", "2222"] in lines
    assert said.command[:3] == ["python", "-m", "deepspeed.launcher.runner"]
    for option, value in (("--hostfile", HOSTS), ("--ssh_port", "2222"), ("--master_addr", "gpu-node-1")):
        assert said.command[said.command.index(option) + 1] == value
    assert 20000 <= int(said.command[said.command.index("--master_port") + 1]) < 32000
    assert said.exports["DS_ENV_FILE"] == "runs/demo/deepspeed/.deepspeed_env"


def test_deepspeeds_launcher_knows_every_option() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner", reason="DeepSpeed is not installed")
    command = dry("deepspeed.sh", HOSTS, "demo", "optim.lr=1e-3").command
    parsed = runner.parse_args(command[3:])
    assert (parsed.module, parsed.user_script, parsed.no_local_rank) == (True, "snell_dist", True)
    assert parsed.user_args[:3] == ["train", "demo", "optim.lr=1e-3"]
    assert list(runner.fetch_hostfile(HOSTS).values()) == [4, 4]


@pytest.mark.parametrize("word", ["method.targets=[q,v]", "a=it's", 'a="$HOME"', "a=*;rm", "a={b,c}"])
def test_words_survive_the_shell_that_pdsh_hands_them_to(word: str) -> None:
    command = dry("deepspeed.sh", HOSTS, "demo", word).command
    carried = command[command.index("demo") + 1]
    done = subprocess.run(["sh", "-c", f"printf %s {carried}"], capture_output=True, text=True, check=True)
    assert done.stdout == word


@pytest.mark.parametrize("word", ["a=[q, v]", "a=100%"])
def test_words_that_pdsh_would_spoil_are_refused(word: str, tmp_path: Path) -> None:
    done = start("deepspeed.sh", HOSTS, "demo", word, DRY_RUN="1")
    assert done.returncode == 2
    assert "pdsh" in done.stderr
    alone = tmp_path / "hosts"
    alone.write_text("localhost slots=2\n")  # no pdsh, no shell
    assert word in dry("deepspeed.sh", str(alone), "demo", word).command


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no such hostfile"), ("# none\n", "no machine"), ("a\n", "a: expected NAME slots=NUMBER")]
)
def test_a_wrong_hostfile_is_one_line(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    done = start("deepspeed.sh", str(file), "demo")
    assert done.returncode == 2
    assert re.fullmatch(f"deepspeed.sh: {file}: .*{said}\n", done.stderr)


def test_a_container_is_entered_by_what_its_name_says() -> None:
    here = os.getcwd()
    said = dry("slurm/container.sbatch", "demo", CONTAINER="/images/a.sif", MOUNTS="/data:/data").command
    inside = ["apptainer", "exec", "--nv", "--bind", f"{here}:{here},/data:/data", "--pwd", here, "/images/a.sif"]
    assert said[6 : 6 + len(inside) + 2] == [*inside, "python", "-m"]
    said = dry(
        "slurm/container.sbatch", "demo", CONTAINER="nvcr.io#nvidia/pytorch:25.01", PYTHON="/host/python"
    ).command
    outside = ["nvcr.io#nvidia/pytorch:25.01", f"{here}:{here}", here]
    assert [word.partition("=")[2] for word in said if word.startswith("--container-")] == outside
    assert said[9:11] == ["python", "-m"]  # of the image, not the host's
    done = start("slurm/container.sbatch", "demo", CONTAINER="")
    assert done.returncode != 0
    assert "say which image" in done.stderr


def test_a_share_of_a_benchmark_is_the_arrays_business() -> None:
    said = dry("slurm/reproduce.sbatch", "vtab", "--methods", "lora", SLURM_CPUS_PER_TASK="8")
    assert said.command[:3] == ["srun", "--ntasks=1", "--cpus-per-task=8"]
    assert said.command[3:] == ["python", "-m", "snell_dist", "reproduce", "vtab", "--methods", "lora"]
    assert said.exports == {"OMP_NUM_THREADS": "8"}


def test_an_interactive_allocation_tells_scripts_the_processes() -> None:
    said = dry("slurm/interactive.sh", "--partition=gpu", NODES="2", GPUS="4", CPUS="6")
    assert said.exports == {"PROCESSES": "4"}
    assert said.command[0] == "salloc"
    assert said.option("nodes") == "2"
    assert said.option("gpus-per-node") == "4"
    assert said.option("cpus-per-task") == "24"
    assert said.command[-1] == "--partition=gpu"
