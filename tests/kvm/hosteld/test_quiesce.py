# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A pause amid disk and network I/O: all that was taken is done, and nothing moves until it ends.

The test is the driver: it works on the rings in the guest's memory, which it maps, while the guest
itself only kicks, as fast as it can.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.hostel import Hostel
from tests.support.remote_driver import BLK, NET, RemoteDevice, find_devices
from tests.support.remote_guest import RemoteGuest
from tests.support.ring_driver import WRITE, RingDriver

PAUSES: Final = 30
LIMIT_S: Final = 20.0
RING: Final = 8
BLOCKS: Final = 64
BLOCK_BYTES: Final = 4096
FRAME_BYTES: Final = 64
ETHERTYPE: Final = 0x88B5  # IEEE 802: local experimental
HEADER_BYTES: Final = 12
KICKS: Final = 2000
RINGS: Final = {"disk": 0x40_0000, "rx": 0x41_0000, "tx": 0x42_0000}
BUFFERS: Final = {"disk": 0x50_0000, "rx": 0x51_0000, "tx": 0x52_0000}
READ_BLOCK, WRITE_BLOCK = 0, 1

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="taps and guest memory need root")


class GuestRam:
    """The RAM of a VM, mapped here as well."""

    def __init__(self, pid: int) -> None:
        links = Path(f"/proc/{pid}/fd").iterdir()
        name = "/memfd:hostel-ram (deleted)"
        found = next(link for link in links if os.readlink(link) == name)  # noqa: PTH115
        with found.open("r+b", buffering=0) as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def read(self, gpa: int, length: int) -> bytes:
        return self._map[gpa : gpa + length]

    def write(self, gpa: int, data: bytes) -> None:
        self._map[gpa : gpa + len(data)] = data

    def close(self) -> None:
        self._map.close()


class Load:
    """What is asked of a disk and a network interface, and whether all of it comes back."""

    def __init__(self, ram: GuestRam, wire: socket.socket, dice: random.Random) -> None:
        self.ram, self.wire, self._dice = ram, wire, dice
        self.disk, self.rx, self.tx = (
            RingDriver(ram, size=64 if name == "disk" else RING, base=base)  # type: ignore[arg-type]
            for name, base in RINGS.items()
        )
        self.disk_free = list(range(RING))
        self.asked: dict[int, tuple[int, int]] = {}  # slot -> what, which block
        self.blocks = [bytes([block]) * BLOCK_BYTES for block in range(BLOCKS)]
        self.tx_free = list(range(RING))
        self.n_requests = 0
        self.n_sent, self.n_seen = 0, 0  # by the guest
        self.n_arrived, self.n_received = 0, 0  # for the guest
        for slot in range(RING):
            self._offer_rx(slot)

    # --- the driver

    def _offer_disk(self, slot: int) -> None:
        block = self._dice.choice(sorted(set(range(BLOCKS)) - {b for _, b in self.asked.values()}))
        kind = self._dice.choice((READ_BLOCK, WRITE_BLOCK))
        at = BUFFERS["disk"] + slot * 0x2000
        data = b"?" * BLOCK_BYTES
        if kind == WRITE_BLOCK:
            data = self.blocks[block] = self._dice.randbytes(16) * (BLOCK_BYTES // 16)
        self.ram.write(at, struct.pack("<IIQB", kind, 0, block * BLOCK_BYTES // 512, 0xFF))
        self.ram.write(at + 0x1000, data)
        buffers = [
            (at, 16, 0),
            (at + 0x1000, BLOCK_BYTES, 0 if kind else WRITE),
            (at + 16, 1, WRITE),
        ]
        self.asked[slot] = (kind, block)
        self.disk.offer(self.disk.chain(buffers, first=4 * slot))
        self.n_requests += 1

    def _offer_rx(self, slot: int) -> None:
        self.rx.offer(self.rx.chain([(BUFFERS["rx"] + slot * 0x1000, 2048, WRITE)], first=slot))

    def _offer_tx(self, slot: int) -> None:
        at = BUFFERS["tx"] + slot * 0x1000
        self.ram.write(at, bytes(HEADER_BYTES) + frame(self.n_sent, b"\x02\0\0\0\0\1"))
        self.tx.offer(self.tx.chain([(at, HEADER_BYTES + FRAME_BYTES, 0)], first=slot))
        self.n_sent += 1

    def offer(self) -> None:
        """Ask for more of each: whatever has a free slot."""
        while self.disk_free:
            self._offer_disk(self.disk_free.pop())
        while self.tx_free:
            self._offer_tx(self.tx_free.pop())
        # So few that there is always a buffer for one more, which then waits for nothing.
        while self.n_arrived - self.n_received < RING // 2:
            self.wire.send(frame(self.n_arrived, b"\x02\0\0\0\0\2"))
            self.n_arrived += 1

    def take(self) -> None:
        """Look at everything that came back."""
        for head, _ in self.disk.take_used():
            slot = head // 4
            kind, block = self.asked.pop(slot)
            at = BUFFERS["disk"] + slot * 0x2000
            assert self.ram.read(at + 16, 1) == b"\0", "a request failed"
            if kind == READ_BLOCK:
                assert self.ram.read(at + 0x1000, BLOCK_BYTES) == self.blocks[block]
            self.disk_free.append(slot)
        self.tx_free += [head for head, _ in self.tx.take_used()]
        for head, _ in self.rx.take_used():
            data = self.ram.read(BUFFERS["rx"] + head * 0x1000 + HEADER_BYTES, FRAME_BYTES)
            if is_ours(data):
                assert number(data) == self.n_received, "a frame for the guest was lost"
                self.n_received += 1
            self._offer_rx(head)

    def look_at_wire(self) -> None:
        """Frames of the guest are all there, in their order."""
        while select.select([self.wire], [], [], 0)[0]:
            data = self.wire.recv(2048)
            if is_ours(data):
                assert number(data) == self.n_seen, "a frame of the guest was lost"
                self.n_seen += 1

    # --- what a pause must leave

    def state(self, path: Path) -> tuple[bytes, ...]:
        """Everything that a device can change: used rings, buffers, the disk."""
        used = (self.ram.read(ring.used_gpa, 0x1000) for ring in (self.disk, self.rx, self.tx))
        buffers = (self.ram.read(base, 0x1_0000) for base in BUFFERS.values())
        return (*used, *buffers, path.read_bytes())


def frame(count: int, destination: bytes) -> bytes:
    """An Ethernet frame with a number."""
    header = destination + b"\x02\0\0\0\0\3" + ETHERTYPE.to_bytes(2)
    return (header + struct.pack("<I", count)).ljust(FRAME_BYTES, b".")


def is_ours(data: bytes) -> bool:
    """Whether it is one of frame(), and none that the host's kernel sends by itself."""
    return data[12:14] == ETHERTYPE.to_bytes(2)


def number(data: bytes) -> int:
    """The number of a frame."""
    count: int = struct.unpack_from("<I", data, 14)[0]
    return count


def set_up(device: RemoteDevice, *rings: RingDriver) -> None:
    """Initialise a device on rings of these sizes."""
    device.begin()
    for queue, ring in enumerate(rings):
        device.bar_write(0x16, 2, queue)
        device.bar_write(0x18, 2, ring.size)
        for register, gpa in ((0x20, ring.desc_gpa), (0x28, ring.avail_gpa), (0x30, ring.used_gpa)):
            device.bar_write(register, 8, gpa)
        device.bar_write(0x1C, 2, 1)
    device.go()


@pytest.fixture
def path(hostel: Hostel) -> Path:
    path = hostel.directory / "quiesce.raw"
    path.write_bytes(b"".join(bytes([block]) * BLOCK_BYTES for block in range(BLOCKS)))
    return path


@pytest.fixture
def guest(hostel: Hostel, path: Path, request: pytest.FixtureRequest) -> Iterator[RemoteGuest]:
    disk = {"id": "root", "path": str(path), **request.param}
    nic = {"id": "net0", "tap": hostel.tap("quiet"), "backend": "tap"}
    guest = RemoteGuest(hostel, disks=[disk], nics=[nic])
    yield guest
    guest.delete()


def kick(guest: RemoteGuest, devices: dict[int, RemoteDevice]) -> None:
    """Have the guest write to the doorbells of all queues for a while."""
    for _ in range(4):
        for bell in (
            devices[BLK].bar + 0x3000,
            devices[NET].bar + 0x3004,
            devices[NET].bar + 0x3000,
        ):
            guest.stir(bell, KICKS // 12)
    guest.send()


def work(load: Load, for_s: float) -> None:
    """Keep all rings full."""
    until = time.monotonic() + for_s
    while time.monotonic() < until:
        load.take()
        load.offer()
        load.look_at_wire()


def finish(load: Load, guest: RemoteGuest, devices: dict[int, RemoteDevice]) -> None:
    """Take in all that was asked for, with more kicks as long as it needs them."""
    deadline = time.monotonic() + LIMIT_S
    while load.asked or len(load.tx_free) < RING or load.n_received < load.n_arrived:
        assert time.monotonic() < deadline, f"lost: {load.asked} {load.tx_free} {load.n_received}"
        load.take()
        kick(guest, devices)
        guest.settle()
    load.look_at_wire()
    assert load.n_seen == load.n_sent


# With a limit there is always something in the ring that the engine would go on with.
DISKS: Final = [
    {"io_engine": "io_uring"},
    {"io_engine": "threads"},
    {"io_engine": "io_uring", "rate_limit": {"ops_per_s": 500, "ops_burst": 5}},
]


@pytest.mark.parametrize("guest", DISKS, indirect=True, ids=["io_uring", "threads", "limited"])
def test_pause_leaves_rings_at_rest_and_resume_loses_nothing(
    hostel: Hostel, guest: RemoteGuest, path: Path
) -> None:
    api, name = hostel.api, guest.name
    dice = random.Random(3)
    devices = find_devices(guest)
    ram = GuestRam(api.vm(name)["pid"])
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    with wire:
        wire.bind((hostel.tap("quiet"), 3))
        load = Load(ram, wire, dice)
        set_up(devices[BLK], load.disk)
        set_up(devices[NET], load.rx, load.tx)
        guest.settle()
        for _ in range(PAUSES):
            kick(guest, devices)
            work(load, dice.uniform(0, 0.02))
            api.act(name, "pause")
            # The device took what it has used, and nothing else.
            stats = api.get(f"/v1/vms/{name}/stats")
            [queue] = stats["disk_details"]["root"]["queues"]
            assert queue["in_flight"] == 0
            assert (queue["reads"] + queue["writes"]) % 65536 == load.disk.used_idx
            assert stats["nics"]["net0"]["tx_packets"] % 65536 == load.tx.used_idx
            at_rest = load.state(path)
            load.wire.send(frame(load.n_arrived, b"\x02\0\0\0\0\2"))
            load.n_arrived += 1
            time.sleep(0.01)
            assert load.state(path) == at_rest
            api.act(name, "resume")
        finish(load, guest, devices)
        assert path.read_bytes() == b"".join(load.blocks)
        assert min(load.n_requests, load.n_sent, load.n_received) > PAUSES
    ram.close()
