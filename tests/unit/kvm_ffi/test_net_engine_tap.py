# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The net engine on a real tap, in a network namespace that only one thread is in."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvm_ffi._kvm import lib
from kvm_ffi.engine import EngineFault
from kvm_ffi.eventfd import EventFd
from kvm_ffi.memory import GuestMemory
from kvm_ffi.net_engine import NetEngine
from kvm_ffi.net_tap import Tap as NetTap
from kvm_ffi.types import Gpa
from tests.support.engine_thread import running, wait_signal
from tests.support.ring_driver import WRITE, RingDriver

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x1000, 0x4000
SOL_PACKET, PACKET_VNET_HDR, ETH_P_ALL = 263, 15, 3
GUEST_CSUM, GUEST_TSO4 = 1 << 1, 1 << 7
RX, TX = 0x100000, 0x200000
# An experimental EtherType, so nobody on the host answers.
FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + b"payload".ljust(46, b".")


@dataclass
class Tap:
    """A tap in its own namespace; `packets` is a packet socket on it, the host's side."""

    fd: int
    packets: socket.socket
    inside: ThreadPoolExecutor

    def ip(self, *words: str) -> None:
        self.inside.submit(subprocess.run, ["ip", *words], check=True).result()


def open_tap(flags: int) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"tap0", flags))
    except OSError:
        os.close(fd)
        raise
    return fd


def enter_namespace() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def build_tap() -> tuple[int, socket.socket]:
    fd = open_tap(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
    quiet = Path("/proc/sys/net/ipv6/conf/tap0/disable_ipv6")
    if quiet.exists():
        quiet.write_text("1")
    subprocess.run(["ip", "link", "set", "tap0", "up"], check=True)
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    packets.bind(("tap0", ETH_P_ALL))
    packets.settimeout(30)
    return fd, packets


@pytest.fixture
def inside() -> Iterator[ThreadPoolExecutor]:
    """A thread alone in a new network namespace; skips, with the reason, where none can be had."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("/dev/net/tun is missing")
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    with ThreadPoolExecutor(1) as executor:
        try:
            executor.submit(enter_namespace).result()
            os.close(executor.submit(open_tap, IFF_TAP | IFF_NO_PI).result())
        except OSError as error:
            pytest.skip(f"no tap in a network namespace of our own: {error}")
        yield executor


@pytest.fixture
def tap(inside: ThreadPoolExecutor) -> Iterator[Tap]:
    fd, packets = inside.submit(build_tap).result()
    yield Tap(fd, packets, inside)
    packets.close()
    os.close(fd)


@dataclass
class Guest:
    """A driver on the other side of the tap."""

    memory: GuestMemory
    rx: RingDriver
    tx: RingDriver
    engine: NetEngine
    rx_kick: EventFd
    tx_kick: EventFd
    rx_irq: EventFd
    tx_irq: EventFd
    fault: EventFd

    def offer_rx(self, count: int, length: int) -> None:
        for index in range(count):
            gpa = RX + index * length
            self.rx.offer(self.rx.chain([(gpa, length, WRITE)], first=index))

    def send(self, data: bytes) -> None:
        self.memory.write(Gpa(TX), data)
        self.tx.offer(self.tx.chain([(TX, len(data), 0)]))
        self.tx_kick.signal()

    def receive(self) -> bytes:
        """The next packet, header included."""
        while not (used := self.rx.take_used()):
            wait_signal(self.rx_irq)
        return b"".join(self.memory.read(Gpa(RX + head * 4096), written) for head, written in used)


@pytest.fixture
def guest(tap: Tap) -> Iterator[Guest]:
    memory = GuestMemory([(Gpa(0), 4 << 20)])
    rx = RingDriver(memory, size=64, base=0x10000)
    tx = RingDriver(memory, size=16, base=0x20000)
    rx_kick, tx_kick, rx_irq, tx_irq, fault = events = [EventFd() for _ in range(5)]
    NetTap([tap.fd]).configure(GUEST_CSUM | GUEST_TSO4)
    engine = NetEngine(
        memory, tap.fd, rx=rx.queue(), tx=tx.queue(index=1), rx_kick=rx_kick, tx_kick=tx_kick,
        rx_irq=rx_irq, tx_irq=tx_irq, fault=fault, mergeable=True,
    )  # fmt: skip
    yield Guest(memory, rx, tx, engine, rx_kick, tx_kick, rx_irq, tx_irq, fault)
    engine.close()
    for event in events:
        event.close()
    memory.close()


def test_frames_pass_a_real_tap_both_ways(tap: Tap, guest: Guest) -> None:
    guest.offer_rx(8, 4096)
    with running(guest.engine):
        tap.packets.send(FRAME)
        packet = guest.receive()
        assert packet[12:] == FRAME
        assert packet[10:12] == b"\x01\x00"
        guest.send(bytes(12) + FRAME[::-1])
        assert tap.packets.recv(200) == FRAME[::-1]


def tcp_packet(payload_bytes: int) -> bytes:
    """virtio_net_hdr, Ethernet, IPv4 and TCP of one large segment that the kernel may cut."""
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 5 << 4, 0x10, 1000, 0, 0)
    total = 20 + len(tcp) + payload_bytes
    ipv4 = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, total, 0, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2"
    )
    ethernet = bytes.fromhex("020000000002 020000000001 0800")
    # NEEDS_CSUM, GSO_TCPV4, header length, segment size, checksum start and offset
    vnet = struct.pack("<BBHHHH", 1, 1, 14 + 20 + 20, 1400, 14 + 20, 16)
    return vnet + ethernet + ipv4 + tcp + bytes(payload_bytes)


def test_a_large_segment_arrives_uncut_when_the_guest_can_take_it(tap: Tap, guest: Guest) -> None:
    guest.offer_rx(64, 4096)
    tap.packets.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    with running(guest.engine):
        sent = tcp_packet(30000)
        tap.packets.send(sent)
        packet = guest.receive()
    flags, gso_type, _, gso_size, _, _, num_buffers = struct.unpack("<BBHHHHH", packet[:12])
    assert (flags & 1, gso_type, gso_size) == (1, 1, 1400)
    assert num_buffers == -(-(12 + len(sent) - 10) // 4096)
    assert len(packet) == 12 + len(sent) - 10


def test_a_large_segment_is_cut_when_the_guest_cannot_take_it(tap: Tap, guest: Guest) -> None:
    guest.offer_rx(64, 4096)
    NetTap([tap.fd]).configure(0)
    tap.packets.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    tap.packets.send(tcp_packet(30000))
    assert lib.net_engine_serve(guest.engine._c) == 0
    frames = [written for _, written in guest.rx.take_used()]
    assert len(frames) == -(-30000 // 1400)
    assert max(frames) == 12 + 14 + 40 + 1400


def test_an_interface_that_is_down_drops_and_comes_back(tap: Tap, guest: Guest) -> None:
    with running(guest.engine):
        tap.ip("link", "set", "tap0", "down")
        guest.send(bytes(12) + FRAME)
        wait_signal(guest.tx_irq)
        assert guest.engine.stats()["tx_dropped"] == 1
        tap.ip("link", "set", "tap0", "up")
        guest.send(bytes(12) + FRAME)
        wait_signal(guest.tx_irq)
    assert guest.engine.stats()["tx_packets"] == 1
    assert guest.engine.fault is EngineFault.NONE


def test_a_deleted_tap_is_reported_and_no_longer_polled(tap: Tap, guest: Guest) -> None:
    guest.offer_rx(4, 4096)
    with running(guest.engine) as thread:
        tap.ip("link", "del", "tap0")
        wait_signal(guest.fault)
        assert guest.engine.fault is EngineFault.BACKEND
        guest.send(bytes(12) + FRAME)
        wait_signal(guest.tx_irq)
        assert guest.engine.stats()["tx_dropped"] == 1
    assert thread.stopped is True


def test_a_header_with_nonsense_is_refused_by_the_kernel_and_counted(
    tap: Tap, guest: Guest
) -> None:
    guest.send(b"\xff" * 12 + FRAME)
    assert lib.net_engine_serve(guest.engine._c) == 0
    assert guest.engine.stats()["tx_dropped"] == 1


def test_a_tap_without_virtio_headers_cannot_be_configured(inside: ThreadPoolExecutor) -> None:
    fd = inside.submit(open_tap, IFF_TAP | IFF_NO_PI).result()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - errno below
        NetTap([fd]).configure(0)
    os.close(fd)
    assert caught.value.errno == errno.EINVAL
