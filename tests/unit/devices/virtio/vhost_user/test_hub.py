# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A network interface on a switch that offers nothing beyond the protocol's least."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.virtio.vhost_user.device import VhostUserBlk, VhostUserNet
from devices.virtio.vhost_user.link import Link
from tests.support.vhost_user_hub import Hub

if TYPE_CHECKING:
    from tests.unit.devices.virtio.conftest import Machine, MachineFactory

VERSION_1, MAC_BIT, STATUS_BIT, MTU_BIT = 1 << 32, 1 << 5, 1 << 16, 1 << 3
RX, TX = 0, 1
MAC = bytes.fromhex("020000000001")
HEADER = bytes(12)
FRAME = b"frame".ljust(60, b".")
RX_GPA, TX_GPA = 0x40000, 0x50000
DEADLINE_S = 30.0


@dataclass
class Rig:
    machine: Machine
    nic: VhostUserNet
    link: Link
    hub: Hub

    def wait_used(self, index: int) -> tuple[int, int]:
        due = time.monotonic() + DEADLINE_S
        while not (used := self.machine.used(index)):
            assert time.monotonic() < due
            self.machine.loop.dispatch()
            time.sleep(0.001)
        return used[0]

    def exchange(self) -> bytes:
        """Send a frame, which a hub with one port sends back."""
        self.machine.post(RX, [(RX_GPA, 2048, True)])
        self.machine.memory.write(TX_GPA, HEADER + FRAME)
        self.machine.post(TX, [(TX_GPA, len(HEADER + FRAME), False)])
        self.machine.transport._kicks[TX].signal()
        assert self.wait_used(TX) == (0, 0)
        _, written = self.wait_used(RX)
        return self.machine.memory.read(RX_GPA, written)[len(HEADER) :]


def connect(hub: Hub) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(hub.path))
    return sock


@pytest.fixture
def rig(tmp_path: Path, make_machine: MachineFactory) -> Iterator[Rig]:
    hub = Hub(tmp_path / "hub")
    link = Link("n0", connect(hub), config_bytes=VhostUserNet.CONFIG_BYTES)
    nic = VhostUserNet("n0", link, mac=MAC, mtu=1400)
    machine = make_machine(nic)
    link.watch(machine.loop)
    rig = Rig(machine, nic, link, hub)
    yield rig
    link.watch(None)
    machine.close()
    link.close()
    rig.hub.close()


def test_front_end_adds_what_it_knows_itself(rig: Rig) -> None:
    rig.machine.enable_memory()
    assert rig.machine.offered() == VERSION_1 | MAC_BIT | STATUS_BIT | MTU_BIT
    assert rig.nic.config_space() == MAC + b"\1\0" + b"\1\0" + (1400).to_bytes(2, "little")


def test_frame_goes_out_and_comes_in(rig: Rig) -> None:
    rig.machine.start(VERSION_1 | MAC_BIT)
    assert [rig.exchange() for _ in range(3)] == [FRAME] * 3


def test_receive_buffers_that_wait_do_not_hold_a_pause_up(rig: Rig) -> None:
    rig.machine.start(VERSION_1)
    rig.machine.post(RX, [(RX_GPA, 2048, True)])
    rig.nic.quiesce()
    rig.nic.resume()
    rig.machine.memory.write(TX_GPA, HEADER + FRAME)
    rig.machine.post(TX, [(TX_GPA, len(HEADER + FRAME), False)])
    rig.machine.transport._kicks[TX].signal()
    assert rig.wait_used(RX) == (0, len(HEADER + FRAME))


def test_interface_goes_on_with_the_next_switch(rig: Rig, tmp_path: Path) -> None:
    rig.machine.start(VERSION_1)
    rig.exchange()
    rig.hub.close()
    due = time.monotonic() + DEADLINE_S
    while rig.link.lost is None:
        assert time.monotonic() < due
        rig.machine.loop.dispatch()
    rig.hub = Hub(tmp_path / "hub")
    rig.link.attach(connect(rig.hub), needed=rig.nic.negotiated)
    rig.nic.reattach()
    assert rig.exchange() == FRAME


def test_dropped_switch_is_hung_up_on_though_others_hold_the_socket(rig: Rig) -> None:
    rig.machine.start(VERSION_1)
    duplicate = os.dup(rig.link.talk().fileno())
    rig.link.drop("a test")
    with socket.socket(fileno=duplicate) as held:
        assert held.recv(1) == b""
    due = time.monotonic() + DEADLINE_S
    while rig.hub.n_ports:
        assert time.monotonic() < due
        time.sleep(0.001)


def test_back_end_without_a_config_space_is_no_disk(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    with pytest.raises(Exception, match="serves no config space"):
        Link("d0", connect(hub), config_bytes=VhostUserBlk.CONFIG_BYTES)
    hub.close()
