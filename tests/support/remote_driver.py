# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A virtio-pci driver that reaches its device through a guest: tests/support/remote_guest.py.

It polls: no vectors. Its rings and buffers lie in the guest's memory, so a test can put there what
no driver would.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import Final

from tests.support.remote_guest import RemoteGuest

BLK, NET, RNG = 2, 1, 4  # VIRTIO 1.2, section 5
NEXT, WRITE, INDIRECT = 1, 2, 4
VERSION_1, INDIRECT_DESC = 1 << 32, 1 << 28
QUEUE_SIZE: Final = 8
INITIALISED, NEEDS_RESET = 15, 64
LIMIT_S: Final = 20.0

_BARS: Final = 0xC000_0000
_BAR_BYTES: Final = 0x1_0000
_RINGS: Final = 0x40_0000
_QUEUE_STRIDE: Final = 0x4000
_ID_OF_VIRTIO: Final = 0x1AF4
_FIRST_DEVICE_ID: Final = 0x1040
_STATUS, _NOTIFY = 0x14, 0x3000

# What one descriptor says: address, length, flags, next.
Descriptor = tuple[int, int, int, int]


class RemoteDevice:
    """One device and where its rings are; `start` initialises it, and first resets it."""

    def __init__(self, guest: RemoteGuest, slot: int, kind: int, n_queues: int) -> None:
        self.guest, self.slot, self.kind, self.n_queues = guest, slot, kind, n_queues
        self.bar = _BARS + slot * _BAR_BYTES
        self._rings = _RINGS + slot * 0x1_0000
        self._used_seen = [0] * n_queues
        self._offered = [0] * n_queues
        self._moved: dict[int, tuple[int, int, int]] = {}

    def config_write(self, register: int, width: int, value: int) -> None:
        """Write to its PCI configuration space."""
        self.guest.port_out(0xCF8, 4, 0x8000_0000 | self.slot << 11 | register & 0xFC)
        self.guest.port_out(0xCFC + register % 4, width, value)

    def bar_write(self, offset: int, width: int, value: int) -> None:
        """Write to its BAR."""
        self.guest.write(self.bar + offset, width, value)

    @property
    def status(self) -> int:
        """The device status field."""
        return self.guest.read(self.bar + _STATUS, 1)

    def rings(self, queue: int) -> tuple[int, int, int]:
        """Return where a queue's descriptor table, available and used ring are."""
        if queue in self._moved:
            return self._moved[queue]
        base = self._rings + queue * _QUEUE_STRIDE
        return base, base + 0x1000, base + 0x2000

    def move_rings(self, queue: int, rings: tuple[int, int, int] | None) -> None:
        """Have a queue's rings in other memory from the next start on; None: where they were."""
        self._moved.pop(queue, None)
        if rings is not None:
            self._moved[queue] = rings

    def begin(self, features: int = VERSION_1) -> None:
        """Map the BAR, reset the device, and agree on features: VIRTIO 1.2, 3.1.1."""
        self.config_write(0x04, 2, 0)
        self.config_write(0x10, 4, self.bar)
        self.config_write(0x04, 2, 0x6)
        for status in (0, 1, 3):
            self.bar_write(_STATUS, 1, status)
        for select in (0, 1):
            self.bar_write(0x08, 4, select)
            self.bar_write(0x0C, 4, features >> 32 * select & 0xFFFF_FFFF)
        self.bar_write(_STATUS, 1, 11)

    def set_queue(self, queue: int, rings: tuple[int, int, int] | None = None) -> None:
        """Set one queue up and enable it; its rings are emptied where they are our own."""
        if rings is None:
            rings = self.rings(queue)
            self.guest.write(rings[1], 8, 0)
            self.guest.write(rings[2], 8, 0)
            self._used_seen[queue] = self._offered[queue] = 0
        self.bar_write(0x16, 2, queue)
        self.bar_write(0x18, 2, QUEUE_SIZE)
        for register, gpa in zip((0x20, 0x28, 0x30), rings, strict=True):
            self.bar_write(register, 8, gpa)
        self.bar_write(0x1C, 2, 1)

    def go(self) -> None:
        """Say DRIVER_OK."""
        self.bar_write(_STATUS, 1, 15)

    def start(self, features: int = VERSION_1) -> None:
        """Go through the whole initialisation, with all queues."""
        self.begin(features)
        for queue in range(self.n_queues):
            self.set_queue(queue)
        self.go()

    def set_descriptors(self, queue: int, descriptors: Sequence[Descriptor]) -> None:
        """Write the first entries of a descriptor table."""
        data = b"".join(struct.pack("<QIHH", *descriptor) for descriptor in descriptors)
        self.guest.write_bytes(self.rings(queue)[0], data)

    def offer(self, queue: int, head: int = 0) -> None:
        """Make the chain at ``head`` available and kick."""
        avail = self.rings(queue)[1]
        self.guest.write(avail + 4 + 2 * (self._offered[queue] % QUEUE_SIZE), 2, head)
        self._offered[queue] += 1
        self.claim(queue, self._offered[queue])

    def claim(self, queue: int, index: int) -> None:
        """Move the available index and kick."""
        self.guest.write(self.rings(queue)[1] + 2, 2, index)
        self.kick(queue)

    def kick(self, queue: int) -> None:
        """Write to the notify register."""
        self.bar_write(_NOTIFY + 4 * queue, 2, queue)

    def is_used(self, queue: int) -> bool:
        """Tell whether chains have come back since the last time that some had."""
        index = self.guest.read(self.rings(queue)[2] + 2, 2)
        has_new = index != self._used_seen[queue]
        self._used_seen[queue] = index
        return has_new

    def wait_used(self, queue: int) -> None:
        """Wait until a chain comes back."""
        deadline = time.monotonic() + LIMIT_S
        while not self.is_used(queue):
            assert time.monotonic() < deadline, f"slot {self.slot}: queue {queue} is not served"

    @property
    def is_broken(self) -> bool:
        """Whether it has been initialised and now asks for a reset."""
        return self.status == INITIALISED | NEEDS_RESET

    def wait_broken(self) -> None:
        """Wait until the device asks for a reset."""
        deadline = time.monotonic() + LIMIT_S
        while not self.is_broken:
            assert time.monotonic() < deadline, f"slot {self.slot}: status={self.status:#x}"

    def wait_reaction(self, queue: int) -> None:
        """Wait until a chain comes back or the device asks for a reset."""
        deadline = time.monotonic() + LIMIT_S
        while not self.is_used(queue) and not self.is_broken:
            assert time.monotonic() < deadline, f"slot {self.slot}: no reaction"


def find_devices(guest: RemoteGuest) -> dict[int, RemoteDevice]:
    """Find the virtio devices of bus 0 and map each; keys are the kinds."""
    found = {}
    for slot in range(32):
        guest.port_out(0xCF8, 4, 0x8000_0000 | slot << 11)
        identity = guest.port_in(0xCFC)
        if identity & 0xFFFF != _ID_OF_VIRTIO:
            continue
        kind = (identity >> 16) - _FIRST_DEVICE_ID
        found[kind] = RemoteDevice(guest, slot, kind, 2 if kind == NET else 1)
    return found
