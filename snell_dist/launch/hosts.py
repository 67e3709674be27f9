"""Hostfiles: which machines, how many processes on each, and whether ssh reaches them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from snell_dist.config import UserError

EXPECTED = "expected NAME slots=NUMBER, such as: gpu-node-1 slots=4"
LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=(?P<slots>[1-9]\d*)\s*(#.*)?")
LOCAL = re.compile(r"localhost|127\..*|::1")
AT_ONCE = 32


@dataclass(frozen=True)
class Host:
    """`slots`: processes there, one a GPU."""

    name: str
    slots: int


def read(file: Path) -> list[Host]:
    """The machines of a hostfile, in its order; the first is where the others meet.

    Raises UserError with one line for each that is wrong.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not a text"
        raise UserError(f"{file}: cannot read this hostfile: {reason}") from None
    found: dict[str, tuple[int, Host]] = {}
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        said = line.strip()
        if not said or said.startswith("#"):
            continue
        match = LINE.fullmatch(said)
        if match is None:
            wrong.append(f"{file}:{number}: {said!r}: {EXPECTED}")
        elif match["name"] in found:
            wrong.append(f"{file}:{number}: {match['name']}: is in line {found[match['name']][0]} already")
        else:
            found[match["name"]] = number, Host(match["name"], int(match["slots"]))
    local = [(number, host) for number, host in found.values() if LOCAL.fullmatch(host.name)]
    if len(found) > 1:
        wrong += [
            f"{file}:{number}: {host.name}: on every other machine that is another one; give its name in the network"
            for number, host in local
        ]
    if not found and not wrong:
        wrong.append(f"{file}: names no machine; {EXPECTED}")
    if wrong:
        raise UserError("\n".join(wrong))
    return [host for _, host in found.values()]


def unreachable(hosts: list[Host], port: int | None = None, timeout_s: int = 10) -> list[str]:
    """What ssh says of each machine that it cannot use without a password; asks all at the same time.

    Reads PDSH_SSH_ARGS_APPEND (such as "-F my_ssh_config"), as DeepSpeed's launcher does.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = pool.map(lambda host: _try(host, port, timeout_s), hosts)
    return [line for line in said if line]


def _try(host: Host, port: int | None, timeout_s: int) -> str | None:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={timeout_s}", *([] if port is None else ["-p", str(port)])]
    command = ["ssh", *options, *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), host.name, "true"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * timeout_s, check=False
        )
    except FileNotFoundError:
        return f"{host.name}: cannot be tried: this machine has no ssh"
    except subprocess.TimeoutExpired:
        return f"{host.name}: ssh gave no answer within {2 * timeout_s} s"
    if done.returncode == 0:
        return None
    # Warnings come first, the reason last.
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"{host.name}: ssh does not reach it: {reason.strip()} (try: {shlex.join(command)})"
