# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The host's side of vsock, with a worker whose tiny guest has no driver for it."""

from __future__ import annotations

import socket
from pathlib import Path

from lab.rest import Json
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel

QUIET = tiny.boot_timer() + tiny.HALT


def test_the_socket_outlives_hosteld_and_the_reset_of_its_vm(own_hostel: Hostel) -> None:
    name = own_hostel.run(QUIET, vsock={})
    path = Path(vsock_of(own_hostel, name)["path"])
    for disturb in (own_hostel.restart, lambda: own_hostel.api.act(name, "reset")):
        connect(path)
        disturb()
    connect(path)
    own_hostel.api.act(name, "kill")
    assert path.parent.is_dir()
    own_hostel.api.act(name, "start")
    connect(path)
    own_hostel.delete(name)
    assert not path.parent.exists()


def test_a_device_that_no_driver_used_has_counted_nothing(hostel: Hostel) -> None:
    name = hostel.run(QUIET, vsock={"cid": 77})
    assert vsock_of(hostel, name)["cid"] == 77
    counters = hostel.api.get(f"/v1/vms/{name}/stats")["vsock"]
    assert set(counters.values()) <= {0}
    hostel.api.act(name, "pause")
    hostel.api.act(name, "resume")
    hostel.delete(name)


def test_a_vm_without_vsock_has_none(hostel: Hostel) -> None:
    name = hostel.run(QUIET)
    assert hostel.api.vm(name)["vsock"] is None
    assert hostel.api.get(f"/v1/vms/{name}/stats")["vsock"] == {}


def vsock_of(hostel: Hostel, name: str) -> Json:
    vsock: Json = hostel.api.vm(name)["vsock"]
    return vsock


def connect(path: Path) -> None:
    """Connect as far as one can: the driver would answer, the socket takes the call."""
    with socket.socket(socket.AF_UNIX) as program:
        program.connect(str(path))
