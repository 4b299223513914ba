# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""vhost-net on a real tap, with a synthetic driver in the same memory instead of a guest."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from daemon.supervisor import taps
from daemon.supervisor.records import NicRecord
from kvm_ffi.engine import EngineFault
from kvm_ffi.eventfd import EventFd
from kvm_ffi.memory import GuestMemory
from kvm_ffi.net_tap import Tap
from kvm_ffi.types import Gpa
from kvm_ffi.vhost import VhostDevice, VhostNet, Vring
from lab.where import in_lab
from tests.support.engine_thread import wait_signal, wait_until
from tests.support.ring_driver import WRITE, RingDriver

TAP = f"hv{os.getpid() % 100_000}"
NIC = NicRecord("net0", TAP, "02:00:00:00:00:01", None, None, "vhost")
VERSION_1, MRG_RXBUF = 1 << 32, 1 << 15
# An experimental EtherType, so nobody on the host answers, and nothing else is heard.
ETHER_TYPE = 0x88B5
HEADER = bytes(12)
RX, TX = 0x100000, 0x200000
RX_BUFFER_BYTES = 2048
FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + b"payload".ljust(46, b".")

pytestmark = pytest.mark.skipif(
    not in_lab() and not os.access("/dev/vhost-net", os.R_OK | os.W_OK),
    reason="no /dev/vhost-net to use: make test-guest runs this in the lab",
)


@dataclass
class Rig:
    """A driver, vhost and the host's side of the tap."""

    memory: GuestMemory
    rx: RingDriver
    tx: RingDriver
    vrings: tuple[Vring, Vring]
    fault: EventFd
    vhost_fd: int
    tap_fd: int
    wire: socket.socket

    def vhost(self) -> VhostNet:
        return VhostNet(
            self.vhost_fd,
            self.memory,
            self.tap_fd,
            features=VERSION_1 | MRG_RXBUF,
            vrings=self.vrings,
            fault=self.fault,
        )

    def send(self, head: int = 0) -> None:
        """Offer one frame to the device, as a guest that transmits does."""
        self.memory.write(Gpa(TX), HEADER + FRAME)
        self.tx.offer(self.tx.chain([(TX, len(HEADER) + len(FRAME), 0)], first=head))
        self.vrings[1].kick.signal()

    def offer_buffers(self, count: int) -> None:
        for index in range(count):
            gpa = RX + index * RX_BUFFER_BYTES
            self.rx.offer(self.rx.chain([(gpa, RX_BUFFER_BYTES, WRITE)], first=index))
        self.vrings[0].kick.signal()


@pytest.fixture
def rig() -> Iterator[Rig]:
    (tap_fd,) = taps.open_taps(NIC, 0, 1)
    tap = Tap([tap_fd])
    tap.configure(0)
    quiet = Path(f"/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6")
    if quiet.exists():
        quiet.write_text("1")
    (vhost_fd,) = taps.open_vhost(NIC, 0, 1)
    eventfds = [EventFd() for _ in range(5)]
    rx_kick, tx_kick, rx_irq, tx_irq, fault = eventfds
    with (
        GuestMemory([(Gpa(0), 4 << 20), (Gpa(1 << 32), 1 << 20)]) as memory,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire,
    ):
        wire.bind((TAP, ETHER_TYPE))
        wire.settimeout(30)
        rx, tx = RingDriver(memory, base=0x1000), RingDriver(memory, base=0x8000)
        queues = rx.queue(index=0), tx.queue(index=1)
        vrings = Vring(queues[0], rx_kick, rx_irq), Vring(queues[1], tx_kick, tx_irq)
        yield Rig(memory, rx, tx, vrings, fault, vhost_fd, tap_fd, wire)
    for eventfd in eventfds:
        eventfd.close()
    os.close(vhost_fd)
    tap.close()


@pytest.fixture
def vhost(rig: Rig) -> Iterator[VhostNet]:
    vhost = rig.vhost()
    yield vhost
    vhost.stop()
    vhost.close()


def irq(rig: Rig, index: int) -> EventFd:
    irq = rig.vrings[index].irq
    assert isinstance(irq, EventFd)
    return irq


def test_the_kernel_knows_what_is_negotiated(rig: Rig) -> None:
    assert VhostDevice(rig.vhost_fd).features() & (VERSION_1 | MRG_RXBUF) == VERSION_1 | MRG_RXBUF


def test_a_frame_of_the_guest_is_on_the_wire(rig: Rig, vhost: VhostNet) -> None:
    vhost.resume()
    rig.send()
    assert rig.wire.recv(2048) == FRAME
    wait_until(irq(rig, 1), lambda: rig.tx.used_idx == 1)
    assert taps.counters(TAP)["tx_packets"] == 1


def test_a_frame_of_the_wire_is_in_the_guest_s_buffer(rig: Rig, vhost: VhostNet) -> None:
    vhost.resume()
    rig.offer_buffers(4)
    rig.wire.send(FRAME)
    arrived: list[bytes] = []
    # The host may have something to say of its own, such as that it listens to multicast.
    while FRAME not in arrived:
        wait_signal(irq(rig, 0))
        for head, written in rig.rx.take_used():
            gpa = RX + head * RX_BUFFER_BYTES + len(HEADER)
            arrived.append(rig.memory.read(Gpa(gpa), written - len(HEADER)))


def test_what_is_held_still_goes_on_where_it_was(rig: Rig, vhost: VhostNet) -> None:
    vhost.resume()
    rig.send()
    assert rig.wire.recv(2048) == FRAME
    vhost.quiesce()
    assert rig.vrings[1].queue.state.next_avail == rig.tx.used_idx == 1
    rig.send(head=1)
    vhost.resume()
    assert rig.wire.recv(2048) == FRAME
    wait_until(irq(rig, 1), lambda: rig.tx.used_idx == 2)


def test_one_that_was_given_up_can_be_had_again(rig: Rig) -> None:
    first = rig.vhost()
    first.stop()
    first.close()
    second = rig.vhost()
    second.resume()
    rig.send()
    assert rig.wire.recv(2048) == FRAME
    second.stop()
    second.close()


def test_a_broken_ring_is_told(rig: Rig, vhost: VhostNet) -> None:
    vhost.resume()
    rig.tx.set_avail_idx(1000)
    rig.vrings[1].kick.signal()
    wait_signal(rig.fault)
    assert rig.tx.used_idx == 0
    assert vhost.fault is EngineFault.RING


def test_a_lost_tap_is_told_when_it_is_to_go_on(rig: Rig, vhost: VhostNet) -> None:
    vhost.resume()
    subprocess.run(["ip", "link", "del", TAP], check=True)
    rig.send()
    vhost.quiesce()
    vhost.resume()
    wait_signal(rig.fault)
    assert vhost.fault is EngineFault.BACKEND
    assert taps.counters(TAP) == {}
