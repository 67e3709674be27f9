"""Machines of a cluster, made of Linux namespaces on one: needs root, util-linux and iproute2.

Each node has a host name, an interface eth0, process ids, /run and /dev/shm of its own; the file system is shared, as
on a cluster. One node more, the login node, holds the switch that all are plugged into; commands are typed there.
With the prefix `snell`, node 1 is snell1 at 10.77.0.1, and the login node is snell0 at 10.77.0.254.

Nothing of it shows outside: no interface, mount, or line in /etc/hosts of the real machine. Process 1 of a node lives
as long as a pipe from this Python process is open, and with process 1 the kernel ends everything on the node. So
nothing stays behind, even if this process is killed; and two clusters may have the same names and addresses.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

TOOLS = "unshare", "nsenter", "mount", "ip"
NETWORK = "10.77.0"
# Process 1: HOSTNAME HOSTS. It ignores SIGCHLD: the kernel buries whom daemons leave to it.
BOOT = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount --bind "$2" /etc/hosts
ip link set lo up
echo up
exec env --ignore-signal=CHLD cat
"""
SWITCH = "switch"
END_S = 30


class Nodes:
    """So many nodes beside the login node, up within the block. OSError or CalledProcessError where one cannot be.

    folder: an existing one, for the files that they need.
    """

    def __init__(self, count: int, folder: Path, prefix: str = "snell", network: str = NETWORK) -> None:
        self.folder = folder
        self.login = f"{prefix}0"
        self.names = [f"{prefix}{n}" for n in range(1, count + 1)]
        self.addresses = {self.login: f"{network}.254"} | {n: f"{network}.{i}" for i, n in enumerate(self.names, 1)}
        self._hosts = folder / "hosts"
        self._holders: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Nodes:
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        self._hosts.write_text("".join(f"{line}\n" for line in lines))
        try:
            self._boot(self.login, ["--propagation=private"], [])
            # What is mounted on the login node from now on is seen by all.
            self.run(self.login, ["mount", "--make-rshared", "/"])
            self._switch("link", "add", SWITCH, "type", "bridge")
            self._switch("addr", "add", f"{self.addresses[self.login]}/24", "dev", SWITCH)
            self._switch("link", "set", SWITCH, "up")
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in reversed(list(self._holders)):
            self.crash(name)

    def boot(self, name: str) -> None:
        """A node from nothing, plugged into the switch: at first, and after a crash."""
        self._boot(name, ["--propagation=slave"], ["nsenter", f"--target={self._init(self.login)}", "--mount"])
        self._switch("link", "add", name, "type", "veth", "peer", "eth0", "netns", str(self._init(name)))
        self._switch("link", "set", name, "master", SWITCH, "up")
        self.run(name, ["ip", "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0"])
        self.run(name, ["ip", "link", "set", "eth0", "up"])

    def crash(self, name: str) -> None:
        """The node is gone at once with all that runs on it; its link goes first, so nobody there says goodbye."""
        if name in self.names:
            with suppress(subprocess.CalledProcessError):  # it has never been plugged in
                self._switch("link", "del", name)
        with self._holders.pop(name) as holder:
            assert holder.stdin is not None
            holder.stdin.close()
            holder.wait(END_S)

    def cut(self, name: str) -> None:
        """Pulls the node's cable: its interface loses its carrier, and no packet passes."""
        self._switch("link", "set", name, "down")

    def mend(self, name: str) -> None:
        self._switch("link", "set", name, "up")

    def command(self, name: str, words: Sequence[str | Path]) -> list[str]:
        """The words that run a command on a node, in the folder where this process is."""
        there = ["nsenter", f"--target={self._init(name)}", "--net", "--uts", "--mount", "--pid"]
        return [*there, "env", f"--chdir={os.getcwd()}", *map(str, words)]

    def run(
        self, name: str, words: Sequence[str | Path], timeout_s: float = 60, env: Mapping[str, str] | None = None
    ) -> str:
        """What a command on a node prints. CalledProcessError, with what it complained of, where it fails."""
        done = subprocess.run(self.command(name, words), capture_output=True, text=True, timeout=timeout_s, env=env)
        if done.returncode:
            raise _Failed(done.returncode, f"{name}: {' '.join(map(str, words))}", done.stdout, done.stderr)
        return done.stdout

    def processes(self, name: str) -> list[int]:
        """Process ids, as they are outside, of all that runs on a node but its process 1."""
        init = self._init(name)
        home = os.stat(f"/proc/{init}/ns/pid").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it ends while we look
                if entry.name.isdigit() and os.stat(entry / "ns/pid").st_ino == home:
                    found.append(int(entry.name))
        return sorted(pid for pid in found if pid != init)

    def kill(self, name: str) -> int:
        """SIGKILL to all that runs on a node, the node itself stays; how many processes that were."""
        killed: set[int] = set()
        deadline = time.monotonic() + END_S
        while found := self.processes(name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: processes {found} do not end")
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed.update(found)
            time.sleep(0.02)
        return len(killed)

    def path(self, path: Path) -> Path:
        """A file as the nodes see it, to open from outside; it differs where something is mounted on the login node."""
        return Path(f"/proc/{self._init(self.login)}/root{path}")

    def _boot(self, name: str, propagation: list[str], before: list[str]) -> None:
        new = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", *propagation]
        words = [*before, *new, "sh", "-c", BOOT, "sh", name, str(self._hosts)]
        holder = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=self.folder
        )
        self._holders[name] = holder
        assert holder.stdout is not None
        if holder.stdout.readline() != "up\n":
            raise OSError(f"{name}: does not come up: status {holder.wait(END_S)}")

    def _init(self, name: str) -> int:
        """Process 1 of a node, as it is outside."""
        holder = self._holders[name].pid
        return int(Path(f"/proc/{holder}/task/{holder}/children").read_text().split()[0])

    def _switch(self, *words: str) -> None:
        """`ip` in the login node's network only: process ids are those outside."""
        command = ["nsenter", f"--target={self._init(self.login)}", "--net", "ip", *words]
        subprocess.run(command, check=True, timeout=30, capture_output=True, text=True)


class _Failed(subprocess.CalledProcessError):
    def __str__(self) -> str:
        return f"{self.cmd}: status {self.returncode}: {self.stderr}{self.stdout}"
