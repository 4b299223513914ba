# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The C ring and the slow model of it, on the same random rings, step by step."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_ffi._kvm import ffi, lib
from kvm_ffi.errors import BadDescriptorChain
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from kvm_ffi.virtqueue import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    DescriptorChain,
    Virtqueue,
)
from tests.support.virtqueue_model import Broken, ModelChain, ModelMemory, ModelQueue

LOW_SIZE, HIGH_GPA, HIGH_SIZE = 0x2000, 0x8000, 0x1000
DESC, AVAIL, USED, TABLE = 0x0, 0x400, 0x600, 0x800
INTERESTING = (0, 1, LOW_SIZE - 1, LOW_SIZE, HIGH_GPA - 1, HIGH_GPA, HIGH_GPA + HIGH_SIZE - 1,
               TABLE, TABLE + 16, TABLE + 1, DESC, USED, (1 << 64) - 1, (1 << 64) - 16)  # fmt: skip

addresses = st.sampled_from(INTERESTING) | st.integers(0, LOW_SIZE)
lengths = st.sampled_from((0, 1, 16, 32, 48, 17, 0x1000, 0xFFFFFFFF, 0xFFFFFFF0)) | st.integers(
    0, 64
)
# Mostly what a driver would write, so that long chains happen, and sometimes anything.
flags = st.sampled_from((0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 6, 7, 0xFFF8, 0xFFFF))
descriptors = st.builds(
    lambda addr, length, flag, after: struct.pack("<QIHH", addr, length, flag, after),
    addresses, lengths, flags, st.integers(0, 9) | st.just(0xFFFF),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One thing that the device or the driver does."""

    kind: str
    index: int
    value: int


kinds = ["pop"] * 3 + ["use"] * 2 + ["publish", "unpop", "kick"]
kinds += ["idx", "event", "flags", "ring", "desc"]
steps = st.lists(
    st.builds(
        Step,
        st.sampled_from(kinds),
        st.integers(0, 7),
        st.integers(0, 9) | st.integers(0, 0xFFFF),
    ),
    max_size=60,
)


@dataclass
class Rings:
    """The same guest memory twice, with a C queue on one and the model on the other."""

    real: Virtqueue
    model: ModelQueue
    memory: GuestMemory
    popped: list[tuple[DescriptorChain, ModelChain]]

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

    def drive(self, step: Step) -> None:
        """The driver changes a 16-bit field of its own while the device is at work."""
        size = self.real.size
        field = {
            "idx": AVAIL + 2,
            "event": AVAIL + 4 + 2 * size,
            "flags": AVAIL,
            "ring": AVAIL + 4 + 2 * (step.index % size),
            "desc": DESC + 16 * (step.index % size) + 12,
        }
        if step.kind in field:
            self.poke(field[step.kind], struct.pack("<H", step.value))


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(Gpa(0), LOW_SIZE), (Gpa(HIGH_GPA), HIGH_SIZE)]) as guest_memory:
        yield guest_memory


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from((1, 2, 4, 8)),
    event_idx=st.booleans(),
    indirect=st.booleans(),
    ring=st.lists(st.integers(0, 8), min_size=8, max_size=8),
    offered=st.integers(0, 8),
    table=st.lists(descriptors, min_size=8, max_size=8),
    second=st.lists(descriptors, min_size=4, max_size=4),
    taken=steps,
)
def test_the_ring_in_c_does_what_the_model_does(
    memory: GuestMemory, size: int, event_idx: bool, indirect: bool, ring: list[int],
    offered: int, table: list[bytes], second: list[bytes], taken: list[Step],
) -> None:  # fmt: skip
    memory.zero(Gpa(0), LOW_SIZE)
    memory.zero(Gpa(HIGH_GPA), HIGH_SIZE)
    features = (VIRTIO_F_EVENT_IDX if event_idx else 0) | (
        VIRTIO_F_INDIRECT_DESC if indirect else 0
    )
    model_memory = ModelMemory([(0, bytearray(LOW_SIZE)), (HIGH_GPA, bytearray(HIGH_SIZE))])
    rings = Rings(
        Virtqueue(memory, 0, size, Gpa(DESC), Gpa(AVAIL), Gpa(USED), features),
        ModelQueue(model_memory, size, DESC, AVAIL, USED, event_idx, indirect),
        memory,
        [],
    )
    rings.poke(DESC, b"".join(table[:size]))
    rings.poke(TABLE, b"".join(second))
    rings.poke(AVAIL + 4, struct.pack(f"<{size}H", *ring[:size]))
    rings.poke(AVAIL + 2, struct.pack("<H", min(offered, size)))
    for step in taken:
        rings.take(step)
        assert rings.real.is_broken == rings.model.is_broken
    for gpa, data in model_memory.regions:
        assert memory.read(Gpa(gpa), len(data)) == bytes(data)
