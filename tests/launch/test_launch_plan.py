"""What a plan decides and refuses, and what the command says of it."""

import json
import socket
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, TINY, snell, typed

from snell_dist.config import ConfigError, UserError, load
from snell_dist.launch import hosts, machine, plan
from snell_dist.launch.machine import Count, Partition
from snell_dist.launch.plan import Plan, Wish
from snell_dist.run_config import Run

SINFO = """debug*|2|2|(null)|infinite
gpu|3|64|gpu:a100:4(S:0-1)|1-00:00:00
gpu|1|96|gpu:h100:8(S:0-3),nvme:1|1-00:00:00
plain|4|32+|gpu:2|30:00
"""
HERE = socket.gethostname()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sinfo's words are those of a cluster with GPUs, which no machine of ours has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "partitions", lambda: machine.read_partitions(SINFO))
    monkeypatch.setattr(machine, "gpus", lambda: 0)


def made(wish: Wish, *overrides: str) -> Plan:
    words = [*TINY, "data.batch_size=64", *overrides]
    return plan.make(load("demo", words, Run), "demo", words, wish)


@pytest.mark.parametrize(
    ("said", "count"),
    [("4", Count(4)), ("0", Count(0)), ("a100:4", Count(4, "a100")), ("1g.5gb:2", Count(2, "1g.5gb"))],
)
def test_a_count_may_name_the_kind(said: str, count: Count) -> None:
    assert machine.count(said) == count
    assert str(count) == said


@pytest.mark.parametrize("said", ["", "4:a100", "a100:", "-1", "4.0", "a100", "two", "4 "])
def test_other_counts_are_wrong(said: str) -> None:
    with pytest.raises(UserError, match="expected N or KIND:N"):
        machine.count(said)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("90", 5400), ("1:30", 90), ("04:00:00", 14400), ("1-12", 129600), ("2-01:30", 178200),
        ("1-00:00:01", 86401),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(said: str, seconds: int) -> None:
    assert machine.seconds(said) == seconds


@pytest.mark.parametrize("said", ["4h", "", "1d", "1:2:3:4", "-5", "infinite"])
def test_other_times_are_wrong(said: str) -> None:
    with pytest.raises(UserError, match=r"--time .*: expected .* such as 90"):
        machine.seconds(said)


def test_partitions_with_unlike_nodes_are_one() -> None:
    debug, gpu, plain = machine.read_partitions(SINFO)
    assert debug == Partition("debug", True, 2, 2, {}, None)
    assert gpu == Partition("gpu", False, 4, 96, {"a100": 4, "h100": 8}, 86400)
    assert (gpu.most_gpus(None), gpu.most_gpus("a100"), gpu.most_gpus("v100")) == (8, 4, 0)
    assert plain == Partition("plain", False, 4, 32, {None: 2}, 1800)


def test_gpus_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "a100:8")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "3")
    assert machine.gpus() == 3
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus() == 0


# How a batch is divided.


def test_a_batch_is_divided_among_processes_and_micro_batches() -> None:
    assert plan.share(64, 4, range(2, 3), [4]) == "64 images = 8 processes x 2 micro-batches x 4 images"
    assert plan.share(64, None, range(1, 3), [1]).count("64 images = ") == 2
    assert plan.share(60, None, range(2, 3), [4, 2]) == "60 images = 6 processes x 1 micro-batch x 10 images"


@pytest.mark.parametrize(
    ("batch", "nodes", "processes", "words"),
    [
        (
            64,
            range(3, 4),
            [4],
            ["3 x 4 = world_size 12", "64 / 12 leaves 4 over", "take 8 or 16 processes", "60 or 72"],
        ),
        (64, range(1, 4), [1], ["3 x 1 = world_size 3", "2 or 4 processes", "63 or 66"]),
        (10, range(1, 2), [16], ["10 / 16 leaves 10 over", "5 or 10 processes", "batch_size 16"]),
        (64, range(2, 3), [4, 2], ["4+2 = world_size 6", "4 or 8 processes"]),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_do(
    batch: int, nodes: range, processes: list[int], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan.share(batch, None, nodes, processes)
    for word in words:
        assert word in str(refused.value)


def test_micro_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="64 images / 8 processes = 8 each, and 8 / 3 leaves 2 over; take 2 or 4"):
        plan.share(64, 3, range(2, 3), [4])


# Grace.


def test_grace_is_at_least_what_saving_took(tmp_path: Path) -> None:
    quick, slow, none = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    for folder, lines in ((quick, [{"save_s": 2.0}]), (slow, [{"loss": 1.0}, {"save_s": 300.2}, {"save_s": 8}])):
        folder.mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + '{"save_s": 9999')  # killed while it wrote
    assert plan.measured_save_s(slow) == 300.2
    assert plan.measured_save_s(none) is None
    assert plan.grace([none])[0] == plan.grace([quick])[0] == plan.GRACE_S
    seconds, why = plan.grace([quick, slow, none])
    assert seconds == 661
    assert "300.2 s" in why and str(slow) in why


def test_an_earlier_runs_saves_reach_the_script(cluster: None) -> None:
    Path("runs/demo/001").mkdir(parents=True)
    Path("runs/demo/001/metrics.jsonl").write_text('{"step": 3, "save_s": 500}\n')
    planned = made(Wish("slurm"))
    assert planned.settings["GRACE"] == "1060"
    assert planned.options["signal"] == "B:USR1@1120"
    with pytest.raises(UserError, match="--time 15:00: is 900 s, and the last 1120 s are for saving"):
        made(Wish("slurm", time="15:00"))


# Slurm.


def test_defaults_are_those_of_the_partition(cluster: None) -> None:
    planned = made(Wish("slurm"))
    assert planned.options["gpus-per-node"] is None  # debug has none
    assert planned.options["cpus-per-task"] == "2"
    planned = made(Wish("slurm", partition="gpu", gpus_per_node="h100:8", nodes="1:2"))
    assert (planned.options["nodes"], planned.options["cpus-per-task"]) == ("1-2", "64")
    assert "128" not in planned.text()


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Wish("slurm", partition="gpux"), "--partition gpux: unknown, did you mean 'gpu'? (sinfo has debug, gpu,"),
        (Wish("slurm", partition="gpu,nope"), "--partition nope: unknown"),
        (Wish("slurm", partition="gpu", gpus_per_node="9"), "partition gpu has at most 8 a node"),
        (Wish("slurm", partition="gpu", gpus_per_node="a100:8"), "partition gpu has at most 4 a node"),
        (Wish("slurm", partition="gpu", gpus_per_node="v100:1"), "partition gpu has a100:4, h100:8"),
        (Wish("slurm", gpus_per_node="1"), "partition debug has no GPU"),
        (Wish("slurm", nodes="4"), "--nodes 4: partition debug has 2"),
        (Wish("slurm", nodes="2:1"), "--nodes 2:1: expected N or LEAST:MOST"),
        (Wish("slurm", cpus_per_gpu=16), "--cpus-per-gpu 16: 1 processes want 16 cores"),
        (Wish("slurm", partition="plain"), "--time 04:00:00 (the default): partition plain allows 30 minutes"),
        (Wish("slurm", partition="plain", time="1:00:00"), "--time 1:00:00: partition plain allows 30 minutes"),
        (Wish("slurm", options={"account": "a b"}), "--account 'a b': expected one word"),
        (Wish("slurm", options={"qos": "a\n#SBATCH --x"}), "expected one word"),
        (Wish("slurm", kind="tasks", container="x.sif"), "--kind tasks: a container is started by torchrun"),
        (Wish("slurm", hostfile=Path("hosts")), "--hostfile hosts: Slurm chooses the nodes"),
        (Wish("slurm", port=80), "--port 80: must be from 1024 to 65535"),
        (Wish("slurm", processes_per_node=0), "--processes-per-node 0: must be at least 1"),
        (Wish("torchrun", time="10"), "--time 10: goes with --via slurm, not torchrun"),
        (Wish("torchrun", options={"account": "me"}), "--account me: goes with --via slurm"),
        (Wish("torchrun", nodes="2"), "--nodes 2: needs the machines' names: --hostfile FILE"),
        (Wish("torchrun", gpus_per_node="2"), "--gpus-per-node 2: this machine has 0 (nvidia-smi -L)"),
        (Wish("deepspeed"), "--via deepspeed: needs --hostfile FILE"),
        (Wish("deepspeed", hostfile=Path("hosts"), gpus_per_node="1"), "with --via deepspeed the hostfile says it"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line(cluster: None, wish: Wish, said: str) -> None:
    with pytest.raises(UserError) as refused:
        made(wish)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


# Hostfiles.


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\n\n  b-1.lan slots=4   # the big one\nA2\tslots=2\n")
    assert hosts.read(file) == [hosts.Host("b-1.lan", 4), hosts.Host("A2", 2)]


def test_every_wrong_line_of_a_hostfile_is_said_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(
        "a slots=1\n-oProxyCommand=x slots=1\nb\nc slots=0\nd slots=two\na slots=2\nlocalhost slots=1\nu@e slots=1\n"
    )
    done = snell("launch", "hosts", file)
    assert done.returncode == 2
    assert not done.stdout
    numbers = [line.removeprefix(f"snell: {file}:").split(":")[0] for line in done.stderr.splitlines()]
    assert numbers == ["2", "3", "4", "5", "6", "8", "7"]
    assert f"{file}:6: a: is in line 1 already" in done.stderr


def test_a_right_hostfile_is_counted(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=3\n")
    assert snell("launch", "hosts", tmp_path / "hosts").stdout == f"{tmp_path}/hosts: 3 processes on 1 machine(s)\n"
    assert snell("launch", "hosts", tmp_path / "none").returncode == 2


def test_a_machine_that_ssh_does_not_reach_is_named(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"{HERE} slots=1\nno-such-host.invalid slots=1\n")
    done = snell("launch", "hosts", tmp_path / "hosts", "--check", "--ssh-port", free_port(), "--timeout", "3")
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert f"hosts: {HERE}: " in first
    assert "hosts: no-such-host.invalid: " in second


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("", 0))
        return int(door.getsockname()[1])


# The command.


def launch(*words: str | Path, **variables: str) -> tuple[int, str, str]:
    done = snell("launch", "demo", *TINY, *words, env=ENVIRONMENT | variables)
    return done.returncode, done.stdout, done.stderr


def test_the_command_prints_the_script_and_says_why(tmp_path: Path) -> None:
    status, script, said = launch("--via", "torchrun", "--run", tmp_path / "run")
    assert status == 0
    assert script.startswith("#!/usr/bin/env bash\n")
    assert [line.split()[0] for line in said.splitlines()] == [
        "script", "run", "hosts", "processes", "batch", "threads", "port", "grace",
    ]  # fmt: skip
    status, printed, _ = launch("--via", "torchrun", "--run", tmp_path / "run", "--to", tmp_path / "a.sh")
    assert status == 0
    assert printed == f"{tmp_path}/a.sh: start it with: bash {tmp_path}/a.sh\n"
    assert (tmp_path / "a.sh").read_text().splitlines()[-1] == script.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_submit_starts_the_script_here(tmp_path: Path) -> None:
    status, printed, _ = launch("--via", "torchrun", "--run", tmp_path / "run", "--submit", DRY_RUN="1")
    assert status == 0
    assert f"snell_dist keep {tmp_path}/run --grace" in printed.splitlines()[-1]


def test_what_is_submitted_here_trains_on_two_processes_and_goes_on_when_it_is_complete(tmp_path: Path) -> None:
    words = ["--via", "torchrun", "--processes-per-node", "2", "--run", tmp_path / "run", "--submit"]
    status, _, said = launch(*words)
    assert status == 0, said
    assert json.loads((tmp_path / "run/run.json").read_text())[0]["world_size"] == 2
    assert (tmp_path / "run/summary.json").exists()
    status, _, said = launch(*words)
    assert status == 0
    assert "complete" in said


def test_a_typing_error_costs_no_time_in_the_queue() -> None:
    status, script, said = launch("--via", "slurm", "optim.lrr=1")
    assert status == 2
    assert not script
    assert "optim.lrr" in said


def test_no_slurm_is_one_line(tmp_path: Path) -> None:
    status, script, said = launch("--via", "slurm", "--submit", PATH=str(tmp_path))
    assert (status, script) == (2, "")
    assert said.startswith("snell: --submit: there is no Slurm on this machine")
    assert len(said.splitlines()) == 1


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as door:
        door.bind(("", 0))
        door.listen()
        port = str(door.getsockname()[1])
        status, _, said = launch("--via", "torchrun", "--port", port, "--submit", DRY_RUN="1")
    assert status == 2
    assert said == f"snell: localhost:{port}: the port is in use; say another with --port\n"


def test_a_machine_without_address_is_named(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"{HERE} slots=1\nno-such-host.invalid slots=1\n")
    words = ["--via", "torchrun", "--hostfile", tmp_path / "hosts", "--submit"]
    status, _, said = launch(*words, DRY_RUN="1")
    assert status == 2
    assert said.startswith("snell: no-such-host.invalid: unreachable: ")
    assert len(said.splitlines()) == 1


def test_a_run_of_another_configuration_is_refused_before_it_starts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert typed("train", "demo", *TINY, "train.steps=1", "--folder", run).returncode == 0
    status, _, said = launch("--via", "torchrun", "--run", run, "train.steps=2")
    assert status == 2
    assert "they differ in train.steps" in said
    assert launch("--via", "torchrun", "--run", run, "train.steps=1")[0] == 0


def test_only_the_launch_verbs_are_verbs() -> None:
    help_of = {word: snell("launch", word, "--help").stdout for word in ("hosts", "lint")}
    assert "HOSTFILE" in help_of["hosts"]
    assert "--rules" in help_of["lint"]
    assert "--via" in snell("launch", "--help").stdout
    assert "launch hosts" not in snell("--help").stdout


def test_a_hostfile_may_ask_for_no_more_gpus_than_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 2)
    (tmp_path / "hosts").write_text(f"{HERE} slots=4\nother slots=4\n")
    with pytest.raises(UserError, match=f"{HERE} slots=4: this machine has 2 GPUs"):
        made(Wish("torchrun", hostfile=tmp_path / "hosts"))


def test_the_port_is_one_for_each_run_and_known_before(cluster: None) -> None:
    Path("two").write_text("a slots=1\nb slots=1\n")
    Path("one").write_text("localhost slots=2\n")
    first, again = (made(Wish("torchrun", hostfile=Path("two"))) for _ in range(2))
    other = made(Wish("torchrun", hostfile=Path("two"), run="other"))
    assert first.listens == again.listens != other.listens
    assert first.listens is not None
    assert first.listens[0] == "a"
    assert 20000 <= first.listens[1] < 32000
    assert first.settings["PORT"] == str(first.listens[1])
    assert made(Wish("deepspeed", hostfile=Path("one"))).listens is not None
    assert made(Wish("torchrun")).listens is None  # any that is free


def test_torchrun_wants_equal_machines(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=4\nb slots=2\n")
    with pytest.raises(UserError, match="slots differ"):
        made(Wish("torchrun", hostfile=tmp_path / "hosts"))
    assert "4 + 2" in made(Wish("deepspeed", hostfile=tmp_path / "hosts"), "data.batch_size=60").text()
