# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import errno
import os
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import devices.virtio.net
from devices.errors import BackendError
from devices.virtio.net import VirtioNet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devices.virtio.device import VirtioDevice
    from tests.unit.devices.virtio.conftest import Machine

VERSION_1 = 1 << 32
F_EVENT_IDX = 1 << 29
F_CSUM, F_GUEST_CSUM, F_MTU, F_MAC, F_GUEST_TSO4 = 1 << 0, 1 << 1, 1 << 3, 1 << 5, 1 << 7
F_GUEST_ECN, F_HOST_TSO4, F_MRG_RXBUF, F_STATUS = 1 << 9, 1 << 11, 1 << 15, 1 << 16
MAC = bytes.fromhex("52540000beef")
FEATURES_OK, NEEDS_RESET = 8, 64
DATA = 0x40000
HEADER_BYTES = 12


class Wire:
    """A socket pair instead of a tap: it keeps packets apart just the same."""

    def __init__(self) -> None:
        self.far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.near_fd = near.detach()
        self.far.settimeout(10)
        self.configured: list[int] = []
        self.error: int | None = None

    def configure(self, fd: int, features: int) -> None:
        assert fd == self.near_fd
        if self.error is not None:
            raise OSError(self.error, "refused")
        self.configured.append(features)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    wire = Wire()
    monkeypatch.setattr(devices.virtio.net, "configure_tap", wire.configure)
    yield wire
    wire.far.close()


@pytest.fixture
def machine(wire: Wire, make_machine: Callable[[VirtioDevice], Machine]) -> Machine:
    machine = make_machine(VirtioNet("net0", [wire.near_fd], path="tap0", mac=MAC, mtu=1400))
    machine.enable_memory()
    return machine


def wait_for_interrupt(machine: Machine, vector: int) -> None:
    eventfd = machine.transport._msix.eventfd(vector)
    assert eventfd is not None
    assert select.select([eventfd.fd], [], [], 10)[0]
    eventfd.drain()


def test_config_space_tells_mac_link_and_mtu(machine: Machine) -> None:
    assert machine.read(0x2000, 4) | machine.read(0x2004, 2) << 32 == int.from_bytes(MAC, "little")
    assert machine.read(0x2006, 2) == 1
    assert machine.read(0x200A, 2) == 1400


def test_offered_features(machine: Machine) -> None:
    wanted = F_CSUM | F_GUEST_CSUM | F_MTU | F_MAC | F_GUEST_TSO4 | F_HOST_TSO4
    wanted |= F_GUEST_ECN | F_MRG_RXBUF | F_STATUS
    assert machine.offered() & wanted == wanted


def test_tap_is_configured_for_what_was_negotiated_and_back(machine: Machine, wire: Wire) -> None:
    machine.start(VERSION_1 | F_GUEST_CSUM)
    machine.set_status(0)
    assert wire.configured == [0, VERSION_1 | F_GUEST_CSUM, 0]


@pytest.mark.parametrize(
    "features", [F_GUEST_TSO4, F_HOST_TSO4, F_GUEST_CSUM | F_GUEST_ECN], ids=hex
)
def test_offload_without_what_it_builds_on_is_refused(machine: Machine, features: int) -> None:
    machine.accept(VERSION_1 | features)
    machine.set_status(FEATURES_OK)
    assert machine.status == 0


def test_packet_from_the_guest_reaches_the_wire(machine: Machine, wire: Wire) -> None:
    machine.start(VERSION_1)
    machine.memory.write(DATA, bytes(HEADER_BYTES) + b"hello, wire")
    machine.post(1, [(DATA, HEADER_BYTES + 11, False)])
    machine.kick(1)
    assert wire.far.recv(2048)[HEADER_BYTES:] == b"hello, wire"
    wait_for_interrupt(machine, 2)
    assert machine.used(1) == [(0, 0)]


def test_packet_from_the_wire_reaches_the_guest(machine: Machine, wire: Wire) -> None:
    machine.start(VERSION_1 | F_MRG_RXBUF)
    machine.post(0, [(DATA, 2048, True)])
    machine.kick(0)
    wire.far.send(bytes(HEADER_BYTES) + b"hello, guest")
    wait_for_interrupt(machine, 1)
    assert machine.used(0) == [(0, HEADER_BYTES + 12)]
    assert machine.memory.read(DATA + HEADER_BYTES, 12) == b"hello, guest"
    assert machine.device.stats()["rx_packets"] == 1


@pytest.mark.parametrize("queues", [(), (0,), (1,)])
def test_interface_without_both_queues_needs_reset(
    machine: Machine, queues: tuple[int, ...]
) -> None:
    machine.start(queues=queues)
    assert machine.status & NEEDS_RESET
    machine.start()
    assert not machine.status & NEEDS_RESET


def test_tap_that_refuses_at_activation_needs_reset(machine: Machine, wire: Wire) -> None:
    wire.error = errno.EBADFD
    machine.start()
    assert machine.status & NEEDS_RESET


def test_pulling_the_cable_tells_the_driver_once(machine: Machine) -> None:
    machine.start()
    machine.interrupts(0)
    machine.device.set_link(False)  # type: ignore[attr-defined]
    machine.device.set_link(False)  # type: ignore[attr-defined]
    assert machine.read(0x2006, 2) == 0
    assert machine.interrupts(0) == 1


def test_what_vhost_cannot_do_is_not_offered(
    wire: Wire, make_machine: Callable[[VirtioDevice], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices.virtio.net.VhostDevice, "features", lambda _: VERSION_1 | 1 << 24)
    vhost_fd = os.open(os.devnull, os.O_RDWR)
    device = VirtioNet("net0", [wire.near_fd], path="tap0", mac=MAC, vhost_fds=[vhost_fd])
    machine = make_machine(device)
    machine.enable_memory()
    assert not machine.offered() & (F_MRG_RXBUF | F_EVENT_IDX)
    assert machine.offered() & VERSION_1
    assert machine.offered() & F_GUEST_TSO4


@pytest.mark.parametrize("features", [0, None], ids=["virtio 0.9", "no vhost"])
def test_vhost_that_cannot_be_used_is_a_backend_error(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, features: int | None
) -> None:
    if features is not None:
        monkeypatch.setattr(devices.virtio.net.VhostDevice, "features", lambda _: features)
    with Path(os.devnull).open("rb") as null, pytest.raises(BackendError, match=r"tap0: .*vhost"):
        VirtioNet("net0", [wire.near_fd], path="tap0", mac=MAC, vhost_fds=[null.fileno()])


def test_descriptor_that_is_no_tap_is_a_backend_error(wire: Wire) -> None:
    wire.error = errno.ENOTTY
    with pytest.raises(BackendError, match="tap0: not a tap"):
        VirtioNet("net0", [wire.near_fd], path="tap0", mac=MAC)


@pytest.mark.parametrize("mac", [b"", MAC + b"\0", b"\x01\0\0\0\0\0"])
def test_bad_mac_is_refused(mac: bytes) -> None:
    with pytest.raises(ValueError, match="six bytes"):
        VirtioNet("net0", [-1], path="tap0", mac=mac)


@pytest.mark.parametrize("mtu", [0, 67, 65536])
def test_bad_mtu_is_refused(mtu: int) -> None:
    with pytest.raises(ValueError, match=r"68\.\.65535"):
        VirtioNet("net0", [-1], path="tap0", mac=MAC, mtu=mtu)
