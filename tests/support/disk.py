# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A virtio-blk disk of a few sectors, with its engine and a driver that can lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvm_ffi._kvm import lib
from kvm_ffi.blk_engine import BlkEngine
from kvm_ffi.eventfd import EventFd
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from kvm_ffi.virtqueue import Virtqueue
from tests.support.ring_driver import WRITE, RingDriver

# VIRTIO 1.2, 5.2.6
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1

SECTORS = 64
SECTOR = 512
HEADER = 0x40000
STATUS = 0x41000
DATA = 0x42000
PATTERN = bytes(range(256)) * 2 * SECTORS
UNANSWERED = 0xEE


@dataclass
class Disk:
    """A disk of SECTORS sectors filled with PATTERN, its engine and its driver."""

    memory: GuestMemory
    driver: RingDriver
    queue: Virtqueue
    engine: BlkEngine
    fd: int
    path: Path
    kick: EventFd
    irq: EventFd
    fault: EventFd

    def header(self, kind: int, sector: int = 0) -> None:
        self.memory.write(Gpa(HEADER), struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(Gpa(STATUS), bytes([UNANSWERED]))

    def serve(self) -> int:
        served: int = lib.blk_engine_serve(self.engine._c)
        return served

    def submit(self, kind: int, sector: int, buffers: list[tuple[int, int, int]]) -> int:
        """One request of header, buffers, status byte; its status."""
        self.header(kind, sector)
        head = self.driver.chain([(HEADER, 16, 0), *buffers, (STATUS, 1, WRITE)])
        self.driver.offer(head)
        assert self.serve() == 0
        return self.status

    @property
    def status(self) -> int:
        return self.memory.read(Gpa(STATUS), 1)[0]

    def read(self, sector: int, length: int) -> int:
        return self.submit(IN, sector, [(DATA, length, WRITE)])

    def write(self, sector: int, data: bytes) -> int:
        self.memory.write(Gpa(DATA), data)
        return self.submit(OUT, sector, [(DATA, len(data), 0)])

    def ranges(self, kind: int, *segments: tuple[int, int, int]) -> int:
        data = b"".join(struct.pack("<QII", *segment) for segment in segments)
        self.memory.write(Gpa(DATA), data)
        return self.submit(kind, 0, [(DATA, len(data), 0)])

    def content(self) -> bytes:
        return self.path.read_bytes()

    def offer_reads(self, count: int) -> None:
        """Offer the same one-sector read several times, without serving it."""
        self.header(IN)
        head = self.driver.chain([(HEADER, 16, 0), (DATA, SECTOR, WRITE), (STATUS, 1, WRITE)])
        self.driver.offer(*[head] * count)

    def has_used(self, count: int) -> bool:
        return self.driver.used_idx == count


MakeDisk = Callable[..., Disk]
