# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The C ring and the slow model of it over the same guest memory, one step at a time."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from kvm_ffi._kvm import ffi, lib
from kvm_ffi.errors import BadDescriptorChain
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from kvm_ffi.virtqueue import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    DescriptorChain,
    Virtqueue,
    VirtqueueState,
)
from tests.support.virtqueue_model import Broken, ModelChain, ModelMemory, ModelQueue

LOW_SIZE, HIGH_GPA, HIGH_SIZE = 0x2000, 0x8000, 0x1000
DESC, AVAIL, USED, TABLE = 0x0, 0x400, 0x600, 0x800
INTERESTING = (0, 1, LOW_SIZE - 1, LOW_SIZE, HIGH_GPA - 1, HIGH_GPA, HIGH_GPA + HIGH_SIZE - 1,
               TABLE, TABLE + 16, TABLE + 1, DESC, USED, (1 << 64) - 1, (1 << 64) - 16)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One thing that the device or the driver does."""

    kind: str
    index: int
    value: int


# What a random device and a random driver do, the usual more often.
KINDS = ["pop"] * 3 + ["use"] * 2 + ["publish", "unpop", "kick"]
KINDS += ["idx", "event", "flags", "ring", "desc"]


@dataclass
class Rings:
    """The same guest memory twice, with a C queue on one and the model on the other."""

    real: Virtqueue
    model: ModelQueue
    memory: GuestMemory
    popped: list[tuple[DescriptorChain, ModelChain]] = field(default_factory=list)

    @classmethod
    def make(cls, memory: GuestMemory, size: int, *, event_idx: bool, indirect: bool) -> Rings:
        """Rings of zeros; `memory` has the regions LOW and HIGH."""
        memory.zero(Gpa(0), LOW_SIZE)
        memory.zero(Gpa(HIGH_GPA), HIGH_SIZE)
        features = (VIRTIO_F_EVENT_IDX if event_idx else 0) | (
            VIRTIO_F_INDIRECT_DESC if indirect else 0
        )
        model_memory = ModelMemory([(0, bytearray(LOW_SIZE)), (HIGH_GPA, bytearray(HIGH_SIZE))])
        return cls(
            Virtqueue(memory, 0, size, Gpa(DESC), Gpa(AVAIL), Gpa(USED), features),
            ModelQueue(model_memory, size, DESC, AVAIL, USED, event_idx, indirect),
            memory,
        )

    def start_at(self, index: int) -> None:
        """Both go on where a queue stood before it was stopped, and the driver with them."""
        self.real.restore(VirtqueueState(index, index))
        self.model.restore(index)
        self.poke(AVAIL + 2, struct.pack("<H", index))
        self.poke(USED + 2, struct.pack("<H", index))

    def compare(self) -> None:
        """Every byte of guest memory is the same."""
        for gpa, data in self.model.memory.regions:
            assert self.memory.read(Gpa(gpa), len(data)) == bytes(data)

    def poke(self, gpa: int, data: bytes) -> None:
        self.memory.write(Gpa(gpa), data)
        self.model.memory.write(gpa, data)

    def gpas(self, chain: DescriptorChain) -> tuple[list[tuple[int, int]], int]:
        """The (gpa, length) of each buffer of a C chain, and how many are readable."""
        count = chain._n_readable + chain._n_writable
        found = []
        for entry in chain._iov[0:count]:
            hva = int(ffi.cast("uintptr_t", entry.iov_base))
            region = next(r for r in self.memory.regions if r.hva <= hva < r.hva + r.size_bytes)
            found.append((region.gpa + hva - region.hva, int(entry.iov_len)))
        return found, chain._n_readable

    def pop(self) -> None:
        try:
            expected = self.model.pop()
        except Broken:
            with pytest.raises(BadDescriptorChain):
                self.real.pop()
            return
        chain = self.real.pop()
        if expected is None:
            assert chain is None
            return
        assert chain is not None
        buffers, n_readable = self.gpas(chain)
        assert chain.head == expected.head
        assert tuple(buffers[:n_readable]) == expected.readable
        assert tuple(buffers[n_readable:]) == expected.writable
        self.popped.append((chain, expected))

    def take(self, step: Step) -> None:
        match step.kind:
            case "pop":
                self.pop()
            case "use" if self.popped:
                chain, model_chain = self.popped.pop(step.index % len(self.popped))
                written = min(step.value, chain.writable_len)
                self.real.add_used(chain, written)
                self.model.add_used(model_chain.head, written)
            case "unpop" if self.popped:
                self.popped.pop()
                lib.virtqueue_unpop(self.real.raw, 1)
                self.model.unpop(1)
            case "publish":
                assert self.real.publish() == self.model.publish()
            case "kick":
                assert self.real.enable_kick() == self.model.enable_kick()
            case _:
                self.drive(step)
        assert self.real.is_broken == self.model.is_broken

    def drive(self, step: Step) -> None:
        """The driver changes a 16-bit field of its own while the device is at work."""
        size = self.real.size
        fields = {
            "idx": AVAIL + 2,
            "event": AVAIL + 4 + 2 * size,
            "flags": AVAIL,
            "ring": AVAIL + 4 + 2 * (step.index % size),
            "desc": DESC + 16 * (step.index % size) + 12,
        }
        if step.kind in fields:
            self.poke(fields[step.kind], struct.pack("<H", step.value))
