# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest whose drivers write garbage to every register, and offer rings that no driver would.

Whatever it does: its worker lives, another VM's disk is served meanwhile, a device whose ring is
broken asks for a reset, and after a reset it answers a right request.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from typing import Final

import pytest

from tests.support.disk_kernel import DiskGuest
from tests.support.hostel import Hostel
from tests.support.remote_driver import (
    BLK,
    INDIRECT,
    INDIRECT_DESC,
    INITIALISED,
    NET,
    NEXT,
    QUEUE_SIZE,
    RNG,
    VERSION_1,
    WRITE,
    Descriptor,
    RemoteDevice,
    find_devices,
)
from tests.support.remote_guest import RemoteGuest

# RAM fills all below the hole for devices, and goes on above 4 GiB.
MEMORY_MIB: Final = 3072 + 16
HOLE, HIGH, TOP = 0xC000_0000, 1 << 32, (1 << 32) + (16 << 20)
DATA: Final = 0x80_0000
DATA_BYTES: Final = 4096
ETHERTYPE: Final = 0x88B5  # IEEE 802: local experimental
ETH_P_ALL: Final = 3
GARBAGE_WRITES: Final = 250
KINDS: Final = [BLK, NET, RNG]
KIND_IDS: Final = ["blk", "net", "rng"]


class Rig:
    """The hostile VM, its devices, and a neighbour that only wants its disk."""

    def __init__(self, hostel: Hostel) -> None:
        self.hostel = hostel
        self.path = hostel.directory / "hostile.raw"
        self.path.write_bytes(random.Random(2).randbytes(1 << 20))
        quiet = hostel.directory / "neighbour.raw"
        quiet.write_bytes(b"n" * (1 << 20))
        tap = hostel.tap("evil")
        self.neighbour = DiskGuest(hostel, quiet)
        self.guest = RemoteGuest(
            hostel,
            memory_mib=MEMORY_MIB,
            rng=True,
            disks=[{"id": "root", "path": str(self.path)}],
            nics=[{"id": "net0", "tap": tap, "backend": "tap"}],
        )
        self.pid = hostel.api.vm(self.guest.name)["pid"]
        self.devices = find_devices(self.guest)
        self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.wire.bind((tap, ETH_P_ALL))
        self.wire.settimeout(20)

    def close(self) -> None:
        self.wire.close()
        self.guest.delete()
        self.neighbour.delete()

    def check_neighbour(self) -> None:
        """Another VM's disk is served."""
        assert self.neighbour.ask("a") == ["0n1"]

    def check_host(self) -> None:
        """Nothing but the hostile guest has noticed anything."""
        self.check_neighbour()
        vm = self.hostel.api.vm(self.guest.name)
        assert (vm["state"], vm["pid"], vm["reason"]) == ("running", self.pid, None)
        logs = self.hostel.daemon.state_dir.glob("vms/*/worker.log")
        assert not [log for log in logs if "Traceback" in log.read_text()]

    def check_served(self, device: RemoteDevice) -> None:
        """A reset, and the device does what it is there for."""
        device.start()
        assert device.status == INITIALISED
        {BLK: self._read_block, NET: self._send_frame, RNG: self._take_entropy}[device.kind](device)

    def _read_block(self, disk: RemoteDevice) -> None:
        sector = 3
        self.guest.write(DATA, 8, 0)
        self.guest.write(DATA + 8, 8, sector)
        self.guest.write(DATA + 16, 1, 0xFF)
        self.guest.write_bytes(DATA + 512, bytes(16))
        block = [(DATA, 16, NEXT, 1), (DATA + 512, 512, NEXT | WRITE, 2), (DATA + 16, 1, WRITE, 0)]
        disk.set_descriptors(0, block)
        disk.offer(0)
        disk.wait_used(0)
        assert self.guest.read(DATA + 16, 1) == 0
        at = sector * 512
        assert self.guest.read_bytes(DATA + 512, 16) == self.path.read_bytes()[at : at + 16]

    def _send_frame(self, nic: RemoteDevice) -> None:
        frame = b"\xff" * 6 + b"\x02\0\0\0\0\1" + ETHERTYPE.to_bytes(2) + b"a right frame".ljust(46)
        self.guest.write_bytes(DATA, bytes(12) + frame)
        nic.set_descriptors(1, [(DATA, 12 + len(frame), 0, 0)])
        nic.offer(1)
        nic.wait_used(1)
        while self.wire.recv(2048) != frame:
            continue

    def _take_entropy(self, rng: RemoteDevice) -> None:
        self.guest.write_bytes(DATA, bytes(32))
        rng.set_descriptors(0, [(DATA, 32, WRITE, 0)])
        rng.offer(0)
        rng.wait_used(0)
        assert self.guest.read_bytes(DATA, 32) != bytes(32)


@pytest.fixture(scope="module")
def rig(hostel: Hostel) -> Iterator[Rig]:
    rig = Rig(hostel)
    yield rig
    rig.close()


def queue_of(kind: int) -> int:
    """Return the queue that gets requests at any time: an interface's transmit queue."""
    return 1 if kind == NET else 0


def some_value(chance: random.Random) -> int:
    """A value, often one that means something."""
    known = [0, 1, 2, 4, 8, 15, 64, 0xFFFF, 0xFFFF_FFFF, HOLE, HIGH, TOP - 16]
    return chance.choice([*known, chance.getrandbits(64)])


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_garbage_in_every_register_leaves_a_device_that_serves(rig: Rig, kind: int) -> None:
    chance = random.Random(kind)
    device, written = rig.devices[kind], []
    device.start()
    for _ in range(GARBAGE_WRITES):
        # Half of them to the common configuration: eight pages are all too wide for it.
        offset = chance.choice([chance.randrange(0x40), chance.randrange(0x8000)])
        width = chance.choice([1, 2, 4, 8])
        written.append((offset & -width, width, some_value(chance)))
        device.bar_write(*written[-1])
    for register in range(0, 0x100, 4):
        written.append((register, 4, some_value(chance) & 0xFFFF_FFFF))
        device.config_write(*written[-1])
    rig.guest.settle()
    print(written)  # shown where the test fails
    rig.check_host()
    rig.check_served(device)


def chains(table: int) -> dict[str, list[Descriptor]]:
    """Return descriptor tables that break a rule of VIRTIO 1.2, 2.7.5; chain 0 is offered."""
    loop: list[Descriptor] = [(DATA, 16, NEXT, 1), (DATA, 16, NEXT, 0)]
    inner = table + 16 * 4
    wrong = {
        "loop": loop,
        "loop on itself": [(DATA, 16, NEXT | WRITE, 0)],
        "next beyond the table": [(DATA, 16, NEXT, QUEUE_SIZE)],
        "next far beyond": [(DATA, 16, NEXT, 0xFFFF)],
        "readable after writable": [(DATA, 16, NEXT | WRITE, 1), (DATA, 16, 0, 0)],
        "longest buffer": [(DATA, 0xFFFF_FFFF, WRITE, 0)],
        "longer than 4 GiB": [(DATA, 1 << 31, NEXT | WRITE, 1), (DATA, 1 << 31, WRITE, 0)],
        "indirect in indirect": [
            (inner, 16, INDIRECT, 0),
            *[(0, 0, 0, 0)] * 3,
            (inner, 16, INDIRECT, 0),
        ],
        "indirect and next": [(inner, 16, INDIRECT | NEXT, 1), (DATA, 16, WRITE, 0)],
        "empty indirect table": [(inner, 0, INDIRECT, 0)],
        "half an indirect entry": [(inner, 24, INDIRECT, 0)],
        "indirect table larger than the ring": [(inner, 16 * (QUEUE_SIZE + 1), INDIRECT, 0)],
        "indirect loop": [(inner, 16, INDIRECT, 0), *[(0, 0, 0, 0)] * 3, (DATA, 8, NEXT, 0)],
    }
    places = {
        "across the end of low RAM": HOLE - 8,
        "in the hole": HOLE,
        "at a BAR's notify page": HOLE + 0x1_3000,
        "at the local APIC": 0xFEE0_0000,
        "across 4 GiB": HIGH - 8,
        "across the end of RAM": TOP - 8,
        "behind RAM": TOP,
        "at the end of addresses": (1 << 64) - 8,
    }
    for name, gpa in places.items():
        wrong[f"buffer {name}"] = [(gpa, 16, WRITE, 0)]
        wrong[f"indirect table {name}"] = [(gpa, 32, INDIRECT, 0)]
    return wrong


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_a_broken_chain_makes_the_device_ask_for_a_reset(rig: Rig, kind: int) -> None:
    device = rig.devices[kind]
    queue = queue_of(kind)
    for name, table in chains(device.rings(queue)[0]).items():
        print(name)
        device.start(VERSION_1 | INDIRECT_DESC)
        device.set_descriptors(queue, table)
        device.offer(queue)
        device.wait_broken()
        rig.check_neighbour()
    rig.check_host()
    rig.check_served(device)


def odd_chains(chance: random.Random) -> Iterator[list[Descriptor]]:
    """Yield chains that no driver would send, though most break no rule of the ring."""
    edges = [0, HOLE - 16, HIGH, TOP - 16]
    yield [(DATA, 0, 0, 0)]
    yield [(DATA, 0, WRITE, 0)]
    yield [(DATA, 64, NEXT, 1), (DATA, 64, NEXT, 2), (DATA + 8, 64, WRITE, 0)]
    yield [(DATA, 16, NEXT, 1), *[(DATA, 4096, NEXT | WRITE, n + 1) for n in range(1, 6)],
           (DATA, 1, WRITE, 0)]  # fmt: skip
    yield [(DATA, 1 << 30, 0, 0)]
    yield [(DATA, 16, NEXT, 1), (DATA, 1 << 30, WRITE, 0)]
    for gpa in edges:
        yield [(gpa, 16, NEXT, 1), (DATA, 512, WRITE | NEXT, 2), (gpa, 16, WRITE, 0)]
    for _ in range(10):
        yield [
            (DATA + chance.randrange(64), chance.randrange(600), NEXT, 1),
            (DATA + chance.randrange(64), chance.randrange(600), NEXT | WRITE, 2),
            (DATA + chance.randrange(64), chance.randrange(600), WRITE, 0),
        ]


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_an_odd_chain_is_answered_or_the_device_asks_for_a_reset(rig: Rig, kind: int) -> None:
    device, chance = rig.devices[kind], random.Random(kind)
    queue = queue_of(kind)
    for table in odd_chains(chance):
        words = [chance.getrandbits(64) for _ in range(8)]
        words[:2] = chance.choice([0, 1, 4, 8, 11, 13]), chance.choice([0, 2047, 2048, 1 << 62])
        print(table, words)
        device.start()
        rig.guest.write_bytes(DATA, b"".join(word.to_bytes(8, "little") for word in words))
        device.set_descriptors(queue, table)
        device.offer(queue)
        device.wait_reaction(queue)
        rig.check_neighbour()
    rig.check_host()
    rig.check_served(device)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_an_available_index_that_runs_away_makes_the_device_ask_for_a_reset(
    rig: Rig, kind: int
) -> None:
    device = rig.devices[kind]
    queue = queue_of(kind)
    for index in (QUEUE_SIZE + 1, 0x8000, 0xFFFF):
        device.start()
        device.claim(queue, index)
        device.wait_broken()
    # And moving back and forth, while the device looks.
    device.start()
    device.set_descriptors(queue, [(DATA, 64, 0 if kind == NET else WRITE, 0)])
    for _ in range(50):
        device.kick(queue)
        rig.guest.stir(device.rings(queue)[1] + 2, QUEUE_SIZE)
    device.claim(queue, 0x4000)
    device.wait_broken()
    rig.check_host()
    rig.check_served(device)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_a_ring_that_is_not_in_ram_makes_the_device_ask_for_a_reset(rig: Rig, kind: int) -> None:
    device = rig.devices[kind]
    queue = queue_of(kind)
    places = [HOLE - 16, HOLE, 0xFEE0_0000, HIGH - 16, TOP - 16, TOP, 1 << 46, (1 << 64) - 16]
    places.append(device.rings(queue)[0] + 1)
    for which in range(3):
        for gpa in places:
            print(which, hex(gpa))
            rings = list(device.rings(queue))
            rings[which] = gpa
            device.begin()
            for each in range(device.n_queues):
                device.set_queue(each, (rings[0], rings[1], rings[2]) if each == queue else None)
            device.go()
            device.wait_broken()
            rig.check_neighbour()
    rig.check_host()
    rig.check_served(device)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_rings_at_the_very_edges_of_ram_are_served(rig: Rig, kind: int) -> None:
    device = rig.devices[kind]
    queue = queue_of(kind)
    # Sizes are those of VIRTIO 1.2, 2.7; each ring is aligned as it says there.
    ends = (HOLE - 16 * QUEUE_SIZE, HOLE - (6 + 2 * QUEUE_SIZE), HOLE - (8 + 8 * QUEUE_SIZE))
    desc, avail, used = device.rings(queue)
    try:
        for rings in (
            (0, avail, used),
            (ends[0], avail, used),
            (desc, ends[1], used),
            (desc, avail, ends[2]),
        ):
            device.move_rings(queue, rings)
            rig.check_served(device)
    finally:
        device.move_rings(queue, None)
