# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A slow, obvious model of the device's side of a split virtqueue.

Written from VIRTIO 1.2, 2.7 and not from the C: it works on plain bytes and big integers, so it
cannot wrap, overflow or leave a mapping. Hypothesis compares it with the C ring.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

NEXT, WRITE, INDIRECT = 1, 2, 4


class Broken(Exception):
    """The driver broke a rule."""


@dataclass
class ModelMemory:
    """Guest memory as (gpa, bytes) regions."""

    regions: list[tuple[int, bytearray]]

    def locate(self, gpa: int, length: int) -> tuple[bytearray, int]:
        for start, data in self.regions:
            if start <= gpa < start + len(data) and gpa + length <= start + len(data):
                return data, gpa - start
        raise Broken(f"gpa={gpa:#x} length={length:#x}")

    def read(self, gpa: int, length: int) -> bytes:
        data, offset = self.locate(gpa, length)
        return bytes(data[offset : offset + length])

    def write(self, gpa: int, new: bytes) -> None:
        data, offset = self.locate(gpa, len(new))
        data[offset : offset + len(new)] = new

    def u16(self, gpa: int) -> int:
        value: int = struct.unpack("<H", self.read(gpa, 2))[0]
        return value


@dataclass(frozen=True)
class ModelChain:
    """Buffers as (gpa, length), empty ones left out."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]


@dataclass
class ModelQueue:
    """The device's side of one queue; all indices are plain integers modulo 2**16."""

    memory: ModelMemory
    size: int
    desc: int
    avail: int
    used: int
    event_idx: bool
    indirect: bool
    next_avail: int = 0
    next_used: int = 0
    published: int = 0
    is_broken: bool = False
    in_flight: int = 0
    seen: int = 0  # avail.idx; looked at again only when all of it has been popped
    must_interrupt: bool = False

    def restore(self, index: int) -> None:
        """Go on where another device stopped, with nothing in flight."""
        self.next_avail = self.next_used = self.published = self.seen = index
        # Nobody knows what the other one signalled.
        self.must_interrupt = True

    def pop(self) -> ModelChain | None:
        if self.is_broken:
            raise Broken("broken before")
        try:
            return self._pop()
        except Broken:
            self.is_broken = True
            raise

    def _pop(self) -> ModelChain | None:
        if self.seen == self.next_avail:
            idx = self.memory.u16(self.avail + 2)
            if (idx - self.next_avail) % 65536 > self.size:
                raise Broken("avail.idx jumped")
            self.seen = idx
        if self.seen == self.next_avail:
            return None
        if self.in_flight == self.size:
            raise Broken("more chains than descriptors")
        head = self.memory.u16(self.avail + 4 + 2 * (self.next_avail % self.size))
        chain = self._walk(head)
        self.next_avail = (self.next_avail + 1) % 65536
        self.in_flight += 1
        return chain

    def _walk(self, head: int) -> ModelChain:
        buffers: list[tuple[int, int, bool]] = []
        table, count, index, nested = self.desc, self.size, head, False
        for _ in range(2 * self.size + 2):
            if index >= count:
                raise Broken("descriptor index")
            addr, length, flags, after = struct.unpack(
                "<QIHH", self.memory.read(table + 16 * index, 16)
            )
            if flags & INDIRECT:
                if nested or not self.indirect or flags & NEXT:
                    raise Broken("indirect not allowed here")
                if length == 0 or length % 16 or length // 16 > self.size:
                    raise Broken("indirect table length")
                self.memory.locate(addr, length)
                table, count, index, nested = addr, length // 16, 0, True
                continue
            buffers.append((addr, length, bool(flags & WRITE)))
            if len(buffers) > self.size:
                break
            if not flags & NEXT:
                return self._split(head, buffers)
            index = after
        raise Broken("chain too long")

    def _split(self, head: int, buffers: list[tuple[int, int, bool]]) -> ModelChain:
        kinds = [is_writable for _, _, is_writable in buffers]
        if kinds != sorted(kinds):
            raise Broken("writable before readable")
        if sum(length for _, length, _ in buffers) > 0xFFFFFFFF:
            raise Broken("total length")
        for addr, length, _ in buffers:
            if length:
                self.memory.locate(addr, length)
        return ModelChain(
            head,
            tuple((addr, length) for addr, length, kind in buffers if length and not kind),
            tuple((addr, length) for addr, length, kind in buffers if length and kind),
        )

    def unpop(self, count: int) -> None:
        self.next_avail = (self.next_avail - count) % 65536
        self.in_flight -= count

    def add_used(self, head: int, written: int) -> None:
        slot = self.next_used % self.size
        self.memory.write(self.used + 4 + 8 * slot, struct.pack("<II", head, written))
        self.next_used = (self.next_used + 1) % 65536
        self.in_flight -= 1

    def publish(self) -> bool:
        count = (self.next_used - self.published) % 65536
        fresh = [(self.published + n) % 65536 for n in range(count)]
        if not fresh:
            return False
        self.memory.write(self.used + 2, struct.pack("<H", self.next_used))
        self.published = self.next_used
        if self.must_interrupt:
            self.must_interrupt = False
            return True
        if self.event_idx:
            # 2.7.7.2: interrupt when the element at used_event is among the new ones.
            return self.memory.u16(self.avail + 4 + 2 * self.size) in fresh
        return not self.memory.u16(self.avail) & 1

    def enable_kick(self) -> bool:
        if self.is_broken:
            return False
        if self.event_idx:
            self.memory.write(self.used + 4 + 8 * self.size, struct.pack("<H", self.next_avail))
        else:
            self.memory.write(self.used, bytes(2))
        return self.memory.u16(self.avail + 2) != self.next_avail
