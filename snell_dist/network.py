"""This machine's names, addresses and interfaces, and what can be reached from it."""

from __future__ import annotations

import socket
import sys
import time


def addresses(host: str) -> list[str]:
    """Of a host's name; none where it is not known here."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)})
    except OSError:
        return []


def interfaces() -> dict[str, str | None]:
    """The IPv4 address of each interface."""
    return {name: _address(name) for _, name in socket.if_nameindex()}


def interface_to(host: str) -> str | None:
    """The interface through which a host is reached, where other hosts reach this one; None where none is sure."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
            door.connect((host, 9))  # sends nothing, only asks for the route
            mine = door.getsockname()[0]
    except OSError:
        return None
    found = [name for name, address in interfaces().items() if address == mine]
    return found[0] if found and not mine.startswith("127.") else None


def reaches(host: str, port: int, within_s: float) -> bool:
    """Whether something listens there; tries again until then."""
    end = time.monotonic() + within_s
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 5.0)):
                return True
        except OSError:
            time.sleep(min(0.1, left))
    return False


def port_free(port: int) -> bool:
    """Whether this machine can still listen on it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(("", port))
        except OSError:
            return False
    return True


def _address(interface: str) -> str | None:
    """IPv4, as Linux tells it."""
    import fcntl
    import struct

    asks = 0x8915  # SIOCGIFADDR
    if not sys.platform.startswith("linux"):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
        try:
            answer = fcntl.ioctl(door, asks, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
