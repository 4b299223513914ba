# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The host's side of console ports, with a worker whose tiny guest has no driver for them."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel

QUIET = tiny.boot_timer() + tiny.HALT
PORTS = [{"name": "tty", "console": True}, {"name": "agent"}]


def paths(hostel: Hostel, name: str) -> list[Path]:
    return [Path(port["path"]) for port in hostel.api.vm(name)["ports"]]


def connect(path: Path) -> None:
    """Connect as far as one can: without a driver nobody answers."""
    with socket.socket(socket.AF_UNIX) as program:
        program.connect(str(path))


def test_sockets_are_there_while_the_vm_runs_whoever_is_restarted(own_hostel: Hostel) -> None:
    name = own_hostel.run(QUIET, ports=PORTS)
    for disturb in (own_hostel.restart, lambda: own_hostel.api.act(name, "reset")):
        for path in paths(own_hostel, name):
            connect(path)
        disturb()
    for path in paths(own_hostel, name):
        connect(path)
    own_hostel.api.act(name, "kill")
    assert not any(path.exists() for path in paths(own_hostel, name))
    own_hostel.api.act(name, "start")
    for path in paths(own_hostel, name):
        connect(path)
    own_hostel.delete(name)


def test_ports_count_and_hold_still_with_their_vm(hostel: Hostel) -> None:
    name = hostel.run(QUIET, ports=PORTS)
    counters = hostel.api.get(f"/v1/vms/{name}/stats")["ports"]
    assert set(counters) == {"tty", "agent"}
    assert set(counters["agent"].values()) == {0}
    hostel.api.act(name, "pause")
    hostel.api.act(name, "resume")
    hostel.delete(name)
