"""Writing a script, and starting it: by sbatch, or here in this process's place."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from snell_dist import network
from snell_dist.config import UserError
from snell_dist.launch import machine
from snell_dist.launch.plan import Plan, is_here

ANSWER_S = 1.0
SUBMIT_S = 60


def write(script: str, file: Path) -> None:
    """UserError where the file is there already, or cannot be written."""
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(script)
        file.chmod(0o755)
    except FileExistsError:
        raise UserError(f"--to {file}: exists and stays as it is; name another file") from None
    except OSError as error:
        raise UserError(f"--to {file}: cannot be written: {error.strerror}") from None


def how(plan: Plan, file: Path) -> str:
    """The command that starts a written script."""
    return shlex.join(["sbatch" if _is_slurm(plan) else "bash", str(file)])


def check(plan: Plan) -> None:
    """UserError where it could not be started from here: what is missing, which host, which port."""
    if _is_slurm(plan):
        if shutil.which("sbatch") is None:
            raise UserError(
                "--submit: there is no Slurm on this machine (no sbatch); write the script with --to FILE, and call"
                " sbatch FILE on a login node"
            )
        try:
            machine.partitions()
        except UserError as error:
            raise UserError(f"--submit: Slurm does not answer on this machine ({error})") from None
        return
    if plan.script == "deepspeed.sh":
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError("--via deepspeed: is not installed: pip install 'snell_dist[deepspeed]'")
        if len(plan.hosts) > 1 and shutil.which("pdsh") is None:
            raise UserError("--via deepspeed: this machine has no pdsh, by which it starts the others")
    for host in plan.hosts:
        try:
            socket.getaddrinfo(host.name, None)
        except OSError as error:
            raise UserError(f"{host.name}: unreachable: its name has no address here ({error.strerror})") from None
    if plan.listens is not None:
        first, port = plan.listens
        taken = not network.port_free(port) if is_here(first) else network.reaches(first, port, ANSWER_S)
        if taken:
            raise UserError(f"{first}:{port}: the port is in use; say another with --port")


def submit(plan: Plan, script: str, file: Path | None) -> str:
    """Hands it to Slurm and says what comes next; without Slurm, becomes the script and does not come back."""
    if not _is_slurm(plan):
        _become(script)
    command = ["sbatch", "--parsable", *([str(file)] if file else [])]
    try:
        done = subprocess.run(
            command, input=None if file else script, capture_output=True, text=True, timeout=SUBMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch: gave no answer within {SUBMIT_S} s; squeue --me says whether it took the job"
        ) from None
    if done.returncode != 0:
        raise UserError("\n".join(done.stderr.strip().splitlines() or [f"sbatch: exit status {done.returncode}"]))
    job = done.stdout.strip().partition(";")[0]  # behind it the cluster's name, where there are several
    run = plan.run.replace("<job id>", job)
    return f"job {job}; follow it with: snell status {shlex.quote(run)}, end it with: snell stop {shlex.quote(run)}"


def _become(script: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp("bash", ["bash", "-c", script, "snell launch"])


def _is_slurm(plan: Plan) -> bool:
    return plan.script.startswith("slurm/")
