"""Routes and ports of the machine that runs the tests."""

import socket

from snell_dist import network


def test_the_loopback_leads_to_no_other_machine() -> None:
    assert network.interface_to("127.0.0.1") is None
    assert network.interface_to("no-such-host.invalid") is None


def test_a_port_is_free_until_someone_listens() -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
        assert not network.reaches("127.0.0.1", port, 0.2)
        door.listen()
        assert not network.port_free(port)
        assert network.reaches("127.0.0.1", port, 1)
    assert network.port_free(port)
