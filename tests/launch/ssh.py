"""Plain `ssh NODE` between the nodes, as on a cluster: one sshd a node, keys of their own, nothing asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from nodes import Nodes

TOOLS = "sshd", "ssh", "ssh-keygen", "pdsh"
SERVER = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile /run/sshd.pid
PermitRootLogin yes
StrictModes no
UsePAM no
"""
CLIENT = """\
Host *
  IdentityFile {folder}/key
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""


class Ssh:
    """Servers on all nodes, up once this is made; they end when the nodes do."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self.nodes, self._server, config = nodes, folder / "sshd_config", folder / "ssh_config"
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
        subprocess.run(make, check=True, timeout=30, capture_output=True)
        self._server.write_text(SERVER.format(folder=folder))
        config.write_text(CLIENT.format(folder=folder))
        nodes.run(nodes.login, ["mount", "--bind", config, "/etc/ssh/ssh_config"])  # all nodes see it
        for name in nodes.names:
            self.start(name)

    def start(self, node: str) -> None:
        """sshd, at first and after a crash."""
        server = shutil.which("sshd")  # it wants to be called by its whole path
        assert server is not None
        self.nodes.run(node, ["mkdir", "-p", "/run/sshd"])
        self.nodes.run(node, [server, "-f", self._server])
