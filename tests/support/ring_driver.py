# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A synthetic virtio driver: builds rings in guest memory, honestly or not.

It writes the bytes that the specification describes (VIRTIO 1.2, 2.7) by itself, without the
code under test, so that the two check each other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from kvm_ffi.virtqueue import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, Virtqueue

NEXT = 1
WRITE = 2
INDIRECT = 4
NO_INTERRUPT = 1
NO_NOTIFY = 1


@dataclass(frozen=True)
class Desc:
    """One descriptor as it lies in guest memory."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        return struct.pack("<QIHH", self.addr, self.length, self.flags, self.next)


class RingDriver:
    """The driver's side of one queue: desc, avail and used from `base`, one page each or more."""

    def __init__(self, memory: GuestMemory, *, size: int = 8, base: int = 0x1000) -> None:
        self.memory = memory
        self.size = size
        self.desc_gpa = Gpa(base)
        self.avail_gpa = Gpa(base + _pages(16 * size))
        self.used_gpa = Gpa(self.avail_gpa + _pages(6 + 2 * size))
        self.end = self.used_gpa + _pages(6 + 8 * size)
        self.avail_idx = 0
        self.used_seen = 0

    def queue(self, *, event_idx: bool = False, indirect: bool = True, index: int = 0) -> Virtqueue:
        features = (VIRTIO_F_EVENT_IDX if event_idx else 0) | (
            VIRTIO_F_INDIRECT_DESC if indirect else 0
        )
        return Virtqueue(
            self.memory, index, self.size, self.desc_gpa, self.avail_gpa, self.used_gpa, features
        )

    def set_desc(self, index: int, desc: Desc) -> None:
        self.memory.write(Gpa(self.desc_gpa + 16 * index), desc.pack())

    def set_table(self, gpa: int, descs: list[Desc]) -> None:
        """Write descriptors one after the other, as an indirect table has them."""
        self.memory.write(Gpa(gpa), b"".join(desc.pack() for desc in descs))

    def chain(self, buffers: list[tuple[int, int, int]], *, first: int = 0) -> int:
        """Lay (gpa, length, flags) buffers out as a chain from descriptor `first`; its head."""
        for offset, (gpa, length, flags) in enumerate(buffers):
            is_last = offset == len(buffers) - 1
            link = 0 if is_last else NEXT
            self.set_desc(
                first + offset,
                Desc(gpa, length, flags | link, 0 if is_last else first + offset + 1),
            )
        return first

    def offer(self, *heads: int) -> None:
        """Make chains available, the index last."""
        for head in heads:
            slot = self.avail_idx % self.size
            self.memory.write(Gpa(self.avail_gpa + 4 + 2 * slot), struct.pack("<H", head))
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.set_avail_idx(self.avail_idx)

    def set_avail_idx(self, idx: int) -> None:
        self.memory.write(Gpa(self.avail_gpa + 2), struct.pack("<H", idx))

    def set_avail_flags(self, flags: int) -> None:
        self.memory.write(self.avail_gpa, struct.pack("<H", flags))

    def set_used_event(self, idx: int) -> None:
        self.memory.write(Gpa(self.avail_gpa + 4 + 2 * self.size), struct.pack("<H", idx))

    @property
    def used_flags(self) -> int:
        return _u16(self.memory, self.used_gpa)

    @property
    def used_idx(self) -> int:
        return _u16(self.memory, self.used_gpa + 2)

    @property
    def avail_event(self) -> int:
        return _u16(self.memory, self.used_gpa + 4 + 8 * self.size)

    def take_used(self) -> list[tuple[int, int]]:
        """(head, written) of everything that the device published since the last call."""
        taken = []
        while self.used_seen != self.used_idx:
            slot = self.used_seen % self.size
            taken.append(
                struct.unpack("<II", self.memory.read(Gpa(self.used_gpa + 4 + 8 * slot), 8))
            )
            self.used_seen = (self.used_seen + 1) & 0xFFFF
        return [(head, written) for head, written in taken]


def _u16(memory: GuestMemory, gpa: int) -> int:
    value: int = struct.unpack("<H", memory.read(Gpa(gpa), 2))[0]
    return value


def _pages(size: int) -> int:
    return (size + 0xFFF) & ~0xFFF
