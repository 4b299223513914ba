# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import os
import select
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.errors import BackendError
from devices.virtio.vsock import MAX_CID, MIN_CID, UnixVirtioVsock, VhostVirtioVsock
from tests.support.vsock_driver import RESPONSE, RST, RW, Packet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devices.virtio.device import VirtioDevice
    from tests.unit.devices.virtio.conftest import Machine

CID = 1234
NEEDS_RESET = 64
DATA = 0x40000
BUFFER = 0x50000


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hv-") as path:
        yield Path(path)


@pytest.fixture
def machine(directory: Path, make_machine: Callable[[VirtioDevice], Machine]) -> Machine:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "v.sock"))
    listener.listen()
    directory_fd = os.open(directory, os.O_PATH)
    device = UnixVirtioVsock("vsock0", CID, listener.detach(), directory_fd, socket_name="v.sock")
    machine = make_machine(device)
    machine.enable_memory()
    return machine


def exchange(machine: Machine, packet: Packet) -> Packet:
    """Send a packet and wait for the answer."""
    raw = packet.pack()
    machine.memory.write(DATA, raw)  # type: ignore[arg-type]
    machine.post(0, [(BUFFER, 4096, True)])
    machine.kick(0)
    machine.post(1, [(DATA, len(raw), False)])
    machine.kick(1)
    while not (used := machine.used(0)):
        eventfd = machine.transport._msix.eventfd(1)
        assert eventfd is not None
        assert select.select([eventfd.fd], [], [], 10)[0]
        eventfd.drain()
    return Packet.unpack(machine.memory.read(BUFFER, used[0][1]))  # type: ignore[arg-type]


def request(port: int) -> Packet:
    return Packet(1, 5000, port, src_cid=CID)


def test_config_space_tells_the_cid(machine: Machine) -> None:
    assert machine.read(0x2000, 4) | machine.read(0x2004, 4) << 32 == CID


def test_a_stream_goes_through_the_device(machine: Machine, directory: Path) -> None:
    machine.start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "v.sock_52"))
        listener.listen()
        assert exchange(machine, request(52)).op == RESPONSE
        host, _ = listener.accept()
    with host:
        host.send(b"hello, guest")
        answer = exchange(machine, Packet(RW, 5000, 52, b"hello, host", src_cid=CID))
        assert (answer.op, answer.data) == (RW, b"hello, guest")
        host.settimeout(10)
        assert host.recv(100) == b"hello, host"
    assert machine.device.stats()["guest_connections"] == 1


def test_a_reset_of_the_device_ends_its_streams_and_keeps_its_socket(
    machine: Machine, directory: Path
) -> None:
    machine.start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "v.sock_52"))
        listener.listen()
        exchange(machine, request(52))
        host, _ = listener.accept()
    machine.set_status(0)
    with host:
        host.settimeout(10)
        assert host.recv(100) == b""
    machine.start()
    with socket.socket(socket.AF_UNIX) as program:
        program.connect(str(directory / "v.sock"))
    assert exchange(machine, request(53)).op == RST
    assert machine.device.stats()["refused"] >= 1


@pytest.mark.parametrize("queues", [(), (0,), (1,), (2,)])
def test_a_device_without_both_data_queues_needs_reset(
    machine: Machine, queues: tuple[int, ...]
) -> None:
    machine.start(queues=queues)
    assert machine.status & NEEDS_RESET


def test_the_event_queue_may_be_kicked(machine: Machine) -> None:
    machine.start()
    machine.post(2, [(BUFFER, 4, True)])
    machine.kick(2)
    assert exchange(machine, request(53)).op == RST
    assert machine.used(2) == []


@pytest.mark.parametrize("cid", [0, MIN_CID - 1, MAX_CID + 1, 1 << 32])
def test_a_cid_out_of_range_is_refused(cid: int) -> None:
    with pytest.raises(ValueError, match=r"must be 3\.\.4294967294"):
        UnixVirtioVsock("vsock0", cid, -1, -1, socket_name="v.sock")


def test_a_descriptor_that_is_no_vhost_is_a_backend_error() -> None:
    with open(os.devnull, "rb") as file, pytest.raises(BackendError, match="not a vhost device"):
        VhostVirtioVsock("vsock0", CID, file.fileno())
